"""Loops, branches and wrapped functions: their rule and their cost come from the programs that they hold.

A dim may be split if, in every equation of the body, its factor is free: such a loop runs on each part by itself.
Jaxprs are read by their attributes alone, so nothing here imports JAX.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import gcd
from typing import Any

from meshwright.plan.graph import UNSPLIT, Rule, Tensor

RuleOf = Callable[[str, Mapping[str, Any], Sequence[Tensor], Sequence[Tensor]], Rule]
Node = tuple[Any, int]  # (an array: a variable, or a side and its number; a dim)

# Wrappers that run their one body once, and the parameter that holds it.
WRAPPERS: Mapping[str, str] = {
    "jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr", "call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", "remat2": "jaxpr", "remat": "jaxpr",
    "checkpoint": "jaxpr",
}  # fmt: skip
BODIES: frozenset[str] = frozenset({*WRAPPERS, "scan", "while", "cond"})


def bodies(name: str, params: Mapping[str, Any]) -> list[tuple[Any, int]]:
    """(jaxpr, how often it runs) for each program that an equation holds and whose cost counts.

    A ``while`` counts as one trip, for nobody knows how many it makes; a ``cond`` counts as all of its branches (the
    caller takes the dearest).
    """
    if name == "scan":
        return [(_open(params["jaxpr"]), int(params["length"]))]
    if name == "while":
        return [(_open(params["body_jaxpr"]), 1), (_open(params["cond_jaxpr"]), 1)]
    if name == "cond":
        return [(_open(branch), 1) for branch in params["branches"]]
    return [(_open(params[WRAPPERS[name]]), 1)]


def tensor_of(variable: Any) -> Tensor:
    return Tensor(tuple(int(n) for n in variable.aval.shape), str(variable.aval.dtype))


def body_flops(name: str, params: Mapping[str, Any], flops_of: Callable[[Any], float]) -> float:
    """FLOPs of all trips; of the dearest branch of a ``cond``. ``flops_of`` gives those of one equation."""
    each = [times * sum(map(flops_of, jaxpr.eqns)) for jaxpr, times in bodies(name, params)]
    return float(max(each, default=0.0) if name == "cond" else sum(each))


def body_rule(
    name: str, params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor], rule_of: RuleOf
) -> Rule:
    """The factors that are free in every equation of the body; what it contracts or moves stays whole."""
    tied = _Ties()
    for nodes in _borders(name, params, operands, results):
        tied.join(nodes, 0)
    known = True
    equations = [eqn for jaxpr, _ in bodies(name, params) for eqn in jaxpr.eqns]
    apart: list[list[list[Node]]] = []  # for each equation, the dims of each of its factors
    for eqn in equations:
        inner = rule_of(
            eqn.primitive.name, eqn.params, [tensor_of(v) for v in eqn.invars], [tensor_of(v) for v in eqn.outvars]
        )
        known &= inner.known
        groups: list[list[Node]] = [[] for _ in inner.sizes]
        rows = zip((*eqn.invars, *eqn.outvars), (*inner.operands, *inner.results), strict=True)
        for variable, dims in rows:
            if hasattr(variable, "val"):
                continue
            for dim, factor in enumerate(dims):
                if factor != UNSPLIT:
                    groups[factor].append((variable, dim))
                elif variable.aval.shape[dim] != 1:
                    tied.keep_whole((variable, dim))
        for factor, nodes in enumerate(groups):
            tied.join(nodes, inner.sizes[factor])
            if factor in inner.contracted:
                for node in nodes:
                    tied.keep_whole(node)
        apart.append([nodes for nodes in groups if nodes])
    for sides in apart:
        tied.keep_apart([nodes[0] for nodes in sides])
    return tied.rule(operands, results, known)


def _open(jaxpr: Any) -> Any:
    """The jaxpr without its constants."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _borders(
    name: str, params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor]
) -> Iterator[list[Node]]:
    """Dims outside the body and inside it that are the same dim."""
    ins = [("in", i) for i in range(len(operands))]
    outs = [("out", o) for o in range(len(results))]
    shapes = {**dict(zip(ins, operands, strict=True)), **dict(zip(outs, results, strict=True))}

    def same(outside: Any, variable: Any, skip: int = 0) -> Iterator[list[Node]]:
        for dim in range(skip, len(shapes[outside].shape)):
            yield [(outside, dim)] if hasattr(variable, "val") else [(outside, dim), (variable, dim - skip)]

    def pair(outside: Sequence[Any], variables: Sequence[Any], skip: int = 0) -> Iterator[list[Node]]:
        for array, variable in zip(outside, variables, strict=True):
            yield from same(array, variable, skip)

    programs = [jaxpr for jaxpr, _ in bodies(name, params)]
    if name == "scan":
        (body,) = programs
        consts, carried = params["num_consts"], params["num_carry"]
        yield from pair(ins[: consts + carried], body.invars[: consts + carried])
        yield from pair(ins[consts + carried :], body.invars[consts + carried :], skip=1)
        yield from pair(outs[:carried], body.outvars[:carried])
        yield from pair(ins[consts : consts + carried], body.outvars[:carried])
        yield from pair(outs[carried:], body.outvars[carried:], skip=1)
    elif name == "while":
        body, condition = programs
        tests, consts = params["cond_nconsts"], params["body_nconsts"]
        state = ins[tests + consts :]
        yield from pair(ins[tests:], body.invars)
        yield from pair((*ins[:tests], *state), condition.invars)
        yield from pair(state, body.outvars)
        yield from pair(outs, body.outvars)
    else:
        given = ins[1:] if name == "cond" else ins
        for program in programs:
            yield from pair(given, program.invars)
            yield from pair(outs, program.outvars)


