"""Sampled steps against closed forms: sums of lognormals, stragglers by hand, and no variability at all."""

import re
from math import exp, expm1, sqrt
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import ScheduleError
from meshwright.simulate.build import build_code
from meshwright.simulate.compiled import Compiled, compile_program
from meshwright.simulate.costs import PipelineCosts, StageCosts, TransferCost
from meshwright.simulate.pipeline import simulate
from meshwright.simulate.program import parse
from meshwright.simulate.topology import CoreSharing
from meshwright.simulate.variability import Variability, sample_steps

ALL = Variability(
    kernel_jitter=0.1,
    transfer_jitter=0.3,
    host_jitter=0.05,
    straggler_probability=0.1,
    straggler_factor=1.5,
    slow_link_probability=0.1,
    slow_link_factor=3,
    hosts=(range(4), range(4, 16)),
)


def pipeline(
    schedule: str = "1f1b",
    stages: int = 4,
    microbatches: int = 8,
    *,
    forward: float = 1,
    backward: float = 2,
    wire: float = 0,
    hop: float = 0,
    devices: int = 1,
    **more: Any,
) -> tuple[Compiled, PipelineCosts]:
    """Equal stages of so many devices each, with every transfer alike."""
    stream = more.pop("collective_stream", False)
    program = compile_program(build_code(schedule, stages, microbatches), collective_stream=stream)
    costs = tuple(
        StageCosts(
            devices=tuple(range(s * devices, (s + 1) * devices)),
            forward_seconds=forward,
            backward_seconds=backward,
            **more,
        )
        for s in range(stages)
    )
    moves = {tuple(key): TransferCost(wire, hop) for key in program.transfers}
    return program, PipelineCosts(costs, moves, collective_stream=stream)  # type: ignore[arg-type]


tenths = st.integers(0, 30).map(lambda n: n / 10)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["gpipe", "1f1b"]), st.integers(1, 6), st.integers(1, 9), tenths, tenths, tenths, st.booleans())
def test_without_variability_every_sample_is_the_prediction_to_the_last_bit(
    schedule: str, stages: int, microbatches: int, forward: float, wire: float, hop: float, stream: bool
) -> None:
    program, costs = pipeline(
        schedule,
        stages,
        microbatches,
        forward=forward,
        wire=wire,
        hop=hop,
        reduce_seconds=0.7,
        collective_stream=stream,
    )
    timeline = simulate(program, costs)
    sampled = sample_steps(program, costs, Variability(), samples=3)
    assert sampled.seconds.tolist() == [timeline.makespan_seconds] * 3
    if not stream:
        assert np.mean(sampled.bubble_fraction) == pytest.approx(timeline.bubble_fraction)


def test_without_variability_programs_that_share_are_the_prediction_too() -> None:
    program, costs = pipeline("gpipe", 3, 4, wire=1.5, hop=0.1)
    cores = PipelineCosts(costs.stages, costs.transfers, (CoreSharing(range(3), (1.0, 1.2, 1.7)),))
    one_link = {key: TransferCost(1.5, 0.1, link=0) for key in costs.transfers}
    for shared in (cores, PipelineCosts(costs.stages, one_link)):
        makespan = simulate(program, shared).makespan_seconds
        assert makespan > simulate(program, costs).makespan_seconds
        assert sample_steps(program, shared, Variability(), samples=2).seconds.tolist() == [makespan] * 2


def two_flows(capacity: float) -> tuple[Compiled, PipelineCosts]:
    """Two stages send 2 bytes, at 1 byte/s when alone, over one link to a third; what comes back is free."""
    program = parse("0F0 0>2a0 0<2c0 0B0\n1F0 1>2a0 1<2c0 1B0\n2<0a0 2<1a0 2F0 2B0 2>0c0 2>1c0")
    costs = tuple(StageCosts(devices=(s,), forward_seconds=1, backward_seconds=1) for s in range(3))
    flow, free = TransferCost(2.0, 0.0, bytes=2.0, links=(0,)), TransferCost(0.0, 0.0)
    moves = {key: flow if key.what == "activation" else free for key in compile_program(program).transfers}
    return compile_program(program), PipelineCosts(costs, moves, link_bytes_per_second=(capacity,))  # type: ignore[arg-type]


