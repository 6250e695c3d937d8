"""An optax optimizer traced over the whole parameter tree, then cut by owner: each stage updates what it owns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from meshwright.errors import PlanError
from meshwright.execute.optimizer_rows import row_states
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
from meshwright.plan.trace.parts import Part

_INLINED = {**CALLS, **DIFFERENTIATION_CALLS}


@dataclass(frozen=True, slots=True)
class _Traced:
    """A function over numbered values: inputs, equations, results; and the jaxpr that it was."""

    closed: Any
    inputs: tuple[int, ...]
    equations: tuple[Equation, ...]
    results: tuple[Atom, ...]

    @property
    def names(self) -> list[str]:
        """The primitives, in order."""
        return [eqn.name for eqn in self.equations]

    def run(self, wanted: Sequence[int], given: dict[int, Any]) -> list[Any]:
        """The results at positions ``wanted``, computed from those inputs (by position) that are given."""
        values = {self.inputs[position]: array for position, array in given.items()}
        targets = [self.results[position] for position in wanted]
        evaluate(live_equations(self.equations, [t for t in targets if isinstance(t, int)]), values)
        return [t.value if isinstance(t, Literal) else values[t] for t in targets]


@dataclass(frozen=True, slots=True)
class _Slot:
    """A state as stages keep it: a leaf of the optimizer's state, or of one that goes by rows, the row of one part."""

    state: int
    part: int | None = None
    dim: int = 0


