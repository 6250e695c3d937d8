"""The validation tool: any file ends with numbers, refused rows or one clear line; never with a traceback."""

import csv
import io
import json
import math
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.validation.__main__ import main
from experiments.validation.cases import read_case
from experiments.validation.rows import Refused, Row, read_rows
from experiments.validation.score import bias_percent, mape_percent, regret_percent, spearman

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "measured_runs.csv"
ROW = {
    "source_id": "some paper",
    "hardware": "A100-SXM",
    "gpus": "8",
    "gpus_per_node": "8",
    "framework": "Megatron-LM",
    "model": "GPT",
    "layers": "8",
    "hidden": "1024",
    "heads": "16",
    "vocab": "51200",
    "seq": "1024",
    "precision": "fp16",
    "gbs": "16",
    "mbs": "2",
    "tp": "2",
    "pp": "2",
    "dp": "2",
    "sharding": "none",
    "recompute": "full",
    "schedule": "1f1b",
    "iter_time_s": "0.5",
    "tokens_per_s": "",
    "tokens_per_s_gpu": "",
    "samples_per_s_gpu": "",
    "status": "ok",
    "notes": "",
}
SCORES = {"mape_percent", "bias_percent", "spearman", "regret_percent", "memory_mape_percent"}
KEYS = {"source", "rows", "refused", "held_out"} | SCORES


def text(*rows: dict[str, str]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def row(**cells: str) -> Row:
    return Row(2, {**ROW, **cells})


def run(path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str, str]:
    code = main(["--data", str(path), "-o", str(path.parent / "report"), *more])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


# Scores


def test_errors_of_a_drawn_example() -> None:
    predicted, measured = [1.1, 1.8, 3.0], [1.0, 2.0, 4.0]
    assert mape_percent(predicted, measured) == pytest.approx((10 + 10 + 25) / 3)
    assert bias_percent(predicted, measured) == pytest.approx((10 - 10 - 25) / 3)
    assert spearman(predicted, measured) == pytest.approx(1.0)
    assert mape_percent([], []) is None
    assert spearman([1.0], [1.0]) is None
    assert spearman([1.0, 1.0], [1.0, 2.0]) is None


@given(st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3)), min_size=2, max_size=30, unique_by=lambda x: x))
def test_ranks_agree_with_scipy(pairs: list[tuple[float, float]]) -> None:
    from scipy.stats import spearmanr

    predicted, measured = zip(*pairs, strict=True)
    found = spearman(predicted, measured)
    if found is None:
        assert len(set(predicted)) == 1 or len(set(measured)) == 1
    else:
        assert found == pytest.approx(spearmanr(predicted, measured).statistic)


def test_regret_is_what_following_the_prediction_costs() -> None:
    groups = ["a", "a", "a", "b", "b", "alone"]
    predicted = [1.0, 2.0, 3.0, 5.0, 4.0, 1.0]
    measured = [12.0, 10.0, 11.0, 7.0, 5.0, 9.0]
    regret, count = regret_percent(groups, predicted, measured)
    assert regret == pytest.approx((20 + 0) / 2)
    assert count == 2
    assert regret_percent(["a", "b"], [1.0, 2.0], [1.0, 2.0]) == (None, 0)


# Rows


@pytest.mark.parametrize(
    ("cells", "seconds"),
    [
        ({"iter_time_s": "0.5"}, 0.5),
        ({"iter_time_s": "", "tokens_per_s": "32768"}, 0.5),
        ({"iter_time_s": "", "tokens_per_s_gpu": "4096"}, 0.5),
        ({"iter_time_s": "", "samples_per_s_gpu": "4"}, 0.5),
    ],
)
def test_seconds_come_from_whatever_rate_is_given(cells: dict[str, str], seconds: float) -> None:
    case = read_case(row(**cells))
    assert case.measured_seconds == pytest.approx(seconds)
    assert any(text.startswith("time from") for text in case.assumed) == (cells["iter_time_s"] == "")


def test_a_row_becomes_what_it_says() -> None:
    case = read_case(row(kv_heads="4", ffn_hidden="2816", model="Llama3-8B", sharding="ZeRO-1", seq_parallel="True"))
    model, grid = case.model, case.grid
    assert (model.layers, model.hidden, model.heads, model.key_heads, model.ffn) == (8, 1024, 16, 4, 2816)
    assert model.gated
    assert not model.tied
    assert (grid.tensor, grid.pipeline, grid.data, grid.batch, grid.microbatch_size) == (2, 2, 2, 16, 2)
    assert (grid.zero, grid.sequence_parallel, grid.recompute, grid.schedule) == (1, True, "full", "1f1b")
    assert case.cluster.devices == 8