@pytest.mark.parametrize(("capacity", "makespan"), [(2.0, 6), (1.5, 1 + 4 / 1.5 + 3), (1.0, 8)])
def test_flows_that_fill_a_link_slow_each_other_in_samples_too(capacity: float, makespan: float) -> None:
    program, costs = two_flows(capacity)
    exact = simulate(program, costs).makespan_seconds
    assert exact == pytest.approx(makespan)
    assert sample_steps(program, costs, Variability(), samples=2).seconds.tolist() == [exact] * 2


def test_flows_meet_only_in_the_samples_in_which_they_overlap() -> None:
    """A sender that is three times as slow starts at 3, when the other's 2 s are over: nothing is shared."""
    program, costs = two_flows(1.0)
    apart = sample_steps(program, costs, Variability(slow_devices={1: 3}), samples=1)
    assert apart.seconds.tolist() == [3 + 2 + 1 + 1 + 3]
    together = sample_steps(program, costs, Variability(slow_devices={1: 2}), samples=1)
    assert together.seconds.tolist() == pytest.approx([2 + 3 + 1 + 1 + 2])


def test_the_event_queue_draws_what_the_quick_path_draws() -> None:
    """Cores that slow nobody, and a resource that is listed but never short, change nothing in any sample."""
    program, costs = pipeline(stages=4, wire=0.2, hop=0.1, devices=2, update_seconds=0.5)
    idle = PipelineCosts(costs.stages, costs.transfers, (CoreSharing(range(90, 99), (1.0, 2.0)),))
    quick = sample_steps(program, costs, ALL, samples=20, seed=4)
    queued = sample_steps(program, idle, ALL, samples=20, seed=4)
    assert quick.seconds.tolist() == queued.seconds.tolist()
    assert quick.critical_mesh.tolist() == queued.critical_mesh.tolist()
    assert quick.bubble_fractions == pytest.approx(queued.bubble_fractions)


@pytest.mark.parametrize("sigma", [0.05, 0.5])
def test_one_stage_is_a_sum_of_lognormals(sigma: float) -> None:
    """Mean M(F + B), variance M(F² + B²)(e^(σ²) - 1)."""
    program, costs = pipeline(stages=1, microbatches=10)
    sampled = sample_steps(program, costs, Variability(kernel_jitter=sigma), samples=20_000, seed=1)
    assert abs(sampled.mean_seconds - 30) < 4 * sampled.standard_error_seconds
    assert sampled.std_seconds == pytest.approx(sqrt(10 * (1 + 4) * expm1(sigma**2)), rel=0.05)
    assert sampled.low_seconds < 30 < sampled.high_seconds
    assert sampled.bubble_fraction == pytest.approx((0,))


def test_a_host_jitters_as_one() -> None:
    """One stage on one host: its whole step is one lognormal. Two hosts go at the pace of the slower."""
    program, costs = pipeline(stages=1, microbatches=10, devices=2)
    sigma = 0.2
    one = sample_steps(program, costs, Variability(host_jitter=sigma, hosts=((0, 1),)), samples=20_000)
    assert one.std_seconds == pytest.approx(30 * sqrt(expm1(sigma**2)), rel=0.05)
    assert one.quantile(0.5) == pytest.approx(30 * exp(-(sigma**2) / 2), rel=0.01)
    two = sample_steps(program, costs, Variability(host_jitter=sigma, hosts=((0,), (1,))), samples=20_000)
    # The median of the larger of two is the quantile sqrt(1/2) of one, 0.5449521 standard deviations up.
    assert two.quantile(0.5) == pytest.approx(30 * exp(sigma * 0.5449521 - sigma**2 / 2), rel=0.01)


