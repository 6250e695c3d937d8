"""Bare schedules and hand-written programs: closed forms, refusals, and random programs that never hang."""

import doctest
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import ScheduleError
from meshwright.simulate import bare
from meshwright.simulate.bare import StageTimes, play, play_program
from meshwright.simulate.build import build_program
from meshwright.simulate.program import Program, compute_only, parse, show
from meshwright.simulate.schedules.base import Options


def test_the_example_of_the_module_holds() -> None:
    result = doctest.testmod(bare)
    assert result.attempted == 2
    assert result.failed == 0


@given(st.integers(1, 6), st.integers(1, 10), st.integers(0, 8), st.integers(0, 8), st.integers(0, 8))
@settings(max_examples=40, deadline=None)
def test_gpipe_takes_its_closed_form(stages: int, microbatches: int, f: int, i: int, hop: int) -> None:
    """(M + S - 1)(F + I + W) + 2(S - 1)c, in quarters of a second, so that nothing is rounded."""
    timeline = play("gpipe", stages, microbatches, StageTimes(f / 4, i / 4, 0.5), hop / 4)
    expected = (microbatches + stages - 1) * (f / 4 + i / 4 + 0.5) + 2 * (stages - 1) * hop / 4
    assert timeline.makespan_seconds == expected


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_the_rows_alone_are_enough(schedule: str) -> None:
    """What ``--show`` prints, without transfers, plays as the schedule itself does."""
    rows = compute_only(build_program(schedule, 3, 5))
    alone, whole = play_program(parse(show(rows)), hop_seconds=0.25), play(schedule, 3, 5, hop_seconds=0.25)
    assert alone.makespan_seconds == whole.makespan_seconds
    assert alone.peak_bytes == whole.peak_bytes


def test_a_split_backward_frees_its_activations_with_the_weight_gradient() -> None:
    """F F I I W W holds two micro-batches until the first W ends."""
    timeline = play_program(parse("0F0 0F1 0I0 0I1 0W0 0W1"), StageTimes(1, 2, 4))
    assert timeline.makespan_seconds == 14
    assert timeline.live_bytes[0][-3:] == ((10.0, 1.0), (10.0, 1.0), (14.0, 0.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0", "0B0 is missing"),
        ("0F0 0I0", "0W0 is missing"),
        ("0F0 0W0 0I0", "0W0 stands before 0I0"),
        ("0F0 0B0 0I0 0W0", "0B0 stands beside its half 0I0"),
        ("0F0 0B0\n2F0 2B0", "stage 1 is on no mesh"),
        ("0F0 0>1a0 0<1c0 0B0\n1F0 1B0", "0>1a0 has no partner 1<0a0"),
        ("0F0 0B0 0F1 0B1\n1F1 1B1 1F0 1B0", "deadlocks: mesh 0 waits at 0<1c0, mesh 1 waits at 1<0a1"),
        ("0F0 0X0", "'0X0' is not an instruction"),
        ("0F0 0B0\n0F1 0B1", "stage 0 is on mesh 0 and on mesh 1"),
        ("0F0 1F0 0B0 1B0", "0B0 stands before 1B0, whose result it needs"),
        ("1F0 0F0 1B0 0B0", "1F0 stands before 0F0, whose result it needs"),
        ("0F0 0>1a0 0B0\n1<0a0 1F0 1B0", "0>1a0 has no answer: 1>0c0 is missing"),
        ("0F0 0B0 0U 0R", "0U must follow 0R"),
        ("0F0 0B0 0G", "0G must follow 0U"),
        ("0F999999999 0B999999999", "2 instructions are too few"),
        ("0F99999999999999999999 0B0", "too large a number"),
        ("mesh 1: 0F0 0B0", "line 1 begins with 'mesh 1': it is mesh 0"),
    ],
)
def test_a_wrong_program_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message) as refused:
        play_program(parse(text))
    assert "\n" not in str(refused.value)


numbers = st.integers(0, 2) | st.integers(0, 10**20)
words = st.one_of(
    st.builds(lambda s, k, m: f"{s}{k}{m}", numbers, st.sampled_from("FBIW"), numbers),
    st.builds(
        lambda s, way, t, w, m: f"{s}{way}{t}{w}{m}",
        *(numbers, st.sampled_from("<>"), numbers, st.sampled_from("acgp"), numbers),
    ),
    st.builds(lambda s, k: f"{s}{k}", numbers, st.sampled_from("RUG")),
)


@given(st.lists(st.lists(words, max_size=8), max_size=4))
@settings(max_examples=300, deadline=None)
def test_random_programs_are_played_or_refused_but_never_hang(rows: list[list[str]]) -> None:
    refusal = ""
    try:
        program = parse("\n".join(" ".join(row) for row in rows))
        assert play_program(program).makespan_seconds >= 0
    except ScheduleError as error:
        refusal = str(error)
    assert "\n" not in refusal


@given(st.data(), st.integers(1, 4), st.integers(1, 5), st.sampled_from(["gpipe", "1f1b"]))
@settings(max_examples=100, deadline=None)
def test_a_right_program_with_two_words_exchanged_is_played_or_refused(
    data: st.DataObject, stages: int, microbatches: int, schedule: str
) -> None:
    """What is played kept every row in order and no device did two things at once."""
    rows = [list(row) for row in build_program(schedule, stages, microbatches)]
    row = rows[data.draw(st.integers(0, stages - 1))]
    i, j = (data.draw(st.integers(0, len(row) - 1)) for _ in range(2))
    row[i], row[j] = row[j], row[i]
    program: Program = tuple(map(tuple, rows))
    try:
        timeline = play_program(program, StageTimes(1, 1, 1), 0.5)
    except ScheduleError:
        return
    assert timeline.makespan_seconds >= microbatches * 3
    for mesh in range(stages):
        done = [
            event
            for event in timeline.events
            if event.mesh == mesh and event.instruction in compute_only(program)[mesh]
        ]
        assert all(a.end_seconds <= b.start_seconds for a, b in pairwise(done))


@pytest.mark.parametrize(("stages", "microbatches"), [(0, 1), (1, 0), (-3, 2)])
def test_sizes_below_one_are_refused(stages: int, microbatches: int) -> None:
    with pytest.raises(ScheduleError, match="at least 1 is needed"):
        play("1f1b", stages, microbatches)


def test_an_option_that_means_nothing_is_refused() -> None:
    with pytest.raises(ScheduleError, match="schedule 1f1b takes no chunks; leave it out"):
        play("1f1b", 2, 2, options=Options(chunks=2))
