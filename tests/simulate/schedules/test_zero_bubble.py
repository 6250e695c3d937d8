"""Searched zero-bubble schedules, and the 72 bubble rates of the paper that brought them."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import ScheduleError
from meshwright.simulate.schedules.base import FORWARD, INPUT, KEPT_SHARE, WEIGHT, Options, Order, Times
from meshwright.simulate.schedules.table import SCHEDULES
from meshwright.simulate.schedules.zero_bubble import zero_bubble
from tests.simulate.schedules.replay import chunk_times, replay


class Setting(NamedTuple):
    """Qi et al., ICLR 2024 (arXiv:2401.10241), tables 4 to 6: a model, profiled milliseconds, and bubble rates."""

    meshes: int
    microbatches: int
    layers: int
    hidden: int
    heads: int
    times: tuple[float, float, float, float]  # milliseconds: F, I, W, hop
    rates: tuple[float, float, float, float, float, float]  # 1F1B, 1F1B-I, ZB-H1, ZB-H2, ZB-1p, ZB-2p

    @property
    def kept_share(self) -> float:
        """What of a micro-batch's activations waits for its W, by the paper's table 1, with sequences of 1024."""
        return 32 * self.hidden / (34 * self.hidden + 5 * self.heads * 1024)

    def rate(self, order: Order) -> float:
        """The paper's cost is the longest span of a stage; what of it no work fills is the bubble."""
        *parts, hop = self.times
        work = self.microbatches * sum(parts)
        return 1 - work / replay(order, chunk_times(*parts), hop).span


SETTINGS = [
    Setting(8, 24, 24, 2304, 24, (18.522, 18.086, 9.337, 0.601), (0.2431, 0.1055, 0.1585, 0.1083, 0.1585, 0.0433)),
    Setting(8, 32, 24, 2304, 24, (18.513, 18.086, 9.331, 0.626), (0.1985, 0.0818, 0.1242, 0.0837, 0.1242, 0.0039)),
    Setting(8, 64, 24, 2304, 24, (18.546, 18.097, 9.321, 0.762), (0.124, 0.0443, 0.0674, 0.0444, 0.0674, 0.0026)),
    Setting(8, 24, 32, 4096, 32, (29.718, 29.444, 19.927, 0.527), (0.2347, 0.0808, 0.1323, 0.0698, 0.1323, 0.0029)),
    Setting(8, 32, 32, 4096, 32, (29.802, 29.428, 19.53, 0.577), (0.1898, 0.0628, 0.1045, 0.0559, 0.1045, 0.0022)),
    Setting(8, 64, 32, 4096, 32, (29.935, 29.621, 19.388, 0.535), (0.1091, 0.032, 0.0554, 0.0294, 0.0554, 0.001)),
    Setting(16, 48, 48, 5120, 40, (11.347, 11.248, 8.132, 0.377), (0.2552, 0.1104, 0.1397, 0.0672, 0.1397, 0.0066)),
    Setting(16, 64, 48, 5120, 40, (11.307, 11.254, 8.101, 0.379), (0.2082, 0.0852, 0.1088, 0.0516, 0.1088, 0.0054)),
    Setting(16, 128, 48, 5120, 40, (11.325, 11.308, 8.109, 0.378), (0.1251, 0.0445, 0.0576, 0.0266, 0.0576, 0.0028)),
    Setting(32, 96, 64, 6144, 48, (10.419, 10.207, 7.715, 0.408), (0.2646, 0.1493, 0.1421, 0.0641, 0.1421, 0.0038)),
    Setting(32, 128, 64, 6144, 48, (10.408, 10.204, 7.703, 0.408), (0.2168, 0.1164, 0.1106, 0.049, 0.1106, 0.0029)),
    Setting(32, 256, 64, 6144, 48, (10.402, 10.248, 7.698, 0.46), (0.1352, 0.0624, 0.0594, 0.0257, 0.0594, 0.0018)),
]
settings_of_the_paper = pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: f"{s.meshes}x{s.microbatches}")
ROUNDING = 0.0001  # the table has four digits, and so have its times


@settings_of_the_paper
@pytest.mark.parametrize(("name", "column"), [("1f1b", 0), ("zb-h1", 2), ("zb-h2", 3)])
def test_rates_of_fixed_schedules_are_the_table(name: str, column: int, setting: Setting) -> None:
    order = SCHEDULES[name].make(setting.meshes, setting.microbatches)
    assert setting.rate(order) == pytest.approx(setting.rates[column], abs=ROUNDING)


@settings_of_the_paper
def test_interleaved_of_one_layer_a_chunk_is_the_table_with_its_wait_at_the_turn(setting: Setting) -> None:
    """The table's last mesh hands on to the first, whose wait is charged for the first of every P micro-batches only.

    So its step is (M + (P - 1)/v)(F + I + W) + ((2v - 1)P - 2)c. All waits cost P more hops: 2(vP - 1)c.
    """
    p, m, (f, i, w, hop) = setting.meshes, setting.microbatches, setting.times
    v = setting.layers // p
    order = SCHEDULES["interleaved"].make(p, m, Options(chunks=v))
    seconds = chunk_times(f, i, w, chunks=v)

    def charged(source: int, target: int, microbatch: int) -> float:
        return hop if source // p == target // p or microbatch % p == 0 else -np.inf

    published = replay(order, seconds, charged).span
    assert 1 - m * (f + i + w) / published == pytest.approx(setting.rates[1], abs=ROUNDING)
    assert published == pytest.approx((m + (p - 1) / v) * (f + i + w) + ((2 * v - 1) * p - 2) * hop)
    assert replay(order, seconds, hop).span == pytest.approx(published + p * hop)


