"""One stage as compiled XLA: forward, backward, and the end of the iteration, with the plan's shardings pinned.

The equations are those that were planned: both halves of the joint list, each result pinned where the plan says so.
Weights and batch are passed to both halves; only what the forward pass makes is kept between them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshwright.execute.split import GradientKey, LayerLayout, NamedSpec, StageSplit
from meshwright.plan.graph import LayerGraph, LayerUse
from meshwright.plan.trace.equations import Equation, Literal, abstract, apply
from meshwright.plan.trace.model import Trace

Array = Any
KeptKey = tuple[int, int]  # (layer, value of its graph), or (-1, model-wide value) for what enters a layer


@dataclass(frozen=True, slots=True)
class StagePrograms:
    """The compiled programs of a stage.

    forward(parameters, batch, received) -> (produced values that others read, kept, loss and aux)
    backward(parameters, batch, received, kept, cotangents, accumulators) -> (accumulators, cotangents of received)
    zeros() -> accumulators; reduce(*accumulators) -> one gradient per parameter of the stage
    """

    forward: Any
    backward: Any
    zeros: Any
    reduce: Any
    outputs: tuple[int, ...]  # model-wide values that forward gives last: loss and aux made here
    forward_temp_bytes: float  # what XLA says a program needs on a device while it runs
    backward_temp_bytes: float
    reduce_temp_bytes: float


def sharding(mesh: Mesh, spec: NamedSpec, leading: tuple[str, ...] = ()) -> NamedSharding:
    """A spec as JAX writes it; ``leading`` axes split one more dim in front: partial results, one per device."""
    words = [axes[0] if len(axes) == 1 else (axes or None) for axes in spec]
    return NamedSharding(mesh, PartitionSpec(*((leading,) if leading else ()), *words))


def build_stage(split: StageSplit, trace: Trace, mesh: Mesh, microbatches: int, remat: bool) -> StagePrograms:
    """Trace, shard and compile a stage for its mesh. Every process that holds a device of the mesh calls this."""
    return _StageBuilder(split, trace, mesh, microbatches, remat).build()


class _StageBuilder:
    def __init__(self, split: StageSplit, trace: Trace, mesh: Mesh, microbatches: int, remat: bool) -> None:
        self.split, self.trace, self.mesh, self.remat = split, trace, mesh, remat
        self.graph = trace.graph
        self.scale = 1.0 / microbatches if trace.model.loss_reduction == "mean" else 1.0
        self.sizes = dict(split.axes)
        # aux may name the loss or a value twice; each is given once
        wanted = dict.fromkeys((self.graph.loss, *self.graph.aux))
        self.outputs = tuple(v for v in wanted if v in split.produced_specs)
        self.kept_keys = self._kept_keys()

    # -- what the functions are made of -----------------------------------------------------------------------------

    def _layers(self) -> list[tuple[int, LayerUse, LayerGraph, LayerLayout]]:
        found = []
        for layer, layout in zip(self.split.layers, self.split.layouts, strict=True):
            use = self.graph.layers[layer]
            found.append((layer, use, self.graph.classes[use.layer_class], layout))
        return found

    def _kept_keys(self) -> tuple[KeptKey, ...]:
        keys: dict[KeptKey, None] = {}
        for layer, use, graph, _ in self._layers():
            if not self.remat:
                keys.update({(layer, value): None for value in graph.residuals})
            again = graph.entries if self.remat else graph.kept_entries
            for value, number in zip(use.entries, graph.entries, strict=True):
                if number in again and value not in self.split.received:
                    keys[-1, value] = None
        return tuple(keys)

    def _inputs(
        self, use: LayerUse, graph: LayerGraph, parameters: dict[int, Array], batch: dict[int, Array]
    ) -> dict[int, Array]:
        values = {number: parameters[leaf] for leaf, number in zip(use.parameters, graph.parameters, strict=True)}
        values.update({number: batch[leaf] for leaf, number in zip(use.batch, graph.batch, strict=True)})
        return values

    def _pin(self, array: Array, spec: NamedSpec, leading: tuple[str, ...] = ()) -> Array:
        if array.ndim == 0:
            return array
        return jax.lax.with_sharding_constraint(array, sharding(self.mesh, spec, leading))

    def _evaluate(
        self, equations: Sequence[Equation], first: int, layout: LayerLayout, values: dict[int, Array]
    ) -> None:
        """Run equations numbered from ``first``, pinning operands and results as the layout says."""
        for index, eqn in enumerate(equations, start=first):
            arguments = []
            position = 0  # among operands that are values; literals are not counted in a layout
            for atom in eqn.inputs:
                if isinstance(atom, Literal):
                    arguments.append(atom.value)
                    continue
                array = values[atom]
                if (index, position) in layout.operands and atom not in layout.partial:
                    array = self._pin(array, layout.operands[index, position])
                arguments.append(array)
                position += 1
            axes = layout.partial.get(eqn.outputs[0], ())
            results = self._apply_partial(eqn, index, arguments, layout, axes) if axes else apply(eqn, arguments)
            for number, result in zip(eqn.outputs, results, strict=True):
                spec = layout.values.get(number)
                values[number] = result if spec is None else self._pin(result, spec, axes)

    def _apply_partial(
        self, eqn: Equation, index: int, arguments: Sequence[Array], layout: LayerLayout, axes: tuple[str, ...]
    ) -> list[Array]:
        """Run an equation so that its sum over ``axes`` is left undone: one partial result per device, in a new dim 0.

        Where the sum begins, every device along ``axes`` runs the equation on its own part of the summed dims; after
        that the equation is mapped over the parts that are there already.
        """
        reads_partial = [isinstance(x, int) and x in layout.partial for x in eqn.inputs]
        if any(reads_partial):
            function = jax.vmap(partial(_apply_flat, eqn), in_axes=[0 if p else None for p in reads_partial])
            return list(function(*arguments))
        places = [place for place, x in enumerate(eqn.inputs) if isinstance(x, int)]

        def own_part(*parts: Array) -> list[Array]:
            operands = list(arguments)
            for place, part in zip(places, parts, strict=True):
                operands[place] = part
            return [jnp.expand_dims(result, 0) for result in apply(eqn, operands)]

        def cut(position: int, dims: int) -> PartitionSpec:
            split = [
                tuple(a for a in layout.splits.get((index, position, dim), ()) if a in axes) for dim in range(dims)
            ]
            return PartitionSpec(*(names or None for names in split))

        # By hand: the partitioner gathers the operands of a convolution that is mapped over parts of its batch.
        return list(
            jax.shard_map(
                own_part,
                mesh=self.mesh,
                in_specs=tuple(cut(position, arguments[place].ndim) for position, place in enumerate(places)),
                out_specs=PartitionSpec(axes),
                axis_names=frozenset(axes),
                check_vma=False,
            )(*(arguments[place] for place in places))
        )

    # -- the functions ----------------------------------------------------------------------------------------------

    def forward(
        self, parameters: Sequence[Array], batch: Sequence[Array], received: Sequence[Array]
    ) -> tuple[list[Array], list[Array], list[Array]]:
        weights = dict(zip(self.split.parameters, parameters, strict=True))
        samples = dict(zip(self.split.batch, batch, strict=True))
        crossing = dict(zip(self.split.received, received, strict=True))
        kept: dict[KeptKey, Array] = {}
        for layer, use, graph, layout in self._layers():
            values = self._inputs(use, graph, weights, samples)
            values.update(self._entries(use, graph, layout, crossing))
            joint = self.trace.classes[use.layer_class]
            self._evaluate(joint.forward, 0, layout, values)
            for value, number in zip(use.exits, graph.exits, strict=True):
                crossing[value] = self._pin(values[number], self.split.produced_specs[value])
            kept.update({(layer, number): values[number] for number in graph.residuals})
        kept.update({(-1, value): array for value, array in crossing.items()})
        return (
            [crossing[v] for v in self.split.sent],
            [kept[key] for key in self.kept_keys],
            [crossing[v] for v in self.outputs],
        )

    def _entries(
        self, use: LayerUse, graph: LayerGraph, layout: LayerLayout, crossing: dict[int, Array]
    ) -> dict[int, Array]:
        return {
            number: self._pin(crossing[value], layout.values[number]) if number in layout.values else crossing[value]
            for value, number in zip(use.entries, graph.entries, strict=True)
        }

    def backward(
        self,
        parameters: Sequence[Array],
        batch: Sequence[Array],
        received: Sequence[Array],
        kept: Sequence[Array],
        cotangents: Sequence[Array],
        accumulators: Sequence[Array],
    ) -> tuple[list[Array], list[Array]]:
        weights = dict(zip(self.split.parameters, parameters, strict=True))
        samples = dict(zip(self.split.batch, batch, strict=True))
        held = dict(zip(self.kept_keys, kept, strict=True))
        crossing = dict(zip(self.split.received, received, strict=True))
        crossing.update({value: array for (layer, value), array in held.items() if layer < 0})
        sums = dict(zip(self.split.gradients, accumulators, strict=True))
        arrived: dict[int, Array] = {}
        if self.split.has_loss:
            loss = self.graph.values[self.graph.loss]
            arrived[self.graph.loss] = jnp.ones(loss.shape, loss.dtype)
        for (value, _), cotangent in zip(self.split.cotangents_in, cotangents, strict=True):
            _add(arrived, value, cotangent)
        for layer, use, graph, layout in reversed(self._layers()):
            joint = self.trace.classes[use.layer_class]
            values = self._inputs(use, graph, weights, samples)
            again = set(graph.entries if self.remat else graph.kept_entries)
            entries = {v: n for v, n in zip(use.entries, graph.entries, strict=True) if n in again}
            for value, number in entries.items():
                values[number] = self._pin(crossing[value], layout.values[number])
            if self.remat:
                self._evaluate(joint.forward, 0, layout, values)
            else:
                values.update({number: held[layer, number] for number in graph.residuals})
            for value, number in zip(use.exits, graph.exit_cotangents, strict=True):
                if number >= 0:
                    tensor = self.graph.values[value]
                    cotangent = arrived.pop(value, None)
                    cotangent = jnp.zeros(tensor.shape, tensor.dtype) if cotangent is None else cotangent
                    values[number] = self._pin(cotangent, layout.values[number])
            self._evaluate(joint.backward, len(joint.forward), layout, values)
            for leaf, number in zip(use.parameters, graph.gradients, strict=True):
                if number >= 0:
                    key = GradientKey(leaf, layout.partial.get(number, ()))
                    total = sums[key] + values[number]
                    sums[key] = self._pin(total, self.split.gradient_specs[key], key.partial)
            for value, number in zip(use.entries, graph.entry_cotangents, strict=True):
                if number >= 0:
                    specs = (
                        self.split.received_specs if value in self.split.received_specs else self.split.produced_specs
                    )
                    _add(arrived, value, self._pin(values[number], specs[value]))
        return [sums[key] for key in self.split.gradients], [arrived[v] for v in self.split.cotangents_out]

    def _parts(self, key: GradientKey) -> tuple[int, ...]:
        return (prod(self.sizes[a] for a in key.partial),) if key.partial else ()

    def zeros(self) -> list[Array]:
        return [
            jnp.zeros((*self._parts(key), *leaf.tensor.shape), leaf.tensor.dtype)
            for key in self.split.gradients
            for leaf in [self.graph.parameters[key.leaf]]
        ]

    def reduce(self, *accumulators: Array) -> list[Array]:
        """Sum what was left partial and what several layers of the stage gave for one leaf; in the parameter's spec."""
        gradients: dict[int, Array] = {}
        for key, total in zip(self.split.gradients, accumulators, strict=True):
            whole = total.sum(axis=0) if key.partial else total
            _add(gradients, key.leaf, self._pin(whole, self.split.parameter_specs[key.leaf]))
        leaves = [leaf for leaf in self.split.parameters if leaf in gradients]
        return [gradients[leaf] * jnp.asarray(self.scale, gradients[leaf].dtype) for leaf in leaves]

    # -- compiled ---------------------------------------------------------------------------------------------------

    def build(self) -> StagePrograms:
        split, graph, place = self.split, self.graph, partial(sharding, self.mesh)

        def array(tensor: Any, named: NamedSharding) -> jax.ShapeDtypeStruct:
            shape = abstract(tensor)
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=named)

        parameters = [array(graph.parameters[x].tensor, place(split.parameter_specs[x])) for x in split.parameters]
        batch = [array(graph.batch[x].tensor, place(split.batch_specs[x])) for x in split.batch]
        received = [array(graph.values[v], place(split.received_specs[v])) for v in split.received]
        kept = [self._kept_shape(key) for key in self.kept_keys]
        sent = [place(split.produced_specs[v]) for v in split.sent]
        outputs = [place(split.produced_specs[v]) for v in self.outputs]
        cotangents = [array(graph.values[v], place(split.produced_specs[v])) for v, _ in split.cotangents_in]
        accumulators = [place(split.gradient_specs[key], key.partial) for key in split.gradients]
        returned = [place(split.received_specs[v]) for v in split.cotangents_out]
        with_gradient = dict.fromkeys(key.leaf for key in split.gradients)
        gradients = [place(split.parameter_specs[x]) for x in split.parameters if x in with_gradient]

        zeros = jax.jit(self.zeros, out_shardings=accumulators).lower()
        sums = [
            jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=named)
            for s, named in zip(jax.eval_shape(self.zeros), accumulators, strict=True)
        ]
        kept_places = [shape.sharding for shape in kept]
        forward = jax.jit(self.forward, out_shardings=(sent, kept_places, outputs)).lower(parameters, batch, received)
        backward = jax.jit(self.backward, out_shardings=(accumulators, returned), donate_argnums=5).lower(
            parameters, batch, received, kept, cotangents, sums
        )
        whole = tuple(  # these become the gradient where they lie; the memory of a partial sum fits none
            position
            for position, key in enumerate(split.gradients)
            if not key.partial and split.gradient_specs[key] == split.parameter_specs[key.leaf]
        )
        reduce = jax.jit(self.reduce, out_shardings=gradients, donate_argnums=whole).lower(*sums)
        compiled = [lowered.compile() for lowered in (forward, backward, reduce)]
        return StagePrograms(
            forward=compiled[0],
            backward=compiled[1],
            zeros=zeros.compile(),
            reduce=compiled[2],
            outputs=self.outputs,
            forward_temp_bytes=_temp_bytes(compiled[0]),
            backward_temp_bytes=_temp_bytes(compiled[1]),
            reduce_temp_bytes=_temp_bytes(compiled[2]),
        )

    def _kept_shape(self, key: KeptKey) -> jax.ShapeDtypeStruct:
        layer, value = key
        if layer < 0:
            tensor, spec = self.graph.values[value], self.split.produced_specs[value]
        else:
            use = self.graph.layers[layer]
            tensor = self.graph.classes[use.layer_class].tensors[value]
            spec = self.split.layouts[layer - self.split.layers.start].values.get(value, ((),) * len(tensor.shape))
        return jax.ShapeDtypeStruct(tensor.shape, tensor.dtype, sharding=sharding(self.mesh, spec))


def _temp_bytes(program: Any) -> float:
    stats = program.memory_analysis()
    return float(stats.temp_size_in_bytes) if stats is not None else 0.0


def _apply_flat(eqn: Equation, *arguments: Array) -> list[Array]:
    return apply(eqn, arguments)


def _add(table: dict[int, Array], key: int, array: Array) -> None:
    table[key] = table[key] + array if key in table else array
