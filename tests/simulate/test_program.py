"""The text form of a program reads back to the same program."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import ScheduleError
from meshwright.simulate.build import build_program
from meshwright.simulate.program import (
    Backward,
    Forward,
    Instruction,
    Receive,
    Reduce,
    Send,
    Update,
    compute_only,
    parse,
    parse_word,
    show,
    word,
)

WORDS: list[tuple[Instruction, str]] = [
    (Forward(0, 12), "0F12"),
    (Backward(3, 0), "3B0"),
    (Send(0, 1, "activation", 2), "0>1a2"),
    (Receive(1, 0, "activation", 2), "1<0a2"),
    (Send(1, 0, "cotangent", 2), "1>0c2"),
    (Send(3, 0, "gradient", -1), "3>0g"),
    (Receive(3, 0, "parameter", -1), "3<0p"),
    (Reduce(4), "4R"),
    (Update(4), "4U"),
]


@pytest.mark.parametrize(("instruction", "text"), WORDS)
def test_each_instruction_is_one_word(instruction: Instruction, text: str) -> None:
    assert word(instruction) == text
    assert parse_word(text) == instruction


@pytest.mark.parametrize("text", ["", "F0", "0F", "0X1", "0>1z2", "0F0 0F1", "R0", "0R1", "-1F0"])
def test_anything_else_is_no_word(text: str) -> None:
    with pytest.raises(ScheduleError, match="is not an instruction"):
        parse_word(text)


@given(
    st.sampled_from(["gpipe", "gpipe-lifo", "1f1b"]),
    st.integers(1, 5),
    st.integers(1, 6),
    st.sampled_from([(), ((0, 0),)]),
)
def test_a_program_reads_back(schedule: str, stages: int, microbatches: int, tied: tuple[tuple[int, int], ...]) -> None:
    tied = tuple((owner, stages - 1) for owner, _ in tied) if stages > 1 else ()
    program = build_program(schedule, stages, microbatches, tied=tied)
    assert parse(show(program)) == program


def test_two_stages_and_two_microbatches_look_like_this() -> None:
    assert show(build_program("1f1b", 2, 2, tied=[(0, 1)])).splitlines() == [
        "mesh 0: 0F0 0>1a0 0F1 0>1a1 0<1c0 0B0 0<1c1 0B1 0R 0<1g 0U 0>1p",
        "mesh 1: 1<0a0 1F0 1B0 1>0c0 1<0a1 1F1 1B1 1>0c1 1R 1>0g 1U 1<0p",
    ]


def test_the_schedule_alone_has_no_transfers() -> None:
    assert show(compute_only(build_program("gpipe", 2, 2))) == "mesh 0: 0F0 0F1 0B0 0B1\nmesh 1: 1F0 1F1 1B0 1B1"
