"""Each example prints what stands beside it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "experiments" / "examples").glob("*.py"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_prints_what_stands_beside_it(script: Path) -> None:
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.stderr == ""
    assert run.stdout == script.with_suffix(".out").read_text(encoding="utf-8")