def test_hosts_and_network_are_the_rows_own() -> None:
    wide = {"gpus": "16", "dp": "4", "gpus_per_node": "4", "interconnect": "NVLink + 400 Gbps IB/node"}
    case = read_case(row(**wide))
    assert len(case.cluster.hosts) == 4
    quicker = read_case(row(**{**wide, "interconnect": "NVLink + 800 Gbps IB/node"}))
    cap, twice = (one.cluster.inter_host.host_bytes_per_second for one in (case, quicker))
    assert cap is not None
    assert twice is not None
    assert twice.value == pytest.approx(2 * cap.value)
    assert cap.value < 50e9  # 400 Gbit/s


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"hardware": "TPU-v4"}, "no machine for TPU-v4"),
        ({"layers": ""}, "no layers"),
        ({"layers": "eight"}, "impossible layers"),
        ({"heads": "-3"}, "impossible heads"),
        ({"layers": "1000000000"}, "impossible layers"),
        ({"gpus": "1000000000", "dp": ""}, "impossible gpus"),
        ({"schedule": "interleaved-1f1b", "vp": "900"}, "more stages than layers"),
        ({"hidden": "1e400"}, "impossible hidden"),
        ({"hidden": "nan"}, "impossible hidden"),
        ({"gpus": "12"}, "gpus do not fill the hosts"),
        ({"dp": "3"}, "tp × pp × cp × dp is not gpus"),
        ({"status": "oom"}, "status oom"),
        ({"iter_time_s": ""}, "no measured time"),
        ({"iter_time_s": "0"}, "impossible iter_time_s"),
        ({"framework": "abacus"}, "no software stack for framework abacus"),
        ({"model": "DeepSeek-V3 671B (MoE)"}, "model DeepSeek"),
        ({"precision": "int4"}, "precision int4"),
        ({"sharding": "ZeRO-9"}, "sharding ZeRO-9"),
        ({"schedule": "2f2b"}, "schedule 2f2b"),
        ({"recompute": "sometimes"}, "recompute sometimes"),
        ({"seq_parallel": "perhaps"}, "impossible seq_parallel"),
        ({"heads": "17"}, "the model does not divide over the grid"),
        ({"gbs": "17"}, "the model does not divide over the grid"),
    ],
)
def test_rows_that_cannot_be_predicted_say_why(cells: dict[str, str], reason: str) -> None:
    with pytest.raises(Refused) as refusal:
        read_case(row(**cells))
    assert refusal.value.reason.startswith(reason)
    assert "\n" not in str(refusal.value)


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_garbage_in_any_cell_is_refused_or_read(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(ROW)), min_size=1, max_size=4, unique=True))
    junk = st.one_of(st.text(max_size=8), st.sampled_from(["", "0", "-1", "1e9", "1e308", "inf", "2.5", "None", "٣"]))
    cells = {name: data.draw(junk) for name in names}
    try:
        case = read_case(row(**cells))
    except Refused:
        return
    assert case.measured_seconds > 0
    assert math.isfinite(case.measured_seconds)


# Files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("a,b\n1,2\n", "lacks the columns source_id"),
        (text({**ROW}).split("\n")[0] + "\n", "has no rows"),
        (text({k: v for k, v in ROW.items() if "_s" not in k}), "has no measured time"),
    ],
)
def test_files_that_are_no_table_end_with_one_line(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(content)
    code, out, err = run(path, capsys, "--json")
    assert code == 1
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_files_that_cannot_be_read_end_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "raw.csv").write_bytes(bytes(range(256)))
    for path in (tmp_path / "missing.csv", tmp_path, tmp_path / "raw.csv"):
        code, out, err = run(path, capsys)
        assert (code, out, err.count("\n")) == (1, "", 1)


def test_json_is_one_object_with_null_where_nothing_is_defined(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "runs.csv"
    other = {"source_id": "other paper", "hardware": "TPU-v4", "surprise": "an unknown column"}
    path.write_text(text({**ROW, "surprise": ""}, {**ROW, **other}))
    code, out, _ = run(path, capsys, "--json")
    assert code == 0
    some, none = json.loads(out)["sources"]
    assert set(some) == set(none) == KEYS
    assert (some["source"], some["rows"], some["refused"]) == ("some paper", 1, 0)
    assert some["mape_percent"] > 0
    assert (some["spearman"], some["regret_percent"]) == (None, None)
    nothing = dict.fromkeys(SCORES)
    assert none == {"source": "other paper", "rows": 0, "refused": 1, **nothing, "held_out": {"rows": 0, **nothing}}
    assert some["held_out"] == {"rows": 1} | {name: some[name] for name in SCORES}


def test_a_table_a_page_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, folder = tmp_path / "runs.csv", tmp_path / "report"
    plans = [{"tp": "2", "pp": "2"}, {"tp": "4", "pp": "1"}, {"tp": "1", "pp": "4", "hardware": "TPU"}]
    path.write_text(text(*({**ROW, **plan} for plan in plans)))
    code, out, _ = run(path, capsys, "-o", str(folder))
    assert code == 0
    assert "some paper" in out
    assert "no machine for TPU (1)" in out
    assert sorted(file.name for file in folder.iterdir()) == ["some_paper.png", "validation.md"]
    page = (folder / "validation.md").read_text()
    assert "| some paper | 2 | 1 |" in page
    assert "![some paper](some_paper.png)" in page


def test_a_folder_that_cannot_be_written_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(text(ROW))
    code, out, err = run(path, capsys, "-o", str(path / "below"))
    assert (code, out) == (1, "")
    assert "cannot be written" in err


# The measurements themselves


@pytest.mark.skipif(not DATA.exists(), reason="measured_runs.csv is not beside this checkout (../shared/data)")
def test_a_sample_of_the_measured_runs_is_predicted_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loose bounds that only nonsense breaks; the figures themselves stand in docs/validation.md."""
    with DATA.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    sample = random.Random(0).sample(rows, 150)
    path = tmp_path / "runs.csv"
    path.write_text(text(*sample))
    code, out, _ = run(path, capsys, "--json")
    assert code == 0
    sources = {source["source"]: source for source in json.loads(out)["sources"]}
    assert sum(source["rows"] + source["refused"] for source in sources.values()) == 150
    for name in ("vtrain_single", "llm_foundry"):
        assert sources[name]["refused"] == 0
        assert sources[name]["mape_percent"] < 45
        assert sources[name]["spearman"] > 0.9


@pytest.mark.skipif(not DATA.exists(), reason="measured_runs.csv is not beside this checkout (../shared/data)")
def test_every_measured_row_is_read_or_refused_for_a_reason() -> None:
    reasons = set()
    for one in read_rows(DATA):
        try:
            read_case(one)
        except Refused as refusal:
            reasons.add(refusal.reason)
    assert len(reasons) < 30
