"""Hold the simulator against published measurements.

    python -m experiments.validation --data FILE [--fit] [--seed S] [--json] [-o DIR]

FILE is a CSV with one measured training step a row; every row that can be expressed is predicted. Of each source, whole
groups of rows (same model, GPUs and batch) are held out, half of all, by a seed; what software stacks add to benchmarks
(at most three constants for each system) was fitted to the other halves of seed 0, or is fitted anew by ``--fit``.
The tables go to stdout (with ``--json``, one object instead), the same as a page and a scatter picture of each source
into DIR (``validation/``).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.validation.evaluate import evaluate
from experiments.validation.questions import read_questions
from experiments.validation.report import plain, write
from meshwright.errors import MeshwrightError


def main(arguments: Sequence[str] | None = None) -> int:
    """0: done; 1: the file or folder cannot be used, in one line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.validation", description="Hold the simulator against published measurements."
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="CSV of measured training steps")
    parser.add_argument("--fit", action="store_true", help="fit the constants of software stacks to the fit halves")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="which groups are held out (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("validation"),
        metavar="DIR",
        help="where the page and the pictures go (default: %(default)s)",
    )
    chosen = parser.parse_args(arguments)
    if chosen.seed and not chosen.fit:
        parser.error("the shipped constants were fitted with the halves of seed 0; other seeds need --fit")
    whose = "fitted to the other halves" if chosen.fit else "as shipped"
    split = f"Held-out halves of seed {chosen.seed}, constants {whose}"
    options = "".join([" --fit" if chosen.fit else "", f" --seed {chosen.seed}" if chosen.seed else ""])
    command = f"python -m experiments.validation --data {chosen.data.name}{options}"
    try:
        sources = evaluate(
            read_questions(chosen.data), lambda line: print(line, file=sys.stderr), seed=chosen.seed, fit=chosen.fit
        )
        for path in write(sources, chosen.output, command, split):
            print(f"wrote {path}", file=sys.stderr)
    except MeshwrightError as error:
        print(error, file=sys.stderr)
        return 1
    if chosen.json:
        print(json.dumps({"sources": [source.to_data() for source in sources]}, allow_nan=False))
    else:
        print(plain(sources, split))
    return 0


if __name__ == "__main__":
    sys.exit(main())
