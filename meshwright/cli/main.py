"""The ``meshwright`` command: finds the chosen command's file, runs it and turns its end into an exit code.

Exit codes: 0 done; 1 the request cannot be met; 2 wrong usage; 3 our own fault; 130 Ctrl-C; 141 the reader of our
output has gone. Only the chosen command's file is imported, so that help is quick and planning stays free of JAX.
"""

import argparse
import io
import os
import select
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from meshwright import __version__
from meshwright.cli.fault import write_fault_log
from meshwright.errors import MeshwrightError

DONE = 0
CANNOT = 1
WRONG_USAGE = 2
OUR_FAULT = 3
STOPPED = 130  # as a shell reports a program that Ctrl-C ended: 128 + SIGINT
READER_GONE = 141  # 128 + SIGPIPE

# A path that the user gave and the system refuses is the user's to mend.
REFUSED_PATHS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


class CommandModule(Protocol):
    """What the file of a command offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


@dataclass(frozen=True, slots=True)
class Command:
    """Where a command lives, and its line in the help."""

    module: str
    help: str


COMMANDS = {
    "calibrate": Command("meshwright.cli.calibrate", "measure this machine and write a cluster file"),
    "plan": Command("meshwright.cli.plan", "find the best way to split a model's training step over a cluster"),
    "simulate": Command("meshwright.cli.simulate", "predict time, memory and bubbles of a plan or of a bare schedule"),
    "explain": Command("meshwright.cli.explain", "why a plan is as fast and as full as it is, against another"),
    "export": Command(
        "meshwright.cli.export", "write a plan as plain JAX, Megatron-LM flags or a MaxText configuration"
    ),
    "execute": Command("meshwright.cli.execute", "train as a plan says and hold the run against the prediction"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (``sys.argv`` by default) and return its exit code; never raises."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _run(given)
        sys.stdout.flush()  # here, so that a reader who has gone is noticed where we can answer
    except MeshwrightError as error:
        return _say(CANNOT, str(error))
    except KeyboardInterrupt:
        return _say(STOPPED, "stopped")
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            # What is still buffered would raise once more when the interpreter closes stdout.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return READER_GONE
        if isinstance(error, REFUSED_PATHS) and _is_users(error):
            return _say(CANNOT, f"{error.filename}: {error.strerror}; give a path that can be used")
        log = write_fault_log(error, given, Path.cwd())
        what = textwrap.shorten(f"{type(error).__name__}: {error}", width=200)
        where = f"please report it with the log {log}" if log else "no log could be written"
        return _say(OUR_FAULT, f"this is our own fault ({what}); {where}")
    return code


def _run(given: Sequence[str]) -> int:
    chosen = next((word for word in given if not word.startswith("-")), None)
    parser = argparse.ArgumentParser(
        prog="meshwright",
        description="Plan, predict and run distributed JAX training.",
        epilog="`meshwright COMMAND --help` tells more about one command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"meshwright {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    module: CommandModule | None = None
    for name, command in COMMANDS.items():
        its_parser = commands.add_parser(name, help=command.help, description=command.help, allow_abbrev=False)
        if name == chosen:
            module = cast("CommandModule", import_module(command.module))
            module.add_arguments(its_parser)
    try:
        args = parser.parse_args(given)
    except SystemExit as end:  # how argparse ends after help, the version or wrong usage
        return end.code if isinstance(end.code, int) else WRONG_USAGE
    assert module is not None, "the parser lets only the names of the table pass"
    return module.run(args)


def _reader_is_gone() -> bool:
    """Whether it is our stdout that broke; a pipe inside a command that breaks (to a rank, say) is a fault."""
    try:
        poll = select.poll()
        poll.register(sys.stdout, 0)  # an error is reported unasked
    except io.UnsupportedOperation:  # stdout is held in memory
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _is_users(error: OSError) -> bool:
    """Whether the path is the user's; a file of the package that is missing is our own fault."""
    if not isinstance(error.filename, str | os.PathLike):
        return False
    package = Path(__file__).absolute().parents[1]  # not resolved: its links lead out of it
    return not Path(error.filename).absolute().is_relative_to(package)


def _say(code: int, message: str) -> int:
    """One line on stderr, whatever the message holds."""
    print("meshwright:", " ".join(message.split()), file=sys.stderr)
    return code
