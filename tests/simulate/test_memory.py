"""Memory of model states and overheads: the published tables, and what does not fit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import ScheduleError
from meshwright.simulate.bare import play
from meshwright.simulate.memory import (
    RECIPES,
    Overheads,
    model_state_bytes,
    need_fit,
    static_parts,
    total,
)

GB = 1e9


@pytest.mark.parametrize(("zero", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_the_example_of_the_zero_paper(zero: int, gigabytes: float) -> None:
    """7.5 billion parameters over 64 devices with mixed-precision Adam: Rajbhandari et al., SC 2020, figure 1."""
    states = model_state_bytes(7.5e9, RECIPES["mixed-adam"], zero=zero, ranks=64)
    assert total(states) / GB == pytest.approx(gigabytes, abs=0.05)  # as printed there


@given(st.integers(1, 1024), st.floats(1, 1e12), st.sampled_from(sorted(RECIPES)))
def test_each_level_holds_no_more_than_the_one_before_and_one_rank_holds_all(
    ranks: int, parameters: float, recipe: str
) -> None:
    held = [total(model_state_bytes(parameters, RECIPES[recipe], zero=z, ranks=ranks)) for z in range(4)]
    assert held == sorted(held, reverse=True)
    assert held[3] == pytest.approx(parameters * RECIPES[recipe].bytes_per_parameter / ranks)


def test_the_allocator_loses_its_share_of_all_but_the_context() -> None:
    states = model_state_bytes(1e9, RECIPES["f32-adam"])
    overheads = Overheads(workspace_bytes=1 * GB, context_bytes=0.5 * GB, fragmentation=0.1)
    parts = dict(static_parts(states, overheads, live_bytes=3 * GB))
    assert parts["fragmentation"] == pytest.approx(0.1 * (16 + 1 + 3) * GB)
    assert total(tuple(parts.items())) == pytest.approx((16 + 1 + 0.5 + 2) * GB)


def test_what_does_not_fit_says_by_how_much_and_what_is_largest() -> None:
    """1F1B of 4 stages holds 4, 3, 2 and 1 activations of a byte."""
    timeline = play("1f1b", 4, 8)
    need_fit(timeline, [4.0] * 4)
    with pytest.raises(ScheduleError, match=r"mesh 0 needs .* most of it are activations"):
        need_fit(timeline, [3.0] * 4)
    with pytest.raises(ScheduleError, match="10% stay free"):
        need_fit(timeline, [4.0] * 4, margin=0.1)


@pytest.mark.parametrize(
    ("zero", "ranks", "parameters", "message"),
    [
        (4, 1, 1.0, "level 4"),
        (0, 0, 1.0, "0 data-parallel"),
        (0, 1, -1.0, "-1.0 parameters"),
        (0, 1, float("nan"), "nan"),
    ],
)
def test_impossible_numbers_are_refused(zero: int, ranks: int, parameters: float, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        model_state_bytes(parameters, RECIPES["f32-adam"], zero=zero, ranks=ranks)
