"""The Python of the documents runs, one block after another, and prints what stands under it."""

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = [page for page in sorted(DOCS.glob("*.md")) if "```python" in page.read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_prints_what_it_shows(
    page: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # blocks may write pictures
    text = page.read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": "page"}
    for block, shown in re.findall(
        r"^```python\n(.*?)^```$(?:\s*^```(?:text)?\n(.*?)^```$)?", text, re.DOTALL | re.MULTILINE
    ):
        exec(block, names)
        printed = capsys.readouterr().out
        if shown:
            assert printed == shown
