"""What is timed next is affordable, new, and where a line through its family is worst."""

import msgspec
import pytest

from meshwright.calibrate.benchmarks import Case, amount, input_bytes, program_of
from meshwright.calibrate.candidates import NEEDED, NEEDED_SIZES, candidates, coarse, families, next_case
from meshwright.calibrate.timing import ATTENTION, CONVOLUTION, COPY, MATMUL, MEMORY, Timing, timing


def taken(case: Case, seconds: float) -> Timing:
    return msgspec.structs.replace(timing(case.family, amount(case), [seconds] * 5), shape=case.shape)


@pytest.mark.parametrize("accelerator", [False, True])
def test_there_are_hundreds_of_candidates_of_every_family(accelerator: bool) -> None:
    pool = candidates(accelerator)
    assert len(set(pool)) == len(pool) > 300
    assert {case.family for case in pool} == set(families(accelerator))
    first = coarse(accelerator)
    assert {case.family for case in first} == set(families(accelerator))
    for family in NEEDED:
        sizes = {amount(case) for case in first[: NEEDED_SIZES * len(NEEDED)] if case.family == family}
        assert len(sizes) == NEEDED_SIZES
    assert len(set(first)) == len(first)


def test_the_family_that_its_line_meets_worst_comes_first() -> None:
    sizes = (1 << 18, 1 << 20, 1 << 22, 1 << 24)
    add, total = f"{MEMORY}add", f"{MEMORY}sum"
    known = {Case(add, (size,)): taken(Case(add, (size,)), size / 1e9) for size in sizes}
    bent = (1.0, 3.0, 0.4, 1.0)
    known |= {
        Case(total, (size,)): taken(Case(total, (size,)), size / 1e9 * factor)
        for size, factor in zip(sizes, bent, strict=True)
    }
    pool = [Case(family, (1 << power,)) for family in (add, total) for power in range(17, 31)]
    found = next_case(pool, known, 1.0, 1e12)
    assert found is not None
    assert found.family == total
    assert found not in known
    assert next_case(pool, known, 1e-9, 1e12) is None
    small = next_case(pool, known, 1.0, input_bytes(Case(add, (1 << 19,))))
    assert small is not None
    assert small.shape[0] <= 1 << 19


def test_a_family_of_one_size_says_nothing_of_others() -> None:
    case = Case(f"{MEMORY}add", (1 << 20,))
    assert next_case([Case(case.family, (1 << 22,))], {case: taken(case, 1e-3)}, 1.0, 1e12) is None


@pytest.mark.parametrize(
    "case",
    [
        Case(f"{MATMUL}bf16", (2, 16, 8, 4)),
        Case(f"{ATTENTION}xla f32", (1, 2, 16, 8)),
        Case(f"{ATTENTION}xla backward f32", (1, 2, 16, 8)),
        Case(f"{CONVOLUTION}f32", (1, 6, 4, 8, 3)),
        Case(f"{CONVOLUTION}backward f32", (1, 6, 4, 8, 3)),
        *(Case(f"{MEMORY}{kind}", (1 << 14,)) for kind in ("add", "sum", "chain", "gather", "scatter", "adam")),
        *(Case(f"{COPY}{way}", (1 << 14,)) for way in ("to_device", "from_device")),
    ],
    ids=str,
)
def test_every_family_runs(case: Case) -> None:
    program = program_of(case)
    assert program.start() is not None
    assert program.copies >= 1


def test_amounts_are_flops_of_products_and_bytes_of_the_rest() -> None:
    assert amount(Case(f"{MATMUL}f32", (2, 3, 5, 7))) == 2 * 2 * 3 * 5 * 7
    assert amount(Case(f"{CONVOLUTION}backward f32", (1, 4, 2, 3, 3))) == 3 * 2 * 16 * 2 * 3 * 9
    forward = amount(Case(f"{ATTENTION}xla f32", (1, 2, 16, 8)))
    assert forward == 4 * 2 * 16 * 16 * 8 / 2
    assert amount(Case(f"{ATTENTION}xla backward f32", (1, 2, 16, 8))) == pytest.approx(3.5 * forward)
    assert amount(Case(f"{MEMORY}adam", (4096,))) == 4096
