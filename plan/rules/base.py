"""How a rule is written: dims are tied to factors by a small builder."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from meshwright.plan.graph import UNSPLIT, Rule, Tensor

RuleMaker = Callable[[Mapping[str, Any], Sequence[Tensor], Sequence[Tensor]], Rule]


class Factors:
    """Collects which dims of which arrays carry which factor, then gives the ``Rule``."""

    def __init__(self, operands: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        self._shapes = {
            **{("in", i): t.shape for i, t in enumerate(operands)},
            **{("out", i): t.shape for i, t in enumerate(results)},
        }
        self._dims = {key: [UNSPLIT] * len(shape) for key, shape in self._shapes.items()}
        self._sizes: list[int] = []
        self._contracted: set[int] = set()

    def tie(self, *places: tuple[str, int, int], size: int | None = None, contracted: bool = False) -> None:
        """Give one new factor to dims ``(side, array, dim)``, side being "in" or "out".

        Dims of size one are left unsplit. ``size`` is given where the dims are longer than what may be split (a dim
        that merges several: only its major part can be).
        """
        real = [(side, array, dim) for side, array, dim in places if self._shapes[side, array][dim] != 1]
        if not real:
            return
        self._sizes.append(self._shapes[real[0][0], real[0][1]][real[0][2]] if size is None else size)
        factor = len(self._sizes) - 1
        for side, array, dim in real:
            self._dims[side, array][dim] = factor
        if contracted:
            self._contracted.add(factor)

    def rule(self, linear: bool = True) -> Rule:
        operands = tuple(tuple(d) for (side, _), d in self._dims.items() if side == "in")
        results = tuple(tuple(d) for (side, _), d in self._dims.items() if side == "out")
        return Rule(operands, results, tuple(self._sizes), frozenset(self._contracted), linear)


def replicated(operands: Sequence[Tensor], results: Sequence[Tensor], known: bool = True) -> Rule:
    """Nothing may be split."""
    rows = [tuple(UNSPLIT for _ in t.shape) for t in (*operands, *results)]
    return Rule(tuple(rows[: len(operands)]), tuple(rows[len(operands) :]), (), frozenset(), known=known)
