"""An optax optimizer traced over the whole parameter tree, then cut by owner: each stage updates what it owns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from meshwright.errors import PlanError
from meshwright.plan.graph import Leaf
from meshwright.plan.trace.equations import (
    CALLS,
    DIFFERENTIATION_CALLS,
    Atom,
    Equation,
    Listing,
    Literal,
    evaluate,
    live_equations,
    tensor_of,
)

_INLINED = {**CALLS, **DIFFERENTIATION_CALLS}


@dataclass(frozen=True, slots=True)
class _Traced:
    """A function over numbered values: inputs, equations, results."""

    inputs: tuple[int, ...]
    equations: tuple[Equation, ...]
    results: tuple[Atom, ...]

    def run(self, wanted: Sequence[int], given: dict[int, Any]) -> list[Any]:
        """The results at positions ``wanted``, computed from those inputs (by position) that are given."""
        values = {self.inputs[position]: array for position, array in given.items()}
        targets = [self.results[position] for position in wanted]
        evaluate(live_equations(self.equations, [t for t in targets if isinstance(t, int)]), values)
        return [t.value if isinstance(t, Literal) else values[t] for t in targets]


class StagewiseOptimizer:
    """``optimizer`` for parameters that different stages own.

    State leaves that belong to one parameter (moments) live with its owner; those that belong to none (a step count)
    are kept by every stage. An update of one stage that needs another's gradients is refused.
    """

    def __init__(self, optimizer: Any, parameter_tree: Any, parameters: Sequence[Leaf], owners: dict[int, int]) -> None:
        shapes = [jax.ShapeDtypeStruct(leaf.tensor.shape, leaf.tensor.dtype) for leaf in parameters]
        tree = jax.tree.unflatten(parameter_tree, shapes)
        state = jax.eval_shape(optimizer.init, tree)
        self.state_shapes, self.state_tree = jax.tree.flatten(state)
        self.parameters, self.owners = tuple(parameters), owners
        count = len(parameters)

        def update(gradients: Any, old: Any, weights: Any) -> tuple[list[Any], list[Any]]:
            changes, new = optimizer.update(gradients, old, weights)
            moved = jax.tree.map(lambda w, c: (w + c).astype(w.dtype), weights, changes)
            return jax.tree.leaves(moved), jax.tree.leaves(new)

        self._update = _trace(update, tree, state, tree)
        self._init = _trace(lambda weights: jax.tree.leaves(optimizer.init(weights)), tree)
        self._owner_of_state, coupled = self._owners_of_results(count)
        if coupled:
            names = ", ".join(parameters[leaf].name for leaf in coupled[:3])
            raise PlanError(
                f"the optimizer's update of {names} needs gradients that another stage owns (clipping by global norm "
                "does); use one without such coupling, or a plan of one stage (--fix pipeline=1)"
            )

    def _owners_of_results(self, count: int) -> tuple[list[int | None], list[int]]:
        """The stage of each state leaf (None: every stage), and the parameters whose update couples stages."""
        state_count = len(self.state_shapes)
        state_needs: list[frozenset[int]] = [frozenset()] * state_count
        while True:
            needs: dict[int, frozenset[int]] = {}
            for position, value in enumerate(self._update.inputs):
                if count <= position < count + state_count:
                    needs[value] = state_needs[position - count]
                else:
                    leaf = position if position < count else position - count - state_count
                    needs[value] = frozenset({leaf})
            for eqn in self._update.equations:
                union = frozenset().union(*(needs[v] for v in eqn.reads))
                needs.update(dict.fromkeys(eqn.outputs, union))
            found = [needs[r] if isinstance(r, int) else frozenset() for r in self._update.results]
            after = [old | new for old, new in zip(state_needs, found[count:], strict=True)]
            if after == state_needs:
                break
            state_needs = after
        stages = [{self.owners[leaf] for leaf in leaves} for leaves in state_needs]
        coupled = [leaf for leaf in range(count) if {self.owners[x] for x in found[leaf]} - {self.owners[leaf]}]
        coupled += [min(leaves) for leaves, where in zip(state_needs, stages, strict=True) if len(where) > 1]
        self.state_leaf = [next(iter(leaves)) if len(leaves) == 1 else None for leaves in state_needs]
        return [next(iter(where)) if len(where) == 1 else None for where in stages], coupled

    def owned(self, stage: int) -> tuple[int, ...]:
        """Parameter leaves of a stage."""
        return tuple(leaf for leaf in range(len(self.parameters)) if self.owners.get(leaf) == stage)

    def states(self, stage: int) -> tuple[int, ...]:
        """State leaves that a stage keeps."""
        return tuple(i for i, owner in enumerate(self._owner_of_state) if owner in (stage, None))

    def parameter_of_state(self, state: int) -> int | None:
        """The parameter that a state leaf belongs to and has the shape of, or None."""
        leaf = self.state_leaf[state]
        if leaf is None or self.parameters[leaf].tensor.shape != tuple(self.state_shapes[state].shape):
            return None
        return leaf

    def init(self, stage: int, weights: Sequence[Any]) -> list[Any]:
        """First state of a stage, from its parameters in the order of ``owned``."""
        return self._init.run(self.states(stage), dict(zip(self.owned(stage), weights, strict=True)))

    def update(
        self, stage: int, gradients: Sequence[Any], state: Sequence[Any], weights: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        """New parameters and state of a stage; sequences in the orders of ``owned`` and ``states``."""
        count, states = len(self.parameters), len(self.state_shapes)
        owned, kept = self.owned(stage), self.states(stage)
        given = dict(zip(owned, gradients, strict=True))
        given.update({count + position: array for position, array in zip(kept, state, strict=True)})
        given.update({count + states + leaf: array for leaf, array in zip(owned, weights, strict=True)})
        results = self._update.run([*owned, *(count + position for position in kept)], given)
        return results[: len(owned)], results[len(owned) :]


def _trace(function: Any, *arguments: Any) -> _Traced:
    closed = jax.make_jaxpr(function)(*arguments)
    listing = Listing()
    inputs = [listing.new(tensor_of(aval)) for aval in closed.in_avals]
    results = listing.append(closed, inputs, _INLINED)
    return _Traced(tuple(inputs), tuple(listing.equations), tuple(results))
