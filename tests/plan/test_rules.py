"""Every factor rule against the compiler: split as the rule says, an equation needs no communication but the sum.

The equations are those of one tiny model of each family, forward and backward, with the values they really meet.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Primitive, primitives
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshwright.plan.graph import UNSPLIT, Dims, Rule, Tensor
from meshwright.plan.rules import operator_flops, rule_of
from meshwright.plan.rules.bodies import BODIES
from meshwright.plan.rules.table import RULES, WHOLE
from meshwright.plan.trace.equations import (
    CALLS,
    DIFFERENTIATION_CALLS,
    Equation,
    Listing,
    Literal,
    apply,
    evaluate,
    tensor_of,
)
from tests.models.training import compiled
from tests.plan.chain import TINY, traced, values_of

PARTS = 2
SETTINGS = ("window_strides", "lhs_dilation", "feature_group_count", "batch_group_count")
SHAPE = re.compile(r"\w+\[[\d,]*\]")
COLLECTIVE = re.compile(r"= (.+?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


@dataclass(frozen=True, slots=True)
class Case:
    """One factor of one equation, to be split in two."""

    equation: Equation
    operands: tuple[Any, ...]
    results: tuple[Any, ...]
    rule: Rule
    factor: int

    def __str__(self) -> str:
        shapes = ", ".join(str(np.shape(x)) for x in self.operands)
        return f"{self.equation.name}({shapes}) {dict(self.equation.params)}, factor {self.factor} of {self.rule}"

    def run(self, *arrays: Any) -> list[Any]:
        """The equation; its literals are constants of the program."""
        given = iter(arrays)
        return apply(self.equation, [x.value if isinstance(x, Literal) else next(given) for x in self.equation.inputs])

    @property
    def arrays(self) -> list[Any]:
        return [a for a, x in zip(self.operands, self.equation.inputs, strict=True) if not isinstance(x, Literal)]

    def shardings(self) -> tuple[list[NamedSharding], list[NamedSharding]]:
        rows = zip(self.rule.operands, self.equation.inputs, strict=True)
        into = [self._sharding(dims) for dims, x in rows if not isinstance(x, Literal)]
        return into, [self._sharding(dims) for dims in self.rule.results]

    def _sharding(self, dims: Dims) -> NamedSharding:
        mesh = Mesh(np.array(jax.devices()[:PARTS]), ("x",))
        return NamedSharding(mesh, PartitionSpec(*("x" if f == self.factor else None for f in dims)))


def equation_cases(equation: Equation, values: Mapping[int, Any]) -> Iterator[Case]:
    """Each factor of an equation that divides by two, with the values it read and wrote when it ran whole."""
    operands = [x.value if isinstance(x, Literal) else values[x] for x in equation.inputs]
    results = [values[v] for v in equation.outputs]
    shapes = [Tensor(np.shape(x), str(jnp.result_type(x))) for x in (*operands, *results)]
    rule = rule_of(equation.name, equation.params, shapes[: len(operands)], shapes[len(operands) :])
    for factor, size in enumerate(rule.sizes):
        if size % PARTS == 0:
            yield Case(equation, tuple(operands), tuple(results), rule, factor)


def distinct(cases: Iterable[Case]) -> tuple[Case, ...]:
    """One case of each pattern: the same dims of the same primitive, strides and windows apart."""
    found: dict[str, Case] = {}
    for case in cases:
        settings = {key: case.equation.params.get(key) for key in SETTINGS}
        found.setdefault(
            f"{case.equation.name} {case.rule.operands} {case.rule.results} {case.factor} {settings}", case
        )
    return tuple(found.values())


def zoo_cases(name: str) -> Iterator[Case]:
    """What a tiny model applies."""
    _, _, values = values_of(name)
    trace = traced(name)
    for layer_class, env in {use.layer_class: env for use, env in zip(trace.graph.layers, values, strict=True)}.items():
        joint = trace.classes[layer_class]
        for eqn in (*joint.forward, *joint.backward):
            yield from equation_cases(eqn, env)


def written_cases(function: Callable[..., Any], *operands: Any) -> tuple[Case, ...]:
    """What a function of arrays applies."""
    listing = Listing()
    shapes = [Tensor(x.shape, str(x.dtype)) for x in operands]
    listing.append(jax.make_jaxpr(function)(*operands), [listing.new(t) for t in shapes], CALLS)
    values: dict[int, Any] = dict(enumerate(operands))
    found: list[Case] = []
    evaluate(listing.equations, values)
    for eqn in listing.equations:
        found += equation_cases(eqn, values)
    return distinct(found)


def normal(*shape: int) -> Any:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def whole(below: int, *shape: int) -> Any:
    return np.random.default_rng(below).integers(0, below, shape, np.int32)


def _pool(x: Any) -> Any:
    return lax.reduce_window(x, -np.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def _convolve(x: Any, kernel: Any, padding: Any = "SAME", **settings: Any) -> Any:
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **settings)


# What the zoo does not use, or not in all its forms.
WRITTEN: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "merge": (lambda x: x.reshape(4, 48), (normal(4, 6, 8),)),
    "part": (lambda x: x.reshape(4, 6, 8), (normal(4, 48),)),
    "regroup": (lambda x: x.reshape(8, 12), (normal(4, 24),)),
    "ones": (lambda x: x.reshape(1, 4, 1, 6), (normal(4, 6),)),
    "repeat": (lambda x: jnp.broadcast_to(x, (4, 6, 8)), (normal(6, 1),)),
    "slice": (lambda x: x[:, 1:5], (normal(4, 8),)),
    "pad": (lambda x: jnp.pad(x, ((0, 0), (1, 2))), (normal(4, 8),)),
    "concatenate": (lambda x, y: jnp.concatenate([x, y], 1), (normal(4, 8), normal(4, 6))),
    "rev": (lambda x: x[:, ::-1], (normal(4, 8),)),
    "sort": (lambda x: jnp.sort(x, 0), (normal(4, 8),)),
    "cumulate": (lambda x: (jnp.cumsum(x, 1), lax.cummax(x, 0), jnp.cumprod(x, 1)), (normal(4, 8),)),
    "cumulate logs": (lambda x: lax.cumlogsumexp(x, 1), (normal(4, 8),)),
    "top": (lambda x: lax.top_k(x, 2), (normal(4, 8),)),
    "extremes": (lambda x: (x.min(0), x.max(1), (x > 0).all(0), (x > 0).any(1)), (normal(4, 8),)),
    "searched": (lambda x: (jnp.argmax(x, 0), jnp.argmin(x, 1)), (normal(4, 8),)),
    "clamp": (lambda x: jnp.clip(x, -1.0, 1.0), (normal(4, 8),)),
    "batched product": (lambda x, y: jnp.einsum("abij,abjk->abik", x, y), (normal(2, 4, 6, 8), normal(2, 4, 8, 2))),
    "rows": (lambda t, i: t[i], (normal(8, 6), whole(8, 4, 2))),
    "labels": (lambda x, i: jnp.take_along_axis(x, i[:, None], 1), (normal(4, 8), whole(8, 4))),
    "rows added": (lambda t, i, u: t.at[i].add(u), (normal(8, 6), whole(8, 4), normal(4, 6))),
    "labels added": (jax.grad(lambda x, i: jnp.take_along_axis(x, i, 1).sum()), (normal(4, 8), whole(8, 4, 2))),
    "pool": (_pool, (normal(2, 4, 4, 2),)),
    "pool back": (jax.grad(lambda x: _pool(x).sum()), (normal(2, 4, 4, 2),)),
    "sums of windows": (
        lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"),
        (normal(2, 4, 4, 2),),
    ),
    "grouped": (lambda x, k: _convolve(x, k, feature_group_count=2), (normal(2, 4, 4, 8), normal(3, 3, 4, 6))),
    "grouped by batch": (lambda x, k: _convolve(x, k, batch_group_count=2), (normal(4, 4, 4, 2), normal(3, 3, 2, 6))),
    "dilated": (
        lambda x, k: _convolve(x, k, padding=((1, 1), (1, 1)), lhs_dilation=(2, 2)),
        (normal(2, 4, 4, 8), normal(3, 3, 8, 6)),
    ),
    "ragged": (lambda x, w: lax.ragged_dot(x, w, jnp.array([1, 3])), (normal(4, 8), normal(2, 8, 6))),
    "ragged back": (
        jax.grad(lambda x, w: lax.ragged_dot(x, w, jnp.array([1, 3])).sum(), argnums=(0, 1)),
        (normal(4, 8), normal(2, 8, 6)),
    ),
    "part of place": (lambda x, i: lax.dynamic_slice(x, (i, 0), (2, 8)), (normal(4, 8), whole(2))),
    "part replaced": (lambda x, u, i: lax.dynamic_update_slice(x, u, (i, 0)), (normal(4, 8), normal(2, 8), whole(2))),
    "stacked": (lambda x, y: jnp.stack([x, y], 1), (normal(4, 8), normal(4, 8))),
    "unstacked": (lambda x: jnp.unstack(x, axis=1), (normal(4, 3, 8),)),
    "tiled": (lambda x: jnp.tile(x, (3, 1)), (normal(4, 8),)),
    "frequencies": (lambda x: jnp.fft.irfft(jnp.fft.rfft(x) * 2), (normal(4, 8),)),
    "fenced": (lambda x, y: lax.optimization_barrier((x, y)), (normal(4, 8), normal(4, 6))),
    "rows set": (lambda t, i, u: t.at[i].set(u, unique_indices=True), (normal(8, 6), np.arange(4), normal(4, 6))),
    "rows larger": (lambda t, i, u: t.at[i].max(u), (normal(8, 6), whole(8, 4), normal(4, 6))),
    "products": (lambda x: (jnp.prod(x, 0), lax.cummin(x, 1)), (normal(4, 8),)),
    "any function": (lambda x: lax.reduce(x, 0.0, lambda a, b: jnp.maximum(a, b * 0.5), (0,)), (normal(4, 8),)),
    "bits": (lambda x: lax.reduce_xor(x, (0,)), (whole(8, 4, 8),)),
    "as bytes": (lambda x: lax.bitcast_convert_type(x, jnp.uint8), (normal(4, 8),)),
    "dropout": (lambda seed: jax.random.bits(jax.random.wrap_key_data(seed), (4, 8)), (np.arange(2, dtype=np.uint32),)),
    "loop over rows": (
        lambda x, w: lax.scan(lambda c, y: (c + y @ w, y * 2), x[0] * 0, x),
        (normal(3, 4, 6), normal(6, 6)),
    ),
    "loop": (
        lambda x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1])), (0, x))[1],
        (normal(4, 8),),
    ),
    "branch": (lambda x, i: lax.cond(i > 0, jnp.sin, lambda y: y * 2, x), (normal(4, 8), whole(2))),
    "smallest windows": (
        lambda x: lax.reduce_window(x, np.inf, lax.min, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"),
        (normal(2, 4, 4, 2),),
    ),
}


def collectives(text: str) -> Counter[tuple[str, str]]:
    """(kind, shape of a result) of the collectives in a compiled program, combined ones taken apart."""
    return Counter((kind, shape) for shapes, kind in COLLECTIVE.findall(text) for shape in SHAPE.findall(shapes))


def run_split(group: Sequence[Case]) -> tuple[str, list[list[Any]]]:
    """The compiled text and the results of cases that run side by side, each split as its rule says."""
    arrays = [case.arrays for case in group]
    shardings = [case.shardings() for case in group]
    program = compiled(partial(_together, group), out_shardings=[s[1] for s in shardings])
    placed = jax.device_put(arrays, [s[0] for s in shardings])
    lowered = program.lower(placed).compile()
    return lowered.as_text(), lowered(placed)


def _together(group: Sequence[Case], arrays: Sequence[Sequence[Any]]) -> list[list[Any]]:
    return [case.run(*mine) for case, mine in zip(group, arrays, strict=True)]


def sums_of(case: Case) -> Iterator[tuple[str, str]]:
    """The collectives that the planner prices for a split of a contracted factor: the sum of each result."""
    for result in case.results:
        kinds = {"float32": "f32", "bool": "pred", "int32": "s32"}
        yield "all-reduce", f"{kinds[str(result.dtype)]}[{','.join(map(str, result.shape))}]"


def check(group: Sequence[Case]) -> None:
    """Split results equal whole ones, and only contracted factors communicate, as the planner prices it."""
    free = [case for case in group if case.factor not in case.rule.contracted]
    contracted = [case for case in group if case.factor in case.rule.contracted]
    for some, promised in ((free, Counter()), (contracted, Counter(s for case in contracted for s in sums_of(case)))):
        if not some:
            continue
        text, split = run_split(some)
        for case, mine in zip(some, split, strict=True):
            for a, b in zip(mine, case.results, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4, err_msg=str(case))
        if collectives(text) != promised:
            # Each by itself, to name the one that errs.
            wrong = [
                str(case)
                for case in some
                if collectives(run_split([case])[0]) != Counter(sums_of(case) if some is contracted else ())
            ]
            pytest.fail("the compiler communicates otherwise than the rule says in\n" + "\n".join(wrong))


def test_what_the_zoo_applies_splits_as_its_rules_say() -> None:
    every = distinct(case for name in TINY for case in zoo_cases(name))
    assert len(every) > 250
    check(every)


def test_what_else_has_a_rule_splits_as_it_says() -> None:
    every = [case for function, operands in WRITTEN.values() for case in written_cases(function, *operands)]
    check(every)


def test_every_rule_maker_was_tried() -> None:
    tried = {op.primitive for name in TINY for c in traced(name).classes for op in c.graph.operators}
    for function, operands in WRITTEN.values():
        tried |= {eqn.primitive.name for eqn in jax.make_jaxpr(function)(*operands).eqns}
    assert {RULES[name] for name in tried if name in RULES} == set(RULES.values())


def test_every_primitive_of_jax_is_ruled_looked_through_or_whole_for_a_reason() -> None:
    """A JAX release that brings a new primitive fails here, by name."""
    public = {p.name for module in (lax, primitives) for p in vars(module).values() if isinstance(p, Primitive)}
    looked_through = {*CALLS, *DIFFERENTIATION_CALLS, *BODIES}
    assert public - {*RULES, *WHOLE} == public & looked_through
    assert not {*RULES} & {*WHOLE}
    assert all(len(reason) > 20 for reason in WHOLE.values())


def test_a_primitive_without_a_rule_runs_replicated_and_is_reported() -> None:
    square = Tensor((4, 4), "float32")
    rule = rule_of("cholesky", {}, [square], [square])
    assert not rule.known
    assert rule.sizes == ()
    assert rule.operands == rule.results == ((UNSPLIT, UNSPLIT),)


def test_flops_of_products_count_two_per_multiply_add() -> None:
    left, right, out = (Tensor(shape, "float32") for shape in ((4, 6, 8), (4, 8, 10), (4, 6, 10)))
    numbers = {"dimension_numbers": (((2,), (1,)), ((0,), (0,)))}
    assert operator_flops("dot_general", numbers, [left, right], [out]) == 2 * 4 * 6 * 8 * 10


def test_a_strided_convolution_and_its_gradients_cost_the_same() -> None:
    """The gradient with respect to the image is written with zeros between; nobody multiplies them."""

    def loss(x: Any, kernel: Any) -> Any:
        y = lax.conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return (y * y).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(normal(2, 8, 8, 4), normal(2, 2, 4, 6)).jaxpr
    flops = [
        operator_flops(
            "conv_general_dilated", e.params, [tensor_of(v.aval) for v in e.invars], [tensor_of(e.outvars[0].aval)]
        )
        for e in jaxpr.eqns
        if e.primitive.name == "conv_general_dilated"
    ]
    assert flops == [2.0 * (2 * 4 * 4 * 6) * (2 * 2 * 4)] * 3
