"""Who wins among judged plans, and what is said of those that lose."""

import re
from dataclasses import replace

import msgspec
import pytest

from meshwright.plan.candidates import Priced, stage_plans
from meshwright.plan.judge import (
    MOST_FOR_SIMPLICITY,
    Candidate,
    Judged,
    difference_error,
    judge_candidate,
    why_not,
    winner_of,
    within,
)
from meshwright.plan.planfile import Predicted
from meshwright.plan.request import Fix, Request
from meshwright.plan.schedule_rules import find_rule
from tests.plan.planned import BATCH, cpus, graph_of


def judged(stages: int, schedule: str = "1f1b") -> Judged:
    """The tiny GPT on four ranks, in equal stages."""
    request = Request(cpus(), BATCH, Fix(pipeline=stages))
    pricer, table = Priced(graph_of(4), 4, request).at(("none", 0.0))
    rule = find_rule(schedule)
    return judge_candidate(Candidate(rule, pricer, stage_plans(pricer, table, request, 4, rule, 1)[0]), request)


def with_numbers(one: Judged, **numbers: float) -> Judged:
    """The same plan with another verdict."""
    predicted: Predicted = msgspec.structs.replace(one.predicted, **numbers)
    return replace(one, predicted=predicted)


REQUEST = Request(cpus(), BATCH)


@pytest.fixture(scope="module")
def two() -> Judged:
    return judged(2)


@pytest.fixture(scope="module")
def four() -> Judged:
    return judged(4)


def test_the_parts_of_a_step_are_the_step(two: Judged, four: Judged) -> None:
    for one in (two, four):
        assert sum(one.parts.values()) == pytest.approx(one.seconds)
        assert min(one.parts.values()) >= 0


def test_the_fastest_wins_if_the_model_can_tell(two: Judged, four: Judged) -> None:
    slow = with_numbers(two, iteration_seconds=1.006 * four.seconds)
    assert winner_of([slow, four], REQUEST) is four


def test_the_simpler_wins_within_the_error_of_the_difference(two: Judged, four: Judged) -> None:
    """Two plans that spend their time unlike each other by much are not told apart to half a percent."""
    near = with_numbers(two, iteration_seconds=1.004 * four.seconds, bubble_fraction=0.0)
    waiting = with_numbers(four, bubble_fraction=0.3)
    assert near.simplicity < waiting.simplicity
    assert difference_error(waiting, near, REQUEST) > MOST_FOR_SIMPLICITY
    assert winner_of([waiting, near], REQUEST) is near


def test_plans_that_spend_their_time_alike_are_told_apart_however_close(two: Judged) -> None:
    """The interval of the calibration is common to both, so it cancels."""
    slower = with_numbers(two, iteration_seconds=1.001 * two.seconds)
    assert difference_error(two, slower, REQUEST) < 1e-3
    assert winner_of([slower, two], REQUEST) is two


def test_the_order_in_which_plans_were_found_is_no_matter(two: Judged, four: Judged) -> None:
    eager = judged(2, "eager-1f1b")
    equal = [with_numbers(x, iteration_seconds=1.0, bubble_fraction=0.1) for x in (two, four, eager)]
    assert winner_of(equal, REQUEST) is winner_of(equal[::-1], REQUEST) is equal[0]


def test_plans_that_fill_more_than_the_limit_are_left_out(two: Judged, four: Judged) -> None:
    full = with_numbers(two, peak_memory_bytes=1e9)
    lean = with_numbers(four, peak_memory_bytes=1e8)
    assert within([full, lean], 5e8) == [lean]


@pytest.mark.parametrize(
    ("numbers", "why"),
    [
        ({"iteration_seconds": 2.0, "bubble_fraction": 0.9}, r"100.0% slower: waits 1.8 s of the step, not 0 s"),
        ({"iteration_seconds": 1.5, "bubble_fraction": 0.0}, r"50.0% slower: computes .* s of the step, not .* s"),
        ({"iteration_seconds": 1.0, "bubble_fraction": 0.0}, "as fast, and no simpler"),
        ({"iteration_seconds": 0.999, "bubble_fraction": 0.0}, "faster by less than the model can tell"),
        ({"peak_memory_bytes": 1e15}, r"needs .* on a device of .*"),
    ],
)
def test_a_loser_is_told_why(numbers: dict[str, float], why: str, two: Judged) -> None:
    winner = with_numbers(two, iteration_seconds=1.0, bubble_fraction=0.0)
    assert re.match(why, why_not(with_numbers(two, **numbers), winner, REQUEST))


def test_the_margin_is_named_where_it_alone_is_in_the_way(two: Judged) -> None:
    peak = 0.97 * REQUEST.device_bytes
    line = why_not(with_numbers(two, peak_memory_bytes=peak), two, REQUEST)
    assert line.endswith("a device, more than the memory margin of 5% leaves")


def test_a_split_backward_is_simulated_with_its_halves() -> None:
    split, whole = judged(4, "zb-h1"), judged(4)
    assert all(stage.weight_gradient_seconds for stage in split.assembly.stages)
    assert all(stage.weight_gradient_seconds is None for stage in whole.assembly.stages)
    assert split.name == "zb-h1, 4 micro-batches, remat none, meshes 1|1|1|1"
