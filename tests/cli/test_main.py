"""Exit codes and messages of the command line, with a command that ends in every way there is."""

import argparse
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from meshwright import __version__
from meshwright.cli import main as cli
from meshwright.errors import ClusterError

Install = Callable[[Callable[[argparse.Namespace], int]], None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Install:
    """Put a command ``fake`` with a flag ``--json`` into the table, whose work is the given function."""
    monkeypatch.chdir(tmp_path)

    def put(run: Callable[[argparse.Namespace], int]) -> None:
        module = ModuleType("meshwright.cli.fake")
        module.add_arguments = lambda parser: parser.add_argument("--json", action="store_true")  # type: ignore[attr-defined]
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(cli.COMMANDS, "fake", cli.Command(module.__name__, "a command for tests"))

    return put


def raises(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


def test_a_command_gets_its_arguments_and_gives_the_exit_code(install: Install) -> None:
    seen: list[argparse.Namespace] = []
    install(lambda args: seen.append(args) or 0)  # type: ignore[func-returns-value]
    assert cli.main(["fake", "--json"]) == 0
    assert seen[0].json is True


def test_a_request_that_cannot_be_met_is_one_line_on_stderr(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install(raises(ClusterError("no machine 'p4':\n  use one of cpu, h100")))
    assert cli.main(["fake", "--json"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "meshwright: no machine 'p4': use one of cpu, h100\n"


def test_a_path_of_the_user_that_cannot_be_used_is_not_our_fault(
    install: Install, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    missing = tmp_path / "nowhere" / "plan.json"
    install(lambda args: len(missing.read_text()))
    assert cli.main(["fake"]) == 1
    assert str(missing) in capsys.readouterr().err
    assert not list(tmp_path.glob("*.log"))


def test_a_file_missing_from_the_package_is_our_fault(install: Install, tmp_path: Path) -> None:
    inside = Path(cli.__file__).parent / "lost.json"
    install(lambda args: len(inside.read_text()))
    assert cli.main(["fake"]) == 3
    assert (tmp_path / "meshwright-fault-1.log").exists()


def test_a_fault_of_ours_names_a_log_that_holds_the_traceback(
    install: Install, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    install(raises(ZeroDivisionError("a stage of no layers")))
    assert cli.main(["fake", "--json"]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    log = tmp_path / "meshwright-fault-1.log"
    assert str(log) in err
    assert "ZeroDivisionError: a stage of no layers" in log.read_text()


def test_ctrl_c_ends_with_130(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install(raises(KeyboardInterrupt()))
    assert cli.main(["fake"]) == 130
    assert capsys.readouterr().err == "meshwright: stopped\n"


def test_a_pipe_that_breaks_inside_a_command_is_our_fault(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # this stdout cannot break
    install(raises(BrokenPipeError("a rank has gone")))
    assert cli.main(["fake"]) == 3


def test_a_reader_who_has_gone_is_met_with_silence(tmp_path: Path) -> None:
    script = tmp_path / "prints.py"
    script.write_text(
        "import sys, types\n"
        "from meshwright.cli import main as cli\n"
        "fake = types.ModuleType('fake')\n"
        "fake.add_arguments = lambda parser: None\n"
        "fake.run = lambda args: [print('x' * 80) for _ in range(100_000)] and 0\n"
        "sys.modules['fake'] = fake\n"
        "cli.COMMANDS['fake'] = cli.Command('fake', 'prints')\n"
        "sys.exit(cli.main(['fake']))\n"
    )
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (141, "")


@pytest.mark.parametrize("wrong", [[], ["no-such-command"], ["fake", "--no-such-flag"], ["fake", "--js"]])
def test_wrong_usage_ends_with_2_and_leaves_stdout_empty(
    wrong: list[str], install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install(lambda args: 0)
    assert cli.main(wrong) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: meshwright")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"meshwright {__version__}\n"


def test_help_lists_every_command_and_imports_none() -> None:
    code = (
        "import sys\n"
        "from meshwright.cli import main as cli\n"
        "cli.main(['--help'])\n"
        "sys.exit(any(command.module in sys.modules for command in cli.COMMANDS.values())"
        " or any(name in sys.modules for name in ('jax', 'mpi4py', 'numba', 'scipy')))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, "help has imported what it does not need"
    assert all(name in shown.stdout for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "meshwright", name, "--help"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith(f"usage: meshwright {name}")
    assert shown.stderr == ""