@pytest.mark.parametrize("slow", [0, 1, 2, 3])
def test_one_slow_stage_sets_the_pace(slow: int) -> None:
    """GPipe: the slow stage works M times in each direction; all others are passed once each way."""
    program, costs = pipeline("gpipe", 4, 8, devices=2)
    sampled = sample_steps(program, costs, Variability(slow_devices={2 * slow + 1: 1.5}), samples=2)
    assert sampled.seconds.tolist() == [8 * 1.5 * 3 + 3 * 3] * 2
    assert sampled.critical_share == tuple(float(mesh == slow) for mesh in range(4))
    assert sampled.bubble_fraction[slow] == pytest.approx(1 - 8 * 1.5 * 3 / (8 * 1.5 * 3 + 9))


def test_one_slow_link_is_paid_once_each_way_with_its_latency() -> None:
    """GPipe with hops of 0.25 s and one link three times as slow: 0.5 s more on the way there, and only there."""
    program, costs = pipeline("gpipe", 3, 4, hop=0.25)
    plain = simulate(program, costs).makespan_seconds
    slow = sample_steps(program, costs, Variability(slow_links={(0, 1): 3}), samples=1)
    assert slow.seconds.tolist() == [plain + 0.5]


def test_a_stage_straggles_if_any_of_its_devices_does() -> None:
    """n devices of probability p: the step is slow in 1 - (1 - p)^n of the samples."""
    program, costs = pipeline(stages=1, microbatches=1, devices=8)
    chances = Variability(straggler_probability=0.05, straggler_factor=2)
    sampled = sample_steps(program, costs, chances, samples=20_000)
    assert set(sampled.seconds.tolist()) == {3, 6}
    expected = 1 - 0.95**8
    assert abs((sampled.seconds == 6).mean() - expected) < 4 * sqrt(expected * (1 - expected) / 20_000)


def test_links_are_slow_as_often_as_asked() -> None:
    program, costs = pipeline("gpipe", 2, 1, wire=1)
    chances = Variability(slow_link_probability=0.3, slow_link_factor=2)
    sampled = sample_steps(program, costs, chances, samples=20_000)
    seconds, counts = np.unique(sampled.seconds, return_counts=True)
    assert seconds.tolist() == [8, 9, 10]  # neither, one or both of the two directions
    assert counts / 20_000 == pytest.approx([0.49, 0.42, 0.09], abs=0.015)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(2, 6), st.integers(1, 10), st.floats(0, 0.5), st.floats(0, 0.5))
def test_more_jitter_never_shortens_the_mean_step(seed: int, stages: int, m: int, one: float, other: float) -> None:
    """A makespan is convex in its seconds and jitter only spreads them, so more of it raises the mean (Jensen)."""
    program, costs = pipeline("1f1b", stages, m)
    less, more = (
        sample_steps(program, costs, Variability(kernel_jitter=sigma), samples=1500, seed=seed).seconds
        for sigma in sorted((one, other))
    )
    difference = more - less  # of the same chances
    assert difference.mean() >= -5 * difference.std() / sqrt(1500)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**64 - 1), st.floats(1, 3), st.floats(1, 3), st.floats(0, 1), st.floats(0, 1))
def test_more_or_slower_stragglers_shorten_no_sample(seed: int, f: float, g: float, p: float, q: float) -> None:
    program, costs = pipeline(devices=2)
    fewer, more = (
        sample_steps(
            program, costs, Variability(straggler_probability=p, straggler_factor=f), samples=50, seed=seed
        ).seconds
        for p, f in zip(sorted((p, q)), sorted((f, g)), strict=True)
    )
    assert (more >= fewer).all()


