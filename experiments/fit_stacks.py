"""Published training steps → the constants of software stacks on the systems that they were measured on.

    python -m experiments.fit_stacks --data FILE [FILE ...] [--seed S] [--write]

Each FILE is read as ``experiments.validation`` reads it. For each system and stack, at most three constants are fitted
to the fit half of the rows (by the seed); the table shows them, their residual there and on the half held out. With
``--write`` they replace those of the same systems in the file of stacks, each with its range, source and residual.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from experiments.validation.evaluate import Source, evaluate
from experiments.validation.fitting import Fit
from experiments.validation.questions import read_questions
from experiments.validation.score import mape_percent
from meshwright.calibrate.quantity import Quantity
from meshwright.errors import MeshwrightError
from meshwright.simulate.workload.stack import FACTORS, SHIPPED, Constants, StacksFile


def main(arguments: Sequence[str] | None = None) -> int:
    """0: done; 1: a file cannot be used, in one line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.fit_stacks", description="Fit the constants of software stacks to measured steps."
    )
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE", help="CSV of measured steps")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="which groups are held out (default: 0)")
    parser.add_argument("--write", action="store_true", help="put the constants into the file of stacks")
    chosen = parser.parse_args(arguments)
    try:
        sources = [source for path in chosen.data for source in _fitted(path, chosen.seed)]
    except MeshwrightError as error:
        print(error, file=sys.stderr)
        return 1
    found = {}
    for source in sources:
        for (system, stack), fit in source.fits.items():
            rows, held_out = held_out_mape_percent(source, system, stack)
            print(line(system, stack, fit, rows, held_out))
            found[system, stack] = constants(source.name, fit, chosen.seed, rows, held_out)
    if chosen.write:
        write(found, SHIPPED)
        print(f"wrote {SHIPPED.name}", file=sys.stderr)
    return 0


def _fitted(path: Path, seed: int) -> tuple[Source, ...]:
    return evaluate(read_questions(path), lambda text: print(text, file=sys.stderr), seed=seed, fit=True)


def held_out_mape_percent(source: Source, system: str, stack: str) -> tuple[int, float | None]:
    """Rows of a system and stack that were held out, and the error there; None without any."""
    results = [
        result for result in source.held_out.results if (result.case.system, result.case.stack.name) == (system, stack)
    ]
    predicted = [result.predicted_seconds for result in results]
    return len(results), mape_percent(predicted, [result.case.measured_seconds for result in results])


def line(system: str, stack: str, fit: Fit, rows: int, held_out: float | None) -> str:
    """One line of the table."""
    numbers = ", ".join(
        f"{name} {fit.constants[name]:.4g} ({low:.4g} to {high:.4g})" for name, (low, high) in fit.ranges.items()
    )
    beyond = "" if held_out is None else f"; held out, {rows} rows: {held_out:.1f} %"
    return f"{system}, {stack}: {numbers}. MAPE on {fit.rows} rows {fit.mape_percent:.1f} %{beyond}"


def constants(source: str, fit: Fit, seed: int, rows: int, held_out: float | None) -> Constants:
    """What the file of stacks says."""
    beyond = "none held out" if held_out is None else f"{held_out:.1f} % on {rows} rows held out"
    fitted_to = f"fitted to {fit.rows} steps of {source} (seed {seed}): MAPE {fit.mape_percent:.1f} %, {beyond}"
    known = {name: Quantity(fit.constants[name], fitted_to, *fit.ranges[name]) for name in fit.ranges}
    for name in FACTORS:
        known.setdefault(name, Quantity(fit.constants[name], "what is usual: not fitted on this system"))
    return Constants(**known)


def write(found: dict[tuple[str, str], Constants], path: Path) -> None:
    """Put constants into a file of stacks; those of other systems stay."""
    file = msgspec.json.decode(path.read_bytes(), type=StacksFile)
    stacks = {}
    for name, stack in file.stacks.items():
        mine: Iterable[tuple[str, Constants]] = ((system, now) for (system, of), now in found.items() if of == name)
        systems = dict(sorted((stack.systems | dict(mine)).items()))
        stacks[name] = msgspec.structs.replace(stack, systems=systems)
    text = msgspec.json.format(msgspec.json.encode(msgspec.structs.replace(file, stacks=stacks)), indent=2)
    path.write_bytes(text + b"\n")


if __name__ == "__main__":
    sys.exit(main())