@settings_of_the_paper
@pytest.mark.parametrize(("per_mesh", "column"), [(1, 4), (2, 5)])
def test_searched_schedules_are_as_good_as_the_table_in_its_memory(
    per_mesh: int, column: int, setting: Setting
) -> None:
    times = Times.equal(setting.meshes, *setting.times, kept_share=setting.kept_share)
    limit = per_mesh * setting.meshes
    order = zero_bubble(times, setting.microbatches, [limit] * setting.meshes)
    assert setting.rate(order) <= setting.rates[column] + 2 * ROUNDING  # one of 24 is 0.00013 above
    assert most_held(order, setting.kept_share) <= limit + 1e-6


@settings_of_the_paper
@pytest.mark.parametrize(("name", "column"), [("zb-1p", 4), ("zb-2p", 5)])
def test_so_are_they_without_knowing_the_model(name: str, column: int, setting: Setting) -> None:
    times = Times.equal(setting.meshes, *setting.times)
    order = SCHEDULES[name].make(setting.meshes, setting.microbatches, Options(times=times))
    assert setting.rate(order) <= setting.rates[column] + 0.001
    assert most_held(order, KEPT_SHARE) <= int(name[3]) * setting.meshes + 1e-6


def test_the_table_cannot_be_reached_if_activations_are_kept_whole() -> None:
    """Then the last stage has 2P weight halves for the time in which its last cotangent travels to the first: too few.

    Both ends together: span ≥ M(F + I + W) + (P - 1)(F + I + 2c) + W - 2P·W.
    """
    setting = SETTINGS[1]
    p, m, (f, i, w, hop) = setting.meshes, setting.microbatches, setting.times
    order = zero_bubble(Times.equal(p, f, i, w, hop, kept_share=1.0), m, [2 * p] * p)
    bound = m * (f + i + w) + (p - 1) * (f + i + 2 * hop) + w - 2 * p * w
    assert setting.rates[5] < 1 - m * (f + i + w) / bound <= setting.rate(order) + 1e-12
    assert most_held(order, 1.0) <= 2 * p


seconds = st.integers(1, 8).map(lambda n: n / 4)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_stages_and_limits_give_a_whole_order_within_them(data: st.DataObject) -> None:
    stages, m = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    of_stages = [tuple(data.draw(st.lists(seconds, min_size=stages, max_size=stages))) for _ in "FIW"]
    hop, kept = data.draw(st.sampled_from([0.0, 0.5, 3.0])), data.draw(st.sampled_from([0.0, 0.25, 1.0]))
    times = Times(of_stages[0], of_stages[1], of_stages[2], hop, kept)
    limits = data.draw(st.lists(st.integers(1, 2 * stages).map(float), min_size=stages, max_size=stages))
    order = zero_bubble(times, m, limits)
    result = replay(order, lambda kind, stage: of_stages["FIW".index(kind)][stage], times.hop_seconds)
    work = max(m * sum(parts) for parts in zip(*of_stages, strict=True))
    assert result.span >= work - 1e-9
    for stage, (row, limit) in enumerate(zip(order.rows, limits, strict=True)):
        assert np.array_equal(np.bincount(row.kind, minlength=4), [m, 0, m, m])
        assert held(order, stage, kept).max() <= limit + 1e-6


def test_the_same_times_give_the_same_order() -> None:
    times = Times.equal(6, 3.0, 2.0, 1.0, 0.25)
    first, second = (zero_bubble(times, 20, [9.0] * 6) for _ in range(2))
    for one, other in zip(first.rows, second.rows, strict=True):
        assert np.array_equal(one.kind, other.kind)


def test_what_cannot_be_searched_is_refused() -> None:
    with pytest.raises(ScheduleError, match="given for 3 stages; one of at least 1"):
        zero_bubble(Times.equal(3), 4, [1, 1])
    with pytest.raises(ScheduleError, match=r"limits of 0\.5, 1 live micro-batches"):
        zero_bubble(Times.equal(2), 4, [0.5, 1])
    with pytest.raises(ScheduleError, match="times of 3 stages are given for 2 meshes"):
        SCHEDULES["zb-1p"].make(2, 4, Options(times=Times.equal(3)))
    with pytest.raises(ScheduleError, match="times of 2, 1, 2 stages"):
        Times((1.0, 1.0), (1.0,), (1.0, 1.0))
    with pytest.raises(ScheduleError, match="a time of -1 seconds"):
        Times.equal(2, weight_seconds=-1)
    with pytest.raises(ScheduleError, match=r"kept_share of 1\.5"):
        Times.equal(2, kept_share=1.5)


def held(order: Order, mesh: int, kept_share: float) -> np.ndarray:
    """Activations held on a mesh after each computation starts or ends, in micro-batches."""
    change = np.zeros(4)
    change[FORWARD], change[INPUT], change[WEIGHT] = 1, kept_share - 1, -kept_share
    return np.cumsum(change[order.rows[mesh].kind])


def most_held(order: Order, kept_share: float) -> float:
    """The most on any mesh."""
    return max(float(held(order, mesh, kept_share).max()) for mesh in range(len(order.rows)))


def test_a_search_that_would_take_minutes_is_refused_at_once() -> None:
    with pytest.raises(ScheduleError, match="512 stages and 2048 micro-batches takes minutes; use zb-h1"):
        zero_bubble(Times.equal(512), 2048, [512.0] * 512)
