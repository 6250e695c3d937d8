"""The table of known makespans, where it is at hand beside the checkout."""

import json
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "schedule_oracle.json"


@pytest.fixture(scope="session")
def oracle() -> dict[str, Any]:
    """Makespans, peaks and lists of many schedules; it names ours with ``_`` for ``-``."""
    if not DATA.exists():
        pytest.skip(f"needs the published table {DATA.name} in ../shared/data beside the checkout")
    table: dict[str, Any] = json.loads(DATA.read_text(encoding="utf-8"))
    return table
