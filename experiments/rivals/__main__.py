"""``python -m experiments.rivals --data DIR``: ours beside theirs, on the rivals' own inputs and cost terms."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from experiments.rivals.report import RIVALS, Row, table
from meshwright.errors import MeshwrightError


def main(arguments: list[str] | None = None) -> int:
    """Run the comparisons that were asked for and print them; 1 where the data is missing."""
    parser = argparse.ArgumentParser(prog="python -m experiments.rivals", description=__doc__)
    parser.add_argument(
        "--data", required=True, type=Path, metavar="DIR", help="the folder of graphs/, rivals/, aceso/"
    )
    parser.add_argument("--only", choices=sorted(RIVALS), action="append", help="one rival; may be repeated")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args(arguments)
    try:
        rows = list(_rows(args.data, args.only or list(RIVALS)))
    except (MeshwrightError, FileNotFoundError) as error:
        print(f"rivals: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"rows": [row.facts() for row in rows]}) if args.json else table(rows))
    return 0


def _rows(data: Path, names: list[str]) -> Iterator[Row]:
    for name in names:
        for row in RIVALS[name](data):
            print(f"{row.rival} {row.case}: {row.ours_seconds:.6g} s", file=sys.stderr)
            yield row


if __name__ == "__main__":
    sys.exit(main())