def test_jitter_makes_idle_time_that_grows_with_it() -> None:
    program, costs = pipeline("1f1b", 4, 16)
    bubbles = [
        np.mean(sample_steps(program, costs, Variability(kernel_jitter=sigma), samples=2000).bubble_fraction)
        for sigma in (0, 0.1, 0.2, 0.4)
    ]
    assert bubbles == sorted(bubbles)
    assert bubbles[0] == pytest.approx(3 / 19)


def test_samples_are_the_same_for_the_same_seed_on_any_number_of_threads() -> None:
    program, costs = pipeline(wire=0.2, hop=0.1, devices=4, update_seconds=1, reduce_seconds=0.5)
    before = numba.get_num_threads()
    answers = []
    try:
        for threads in {1, numba.config.NUMBA_NUM_THREADS}:
            numba.set_num_threads(threads)
            sampled = sample_steps(program, costs, ALL, samples=300, seed=7)
            arrays = (sampled.seconds, sampled.bubble_fractions, sampled.critical_mesh)
            answers.append(b"".join(array.tobytes() for array in arrays))
    finally:
        numba.set_num_threads(before)
    assert len(set(answers)) == 1
    again = sample_steps(program, costs, ALL, samples=30, seed=7).seconds
    assert again.tobytes() == sampled.seconds[:30].tobytes()
    assert len(set(again.tolist())) == 30
    assert sample_steps(program, costs, ALL, samples=300, seed=8).seconds.tobytes() != sampled.seconds.tobytes()


def test_a_program_of_nothing_takes_no_time() -> None:
    costs = PipelineCosts((StageCosts(devices=(0,), forward_seconds=0, backward_seconds=0),), {})
    sampled = sample_steps(parse("0F0 0B0"), costs, ALL, samples=2)
    assert (sampled.seconds.tolist(), sampled.bubble_fraction, sampled.critical_share) == ([0, 0], (0.0,), (0.0,))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"kernel_jitter": -0.1}, r"kernel_jitter is -0\.1"),
        ({"transfer_jitter": float("nan")}, "transfer_jitter is nan"),
        ({"straggler_probability": 1.5}, r"straggler_probability is 1\.5; a number from 0 to 1"),
        ({"straggler_factor": 0.5}, r"straggler_factor is 0\.5; a finite number of at least 1"),
        ({"slow_devices": {3: -1}}, "slowdown of device 3 is -1"),
        ({"slow_links": {(0, 1): float("inf")}}, "link from mesh 0 to mesh 1 is inf"),
        ({"host_jitter": 0.1}, r"host_jitter is 0\.1, but no hosts are given"),
        ({"hosts": ((0, 1), (1, 2))}, "a device stands on two of the hosts"),
    ],
)
def test_impossible_numbers_are_named(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ScheduleError, match=words):
        Variability(**wrong)


def test_what_the_program_does_not_have_is_refused() -> None:
    program, costs = pipeline(stages=12)
    with pytest.raises(ScheduleError, match=r"device 12 is to be slow, but .* 0, 1, 2, .* \(12 in all\)"):
        sample_steps(program, costs, Variability(slow_devices={12: 2}))
    with pytest.raises(ScheduleError, match=r"mesh 0 to mesh 2 is to be slow, but nothing crosses it.*\(0, 1\)"):
        sample_steps(program, costs, Variability(slow_links={(0, 2): 2}))
    with pytest.raises(ScheduleError, match="devices 8, 9, 10, 11 have none"):
        sample_steps(program, costs, Variability(host_jitter=0.1, hosts=(range(8),)))
    with pytest.raises(ScheduleError, match=r"the most is 1e\+10, so ask for at most"):
        sample_steps(*pipeline(microbatches=100), Variability(), samples=10**7)


def test_the_documentation_prints_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "variability.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```\n(?:\n```\n(.*?)^```)?", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    for code, shown in blocks:
        exec(code, names)
        assert capsys.readouterr().out == shown
    assert (tmp_path / "variability.png").stat().st_size > 0
