"""What a stage's compiled programs communicate, held against what its plan was priced for."""

from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.execute.hlo import compiled_collectives
from meshwright.execute.programs import StagePrograms
from meshwright.plan.priced import Priced, When


@dataclass(frozen=True, slots=True)
class Comparison:
    """One kind of collective in one phase: elements of its results on one device, summed over the stage."""

    phase: When
    kind: str
    priced_elements: float
    compiled_elements: float

    @property
    def equal(self) -> bool:
        return round(self.priced_elements) == round(self.compiled_elements)


def compare(priced: Sequence[Priced], programs: StagePrograms) -> tuple[Comparison, ...]:
    """Priced against compiled, by phase and kind; what is on neither side has no row.

    Elements, not bytes: on CPU a bfloat16 all-reduce compiles to float32. A reduce-scatter counts as the all-reduce of
    its operand: the GPU backend writes it where the CPU backend writes an all-reduce and a slice.
    """
    rows = []
    texts: dict[When, str] = {
        "forward": programs.forward.as_text(),
        "backward": programs.backward.as_text(),
        "once": programs.reduce.as_text(),
    }
    for phase, text in texts.items():
        expected: dict[str, float] = {}
        found: dict[str, float] = {}
        for p in priced:
            if p.phase == phase:
                expected[p.kind] = expected.get(p.kind, 0.0) + p.elements
        for c in compiled_collectives(text):
            kind, elements = (c.kind, c.elements)
            if kind == "reduce_scatter":
                kind, elements = "all_reduce", elements * c.ranks
            found[kind] = found.get(kind, 0.0) + elements
        rows += [Comparison(phase, k, expected.get(k, 0.0), found.get(k, 0.0)) for k in sorted({*expected, *found})]
    return tuple(rows)


def deviation(rows: Sequence[Comparison]) -> float:
    """Elements that are on one side only, over all that are priced: 0 is exact. Infinite if nothing was priced."""
    apart = sum(abs(row.compiled_elements - row.priced_elements) for row in rows)
    total = sum(row.priced_elements for row in rows)
    return 0.0 if apart == 0 else apart / total if total else float("inf")
