"""What an interrupted calibration leaves is reused where it fits, and noticed in one line where it does not."""

import json
import time
from pathlib import Path

import pytest

from meshwright.calibrate.partial import Partial, settings_key
from meshwright.calibrate.timing import ComputeTimings, Measured, timing

ENVIRONMENT = {"NPROC": "1"}
MEASURED = Measured(device_kind="cpu", round=0, timing=timing("matmul f32", 1e6, [1e-3] * 5), spent_seconds=0.5)
COMPUTE = ComputeTimings(
    device_kind="cpu",
    platform="cpu",
    devices=1,
    cores=2,
    memory_bytes=1 << 30,
    jax_version="0.10.2",
    settings="NPROC=1",
    timings=(MEASURED.timing,),
)


def started(folder: Path) -> Path:
    out = folder / "machine.json"
    partial = Partial(out, ENVIRONMENT)
    assert partial.notice == ""
    partial.add(MEASURED)
    partial.add(MEASURED)
    return out


def test_the_next_run_finds_the_timings_and_removes_them_in_the_end(tmp_path: Path) -> None:
    out = started(tmp_path)
    again = Partial(out, ENVIRONMENT)
    assert again.measured == [MEASURED, MEASURED]
    assert "going on from 2 timings" in again.notice
    again.finish(COMPUTE)
    assert Partial(out, ENVIRONMENT).compute == COMPUTE
    again.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_was_torn_off_is_left_out_and_the_file_goes_on_behind_it(tmp_path: Path) -> None:
    out = started(tmp_path)
    path = tmp_path / "machine.json.partial"
    path.write_bytes(path.read_bytes()[:-10])
    again = Partial(out, ENVIRONMENT)
    assert again.measured == [MEASURED]
    again.add(MEASURED)
    assert Partial(out, ENVIRONMENT).measured == [MEASURED, MEASURED]


def test_other_settings_age_damage_and_foreign_files_start_anew(tmp_path: Path) -> None:
    path = tmp_path / "machine.json.partial"
    head = {"format": "meshwright-calibration-partial", "version": 1, "key": settings_key(ENVIRONMENT)}
    foreign = [
        ("it is damaged", b"\x00\xff\n"),
        ("it is damaged", b"[1]\n"),
        ("no partial calibration", json.dumps({**head, "format": "x"}).encode()),
        ("older than a day", json.dumps({**head, "started": time.time() - 90000}).encode()),
        ("it is damaged", json.dumps({**head, "started": time.time()}).encode() + b'\n{"measured": {}}\n'),
        ("it is damaged", b""),
    ]
    for why, data in foreign:
        path.write_bytes(data)
        found = Partial(tmp_path / "machine.json", ENVIRONMENT)
        assert why in found.notice
        assert "\n" not in found.notice
        assert (found.measured, found.compute) == ([], None)
    path.unlink()
    other = Partial(started(tmp_path), {"NPROC": "2"})
    assert "settings" in other.notice
    assert other.measured == []


@pytest.mark.parametrize("change", [{"XLA_FLAGS": "--x"}, {"NPROC": "2"}, {"CUDA_VISIBLE_DEVICES": "1"}])
def test_the_key_knows_what_changes_timings(change: dict[str, str]) -> None:
    assert settings_key({**ENVIRONMENT, **change}) != settings_key(ENVIRONMENT)
    assert settings_key({**ENVIRONMENT, "HOME": "/elsewhere"}) == settings_key(ENVIRONMENT)


def test_fresh_ignores_what_is_there(tmp_path: Path) -> None:
    out = started(tmp_path)
    anew = Partial(out, ENVIRONMENT, fresh=True)
    assert "--fresh" in anew.notice
    assert anew.measured == []
