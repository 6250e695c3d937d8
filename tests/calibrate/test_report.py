"""The report names every fit, and each picture that it shows is there."""

import re
from pathlib import Path

import pytest

from meshwright.calibrate.assemble import assemble
from meshwright.calibrate.report import file_name, pictures, write_report
from meshwright.errors import ClusterError
from tests.calibrate.test_assemble import COMPUTE, NETWORK


def test_every_fit_has_a_row_and_a_picture(tmp_path: Path) -> None:
    calibration = assemble(COMPUTE, NETWORK, "made")
    page = write_report(calibration, tmp_path / "report")
    text = page.read_text("utf-8")
    names = [picture.name for picture in pictures(calibration)]
    assert {"matmul f32", "matmul bf16", "memory-bound", "p2p of 2 ranks", "all_reduce of 4 ranks"} <= set(names)
    assert len({file_name(name) for name in names}) == len(names)
    shown = re.findall(r"\]\((\S+\.png)\)", text)
    assert shown == [file_name(name) for name in names]
    assert all((page.parent / name).read_bytes().startswith(b"\x89PNG") for name in shown)
    assert all(f"| {name} |" in text for name in names)


def test_what_lies_on_its_line_has_no_residual() -> None:
    for picture in pictures(assemble(COMPUTE, NETWORK, "made")):
        assert picture.residual.p90 < 1e-2, picture.name


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ClusterError, match="choose another folder"):
        write_report(assemble(COMPUTE, None, "made"), tmp_path / "file" / "report")