class _Ties:
    """Which dims go together (union-find), into how many parts they may be cut, and which stay whole."""

    def __init__(self) -> None:
        self._parent: dict[Node, Node] = {}
        self._size: dict[Node, int] = {}  # of a root: the greatest common divisor of its factors' sizes
        self._whole: set[Node] = set()

    def _root(self, node: Node) -> Node:
        self._parent.setdefault(node, node)
        while self._parent[node] != node:
            self._parent[node] = self._parent[self._parent[node]]
            node = self._parent[node]
        return node

    def join(self, nodes: Sequence[Node], size: int) -> None:
        roots = list(dict.fromkeys(self._root(node) for node in nodes))
        for other in roots[1:]:
            self._parent[other] = roots[0]
            self._size[roots[0]] = gcd(self._size.get(roots[0], 0), self._size.pop(other, 0))
            if other in self._whole:
                self._whole.add(roots[0])
        if roots:
            self._size[roots[0]] = gcd(self._size.get(roots[0], 0), size)

    def keep_whole(self, node: Node) -> None:
        self._whole.add(self._root(node))

    def keep_apart(self, nodes: Sequence[Node]) -> None:
        """Dims of one equation that carry different factors: tied to each other elsewhere, none can be split."""
        roots = [self._root(node) for node in nodes]
        self._whole.update(root for root in roots if roots.count(root) > 1)

    def rule(self, operands: Sequence[Tensor], results: Sequence[Tensor], known: bool) -> Rule:
        entering = frozenset(self._parent)  # dims that reach the body: the trips of a scan do not
        arrays: list[tuple[Any, Tensor]] = [(("in", i), t) for i, t in enumerate(operands)]
        arrays += [(("out", o), t) for o, t in enumerate(results)]
        for array, tensor in arrays:
            self.keep_apart([(array, dim) for dim in range(len(tensor.shape))])
        numbers: dict[Node, int] = {}
        sizes: list[int] = []
        rows: list[tuple[int, ...]] = []
        for array, tensor in arrays:
            row = []
            for dim, length in enumerate(tensor.shape):
                root = self._root((array, dim))
                size = gcd(self._size.get(root, 0), length)
                if size == 1 or root in self._whole or (array, dim) not in entering:
                    row.append(UNSPLIT)
                    continue
                if root not in numbers:
                    numbers[root] = len(sizes)
                    sizes.append(size)
                row.append(numbers[root])
            rows.append(tuple(row))
        return Rule(tuple(rows[: len(operands)]), tuple(rows[len(operands) :]), tuple(sizes), known=known)