class StagewiseOptimizer:
    """``optimizer`` for parameters that different stages own.

    It is traced over the user's own tree. A parameter (``parts``) is a leaf of it or a row of one; rows are updated
    one by one where the optimizer treats them so, and stacked again for the update where it does not. State that
    belongs to one parameter (moments) lives with its owner; what belongs to none (a step count) is kept by every stage.
    An update of one stage that needs another's gradients is refused.
    """

    def __init__(
        self,
        optimizer: Any,
        parameter_tree: Any,
        leaves: Sequence[Leaf],
        owners: Mapping[int, int],
        parts: Sequence[Part] | None = None,
    ) -> None:
        """``leaves``: of the user's tree; ``owners``: part -> stage; ``parts``: by default every leaf is one.

        Errors: PlanError if the update couples stages.
        """
        self.leaves, self.owners = tuple(leaves), owners
        self.parts = tuple(Part(leaf) for leaf in range(len(leaves))) if parts is None else tuple(parts)
        self._row_dims = {part.leaf: part.dim for part in self.parts if part.row is not None}
        self._trace_update(optimizer, parameter_tree, {})
        needs, state_needs = self._needs()
        rows = row_states(self._update.closed, self._row_dims, len(leaves), state_needs) if self._row_dims else {}
        if rows is not None and any(len(needs[leaf]) > 1 for leaf in self._row_dims):
            rows = None
        if rows is not None and self._row_dims:
            names = self._update.names
            self._trace_update(optimizer, parameter_tree, self._row_dims)
            if self._update.names != names:  # it looks at shapes, and one row has another
                rows = None
                self._trace_update(optimizer, parameter_tree, {})
        self._by_rows = rows is not None and bool(self._row_dims)
        self._rows = rows or {}
        self.slots = self._make_slots()
        self._own_slots(needs, state_needs)

    def _trace_update(self, optimizer: Any, tree: Any, one_row: Mapping[int, int]) -> None:
        """Trace init and update; the leaves of ``one_row`` have a single row along the given dim."""

        def shape(number: int, leaf: Leaf) -> jax.ShapeDtypeStruct:
            dims = list(leaf.tensor.shape)
            if number in one_row:
                dims[one_row[number]] = 1
            return jax.ShapeDtypeStruct(tuple(dims), leaf.tensor.dtype)

        weights = jax.tree.unflatten(tree, [shape(number, leaf) for number, leaf in enumerate(self.leaves)])
        state = jax.eval_shape(optimizer.init, weights)
        self._states = jax.tree.leaves(state)

        def update(gradients: Any, old: Any, values: Any) -> tuple[list[Any], list[Any]]:
            changes, new = optimizer.update(gradients, old, values)
            moved = jax.tree.map(lambda w, c: (w + c).astype(w.dtype), values, changes)
            return jax.tree.leaves(moved), jax.tree.leaves(new)

        self._update = _trace(update, weights, state, weights)
        self._init = _trace(lambda values: jax.tree.leaves(optimizer.init(values)), weights)

    def _needs(self) -> tuple[list[frozenset[int]], list[frozenset[int]]]:
        """The leaves that the update of each leaf, and each state after any number of steps, depend on."""
        count, state_count = len(self.leaves), len(self._states)
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
                return found[:count], state_needs
            state_needs = after

    def _make_slots(self) -> tuple[_Slot, ...]:
        slots: list[_Slot] = []
        for state in range(len(self._states)):
            row = self._rows.get(state)
            if row is None:
                slots.append(_Slot(state))
            else:
                own = [index for index, part in enumerate(self.parts) if part.leaf == row.leaf]
                slots += [_Slot(state, index, row.dim) for index in own]
        return tuple(slots)

    def _own_slots(self, needs: Sequence[frozenset[int]], state_needs: Sequence[frozenset[int]]) -> None:
        """Who keeps which slot and to which parameter it belongs; refuses an update that couples stages."""
        stages: dict[int, set[int]] = {}
        for index, part in enumerate(self.parts):
            if index in self.owners:
                stages.setdefault(part.leaf, set()).add(self.owners[index])
        together = [
            {leaf, *leaves} for leaf, leaves in enumerate(needs) if not (self._by_rows and leaf in self._row_dims)
        ]
        together += [set(leaves) for state, leaves in enumerate(state_needs) if state not in self._rows]
        coupled = [min(leaves) for leaves in together if len(set().union(*(stages.get(x, ()) for x in leaves))) > 1]
        if coupled:
            names = ", ".join(dict.fromkeys(self.leaves[leaf].name for leaf in coupled[:3]))
            raise PlanError(
                f"the optimizer's update of {names} needs gradients that another stage owns (clipping by global norm "
                "does); use one without such coupling, or a plan of one stage (--fix pipeline=1)"
            )
        whole = {part.leaf: index for index, part in enumerate(self.parts) if part.row is None}
        self._part_of_slot: list[int | None] = []
        self._owner_of_slot: list[int | None] = []
        for slot in self.slots:
            leaves = state_needs[slot.state]
            where = set().union(*(stages.get(x, ()) for x in leaves))
            alone = next(iter(leaves)) if len(leaves) == 1 else None
            own = slot.part if slot.part is not None else whole.get(alone) if alone is not None else None
            self._part_of_slot.append(own)
            owner = self.owners.get(slot.part) if slot.part is not None else next(iter(where), None)
            self._owner_of_slot.append(owner)

    @property
    def state_shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shape of each state as it is kept."""
        found = []
        for slot in self.slots:
            shape = self._states[slot.state]
            dims = shape.shape if slot.part is None else (*shape.shape[: slot.dim], *shape.shape[slot.dim + 1 :])
            found.append(jax.ShapeDtypeStruct(dims, shape.dtype))
        return tuple(found)

    def owned(self, stage: int) -> tuple[int, ...]:
        """Parameters of a stage."""
        return tuple(part for part in range(len(self.parts)) if self.owners.get(part) == stage)

    def states(self, stage: int) -> tuple[int, ...]:
        """States that a stage keeps."""
        return tuple(i for i, owner in enumerate(self._owner_of_slot) if owner in (stage, None))

    def parameter_of_state(self, state: int) -> int | None:
        """The parameter that a state belongs to and has the shape of, or None."""
        index = self._part_of_slot[state]
        if index is None:
            return None
        part = self.parts[index]
        dims = self.leaves[part.leaf].tensor.shape
        own = dims if part.row is None else (*dims[: part.dim], *dims[part.dim + 1 :])
        return index if own == tuple(self.state_shapes[state].shape) else None

    def init(self, stage: int, weights: Sequence[Any]) -> list[Any]:
        """First state of a stage, from its parameters in the order of ``owned``."""
        mine = dict(zip(self.owned(stage), weights, strict=True))
        made: dict[int, Any] = {}
        for parts, slots in self._runs(stage):
            results = self._init.run([self.slots[s].state for s in slots], self._whole({p: mine[p] for p in parts}))
            made.update(self._kept(slots, results))
        return [made[slot] for slot in self.states(stage)]

    def update(
        self, stage: int, gradients: Sequence[Any], state: Sequence[Any], weights: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        """New parameters and state of a stage; sequences in the orders of ``owned`` and ``states``."""
        count, states, owned = len(self.leaves), len(self._states), self.owned(stage)
        slopes, values = dict(zip(owned, gradients, strict=True)), dict(zip(owned, weights, strict=True))
        old = dict(zip(self.states(stage), state, strict=True))
        shared = [s for s in old if self.slots[s].part is None]
        new: dict[int, Any] = {}
        kept: dict[int, Any] = {}
        for parts, slots in self._runs(stage):
            given = self._whole({p: slopes[p] for p in parts})
            for s in {*shared, *slots}:
                slot = self.slots[s]
                given[count + slot.state] = old[s] if slot.part is None else jnp.expand_dims(old[s], slot.dim)
            given.update({count + states + x: a for x, a in self._whole({p: values[p] for p in parts}).items()})
            wanted = [*(self.parts[p].leaf for p in parts), *(count + self.slots[s].state for s in slots)]
            results = self._update.run(wanted, given)
            for p, result in zip(parts, results[: len(parts)], strict=True):
                part = self.parts[p]
                row = Part(part.leaf, 0, part.dim) if self._by_rows and part.row is not None else part
                new[p] = row.of({part.leaf: result})
            kept.update(self._kept(slots, results[len(parts) :]))
        return [new[p] for p in owned], [kept[s] for s in self.states(stage)]

    def _runs(self, stage: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """(parts, states) that are computed together: everything, but rows that go by themselves one by one."""
        owned, kept = self.owned(stage), self.states(stage)
        alone = [p for p in owned if self._by_rows and self.parts[p].row is not None]
        together = tuple(p for p in owned if p not in alone)
        runs = [(together, tuple(s for s in kept if self.slots[s].part is None))]
        return runs + [((p,), tuple(s for s in kept if self.slots[s].part == p)) for p in alone]

    def _whole(self, arrays: Mapping[int, Any]) -> dict[int, Any]:
        """Leaf -> array as the traced update wants it, from arrays by part."""
        found: dict[int, Any] = {}
        rows: dict[int, list[Any]] = {}
        for index, array in arrays.items():
            part = self.parts[index]
            if part.row is None:
                found[part.leaf] = array
            else:
                rows.setdefault(part.leaf, []).append(array)
        return {**found, **{leaf: jnp.stack(own, axis=self._row_dims[leaf]) for leaf, own in rows.items()}}

    def _kept(self, slots: Sequence[int], results: Sequence[Any]) -> dict[int, Any]:
        """States as they are kept, from results of the traced functions."""
        return {
            s: result if self.slots[s].part is None else jnp.squeeze(result, self.slots[s].dim)
            for s, result in zip(slots, results, strict=True)
        }


def _trace(function: Any, *arguments: Any) -> _Traced:
    closed = jax.make_jaxpr(function)(*arguments)
    listing = Listing()
    inputs = [listing.new(tensor_of(aval)) for aval in closed.in_avals]
    results = listing.append(closed, inputs, _INLINED)
    return _Traced(closed, tuple(inputs), tuple(listing.equations), tuple(results))
