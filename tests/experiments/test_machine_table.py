"""The page of shipped machines shows what their files hold."""

from pathlib import Path

from experiments.machine_table import machine_rows, residual_rows
from meshwright.calibrate.hardware import shipped_machines

PAGE = Path(__file__).resolve().parents[2] / "docs" / "machines.md"


def test_the_page_holds_the_tables_of_today() -> None:
    """Made anew by `python -m experiments.machine_table`."""
    page = PAGE.read_text(encoding="utf-8")
    assert "\n".join(machine_rows()) in page
    assert "\n".join(residual_rows()) in page


def test_every_machine_has_a_row_and_what_was_not_measured_is_in_italics() -> None:
    rows = {name: row for row in machine_rows() for name in shipped_machines() if row.startswith(f"| `{name}` ")}
    assert set(rows) == set(shipped_machines())
    assert "| *100* |" in rows["gh200"]  # four cards of 200 Gbit/s
    assert "| 1561 |" in rows["dgx-a100"]
    assert "55.04 (2026-11-09)" in rows["p5.48xlarge"]
