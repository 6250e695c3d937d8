"""A flat list of primitive applications over numbered values: the form in which jaxprs are cut, joined and run."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jax
import numpy as np

from meshwright.plan.graph import Tensor
from meshwright.plan.rules import is_heavy, operator_flops

# Primitives that only wrap another jaxpr, and the parameter that holds it.
CALLS: Mapping[str, str] = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
# These carry derivative rules of their own: inlined only after differentiation.
DIFFERENTIATION_CALLS: Mapping[str, str] = {
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "remat2": "jaxpr",
    "remat": "jaxpr",
    "checkpoint": "jaxpr",
}
_KEY_KINDS = ("threefry2x32", "rbg", "unsafe_rbg")  # jax.random.key's impl


@dataclass(frozen=True, slots=True, eq=False)
class Literal:
    """A constant written into the program."""

    value: Any


Atom = int | Literal


@dataclass(frozen=True, slots=True, eq=False)
class Equation:
    """``outputs = primitive(*inputs, **params)``."""

    primitive: Any  # jax.extend.core.Primitive
    params: Mapping[str, Any]
    inputs: tuple[Atom, ...]
    outputs: tuple[int, ...]

    @property
    def name(self) -> str:
        return str(self.primitive.name)

    @property
    def reads(self) -> tuple[int, ...]:
        return tuple(x for x in self.inputs if isinstance(x, int))


@dataclass(slots=True)
class Listing:
    """Equations under construction; ``tensors[v]`` describes value v. Values are numbered in order of birth."""

    tensors: list[Tensor] = field(default_factory=list)
    equations: list[Equation] = field(default_factory=list)

    def new(self, tensor: Tensor) -> int:
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def append(self, closed: Any, arguments: Sequence[Atom], calls: Mapping[str, str]) -> list[Atom]:
        """Append a closed jaxpr applied to ``arguments``, looking through ``calls``; return its results."""
        return self._append(closed.jaxpr, [Literal(c) for c in closed.consts], arguments, calls)

    def _append(
        self, jaxpr: Any, consts: Sequence[Atom], arguments: Sequence[Atom], calls: Mapping[str, str]
    ) -> list[Atom]:
        env: dict[Any, Atom] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, arguments, strict=True))

        def read(atom: Any) -> Atom:
            if hasattr(atom, "val"):
                return Literal(np.asarray(atom.val, dtype=atom.aval.dtype))
            return env[atom]

        for eqn in jaxpr.eqns:
            inputs = [read(x) for x in eqn.invars]
            name = eqn.primitive.name
            if name in calls:
                inner = eqn.params[calls[name]]
                body, body_consts = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
                results = self._append(body, [Literal(c) for c in body_consts], inputs, calls)
                env.update(zip(eqn.outvars, results, strict=True))
            else:
                outputs = tuple(self.new(tensor_of(v.aval)) for v in eqn.outvars)
                env.update(zip(eqn.outvars, outputs, strict=True))
                self.equations.append(Equation(eqn.primitive, eqn.params, tuple(inputs), outputs))
        return [read(x) for x in jaxpr.outvars]


def tensor_of(aval: Any) -> Tensor:
    return Tensor(tuple(int(n) for n in aval.shape), str(aval.dtype))


def literal_tensor(literal: Literal) -> Tensor:
    array = np.asarray(literal.value)
    return Tensor(array.shape, str(array.dtype))


def atom_tensor(atom: Atom, tensors: Sequence[Tensor]) -> Tensor:
    return tensors[atom] if isinstance(atom, int) else literal_tensor(atom)


def heavy_flops(eqn: Equation, tensors: Sequence[Tensor]) -> float:
    """FLOPs of products and convolutions; 0 for whatever only moves memory."""
    if not is_heavy(eqn.name, eqn.params):
        return 0.0
    operands = [atom_tensor(x, tensors) for x in eqn.inputs]
    return operator_flops(eqn.name, eqn.params, operands, [tensors[v] for v in eqn.outputs])


def abstract(tensor: Tensor) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tensor.shape, _key_dtypes().get(tensor.dtype, tensor.dtype))


@cache
def _key_dtypes() -> Mapping[str, Any]:
    """The dtypes of typed random keys, which NumPy does not know, by their names."""
    shapes = [jax.eval_shape(lambda impl=impl: jax.random.key(0, impl=impl)) for impl in _KEY_KINDS]
    return {str(shape.dtype): shape.dtype for shape in shapes}


def evaluate(
    equations: Iterable[Equation], values: dict[int, Any], annotate: Callable[[int, Any], Any] | None = None
) -> None:
    """Apply the equations to ``values`` (value number -> array or tracer), adding every result to it.

    ``annotate(value, array)`` may wrap a result, as a sharding constraint does.
    """
    for eqn in equations:
        arguments = [x.value if isinstance(x, Literal) else values[x] for x in eqn.inputs]
        results = apply(eqn, arguments)
        for number, result in zip(eqn.outputs, results, strict=True):
            values[number] = result if annotate is None else annotate(number, result)


def apply(eqn: Equation, arguments: Sequence[Any]) -> list[Any]:
    # JAX 0.10 gives the keyword arguments of bind; other releases give a pair with the functions in front.
    bound = eqn.primitive.get_bind_params(dict(eqn.params))
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    result = eqn.primitive.bind(*functions, *arguments, **params)
    return list(result) if eqn.primitive.multiple_results else [result]


def live_equations(equations: Sequence[Equation], wanted: Iterable[int]) -> list[Equation]:
    """The equations whose results are needed for ``wanted``, in order."""
    needed = set(wanted)
    kept: list[Equation] = []
    for eqn in reversed(equations):
        if needed.intersection(eqn.outputs):
            kept.append(eqn)
            needed.update(eqn.reads)
    return kept[::-1]
