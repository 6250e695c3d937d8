"""One stage of a grid → seconds and bytes: its kernels are played once, then composed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil

from meshwright.simulate.collective import CollectiveKind
from meshwright.simulate.costs import StageCosts
from meshwright.simulate.memory import Overheads, Recipe, gathered_bytes, model_state_bytes, static_parts, total
from meshwright.simulate.operations import Collective, OptimizerStep, Pointwise
from meshwright.simulate.stage import Dispatch, run_operations
from meshwright.simulate.timeline import Parts
from meshwright.simulate.workload import activations
from meshwright.simulate.workload.block import (
    Operations,
    backward,
    forward,
    input_gradient,
    joined,
    layered,
    recomputed,
    weight_gradient,
)
from meshwright.simulate.workload.parts import Part
from meshwright.simulate.workload.pieces import Local, Piece, embedding_pieces, head_pieces, layer_pieces
from meshwright.simulate.workload.placement import Prices


@dataclass(frozen=True, slots=True)
class Weights:
    """Parameters on one device before ZeRO shares them out: those of all tokens, and those of its experts."""

    dense: float = 0.0
    routed: float = 0.0


@dataclass(frozen=True, slots=True)
class Played:
    """Seconds of one instruction, and of these the ones in which the device does nothing but communicate."""

    seconds: float = 0.0
    exposed_seconds: float = 0.0

    def __add__(self, other: "Played") -> "Played":
        return Played(self.seconds + other.seconds, self.exposed_seconds + other.exposed_seconds)


@dataclass(frozen=True)
class Stage:
    """A stage of ``layers`` layers, with the embedding if it is the first and the head if it is the last."""

    local: Local
    prices: Prices
    layers: float
    first: bool
    last: bool
    part: Part | None = None  # None: whole layers, recomputed as the grid says

    # Time

    @cached_property
    def forward(self) -> Played:
        """One micro-batch's forward."""
        return self._played(forward(self._layer), forward)

    @cached_property
    def backward(self) -> Played:
        """One micro-batch's whole backward, recomputation included."""
        scatters = self._gradient_sums("reduce_scatter") if self.local.grid.zero == 3 else ()
        return self._played(self._layer_backward, self._whole, scatters)

    @cached_property
    def input_gradient(self) -> Played:
        """One micro-batch's input-gradient, recomputation included."""
        return self._played(joined(self._again, input_gradient(self._layer)), input_gradient)

    @cached_property
    def weight_gradient(self) -> Played:
        """One micro-batch's weight-gradient."""
        return self._played(weight_gradient(self._layer), weight_gradient)

    @cached_property
    def reduce_seconds(self) -> float:
        """Sum of the gradients over replicas, once a step; of an overlapped one what the last backward leaves."""
        stack, zero = self.local.stack, self.local.grid.zero
        if zero == 3:
            return 0.0
        kind: CollectiveKind = "reduce_scatter" if zero else "all_reduce"
        if not (stack.overlapped_gradients and self.layers):
            return self._seconds(self._over_replicas(self.weights, stack.sent_gradient_bytes, kind))
        beside = self._play(layered(self._layer_backward, self._repeats, scatters=self._gradient_sums(kind)))
        alone = self._play(layered(self._layer_backward, self._repeats))
        embedding = Weights(self._end_parameters[0])  # its gradient is ready last, with nothing to run beside
        after = self._seconds(self._over_replicas(embedding, stack.sent_gradient_bytes, kind))
        return max(0.0, beside.seconds - alone.seconds) + after

    @cached_property
    def gather_seconds(self) -> float:
        """Updated weights brought back (ZeRO 1 and 2); of an overlapped gather what the next forward leaves."""
        if self.local.grid.zero not in (1, 2):
            return 0.0
        gather = self._seconds(self._over_replicas(self.weights, self.local.model.dtype_bytes, "all_gather"))
        return max(0.0, gather - self.forward.seconds) if self.local.stack.overlapped_gradients else gather

    @cached_property
    def update_seconds(self) -> float:
        """Norm of the gradients and step of the optimizer, on the share of weights that a device updates."""
        grid, stack = self.local.grid, self.local.stack
        replicas, expert_replicas = (grid.replicas, grid.replicas // grid.expert) if grid.zero else (1, 1)
        count = self.weights.dense / replicas + self.weights.routed / expert_replicas
        if not count:
            return 0.0
        touched = stack.gradient_bytes + 2.0 * (stack.optimizer_bytes + self.local.model.dtype_bytes)
        step = self.prices.seconds(OptimizerStep(parameters=ceil(count), bytes_per_parameter=touched))
        return step + (self.prices.seconds(Pointwise(bytes=count * stack.gradient_bytes)) if stack.clipped else 0.0)

    # Memory

    @cached_property
    def weights(self) -> Weights:
        """Parameters of this stage on one device."""
        layer = self._layer_weights
        return Weights(self.layers * layer.dense + sum(self._end_parameters), self.layers * layer.routed)

    @cached_property
    def static_parts(self) -> Parts:
        """Bytes that are held all the time, by name."""
        grid, layer = self.local.grid, self._layer_weights
        recipe = Recipe(self.local.model.dtype_bytes, self.local.stack.gradient_bytes, self.local.stack.optimizer_bytes)
        dense = model_state_bytes(self.weights.dense, recipe, zero=grid.zero, ranks=grid.replicas)
        routed = model_state_bytes(self.weights.routed, recipe, zero=grid.zero, ranks=grid.replicas // grid.expert)
        states = tuple((name, held + more) for (name, held), (_, more) in zip(dense, routed, strict=True))
        buffers = gathered_bytes(layer.dense + layer.routed, recipe) if grid.zero == 3 and self.layers else 0.0
        return static_parts(
            states, Overheads(communication_bytes=buffers, context_bytes=self.local.stack.overhead_bytes)
        )

    @property
    def saved_bytes(self) -> float:
        """Activations of one micro-batch between its forward and its backward."""
        saved = self.layers * self._layer_bytes
        saved += activations.embedding_bytes(self.local) if self.first else 0.0
        return saved + (activations.head_bytes(self.local) if self.last else 0.0)

    @property
    def weight_saved_bytes(self) -> float:
        """What of them stays between the two halves of a split backward."""
        kept = self.layers * min(activations.weight_gradient_bytes(self.local), self._layer_bytes)
        return kept + (activations.head_weight_gradient_bytes(self.local) if self.last else 0.0)

    @property
    def transient_bytes(self) -> float:
        """What the recomputation of one layer brings back for its backward."""
        if not self.layers:
            return 0.0
        return activations.layer_bytes(self.local, kept="none") - self._layer_bytes

    def costs(self, devices: Sequence[int], *, split: bool) -> StageCosts:
        """What the simulator wants to know; with ``split``, the halves of the backward too."""
        return StageCosts(
            devices=tuple(devices),
            forward_seconds=self.forward.seconds,
            backward_seconds=self.backward.seconds,
            input_seconds=self.input_gradient.seconds if split else None,
            weight_seconds=self.weight_gradient.seconds if split else None,
            reduce_seconds=self.reduce_seconds,
            update_seconds=self.update_seconds,
            gather_seconds=self.gather_seconds,
            static_bytes=total(self.static_parts),
            static_parts=self.static_parts,
            saved_bytes=self.saved_bytes,
            weight_saved_bytes=self.weight_saved_bytes if split else None,
            transient_bytes=self.transient_bytes,
        )

    @property
    def _layer_bytes(self) -> float:
        """What one layer keeps; where operators are recomputed one by one, in the mean of the stage."""
        if self.part is None:
            return activations.layer_bytes(self.local)
        full, selective, none = (
            activations.layer_bytes(self.local, kept=policy) for policy in ("full", "selective", "none")
        )
        rest = (selective - full) * (1.0 - self.part.rest_share)
        return full + rest + (none - selective) * (1.0 - self.part.core_share)

    # What both are made of

    @cached_property
    def _layer(self) -> tuple[Piece, ...]:
        """A layer, or all that the stage holds of them where it begins or ends inside one."""
        return layer_pieces(self.local) if self.part is None else self.part.pieces

    @cached_property
    def _layer_backward(self) -> Operations:
        return joined(self._again, self._whole(self._layer))

    @cached_property
    def _again(self) -> Operations:
        """What the backward computes again."""
        if self.part is not None:
            return forward(self.part.again)
        return recomputed(self._layer, self.local.grid.recompute)

    @property
    def _repeats(self) -> int:
        """Times that ``_layer`` is played."""
        return int(self.layers) if self.part is None else 1

    @cached_property
    def _ends(self) -> tuple[tuple[Piece, ...], ...]:
        """The pieces of embedding and head, where this stage has them."""
        embedding = (embedding_pieces(self.local),) if self.first else ()
        return (*embedding, *((head_pieces(self.local),) if self.last else ()))

    @property
    def _layer_weights(self) -> Weights:
        model, grid = self.local.model, self.local.grid
        return Weights(model.dense_parameters / grid.tensor, model.routed_parameters / (grid.tensor * grid.expert))

    @property
    def _end_parameters(self) -> tuple[float, float]:
        """Parameters of embedding and head; a head on a stage of its own holds a copy of a tied embedding."""
        model, tensor = self.local.model, self.local.grid.tensor
        copied = model.vocabulary * model.hidden if model.tied and not self.first else 0
        return (
            model.embedding_parameters / tensor if self.first else 0.0,
            (model.head_parameters + copied) / tensor if self.last else 0.0,
        )

    def _whole(self, pieces: Sequence[Piece]) -> Operations:
        return backward(pieces, overlapped=self.local.stack.overlapped_tensor)

    def _played(
        self, layer: Operations, ends: Callable[[Sequence[Piece]], Operations], scatters: Sequence[Collective] = ()
    ) -> Played:
        """An instruction: the program's dispatch, embedding and head, all layers.

        Under ZeRO 3 weights are gathered before use: those of layers ahead, those of embedding and head at once.
        """
        program = self.local.stack.program_seconds
        whole = Played(self.prices.device.dispatch_seconds.value if program is None else program)
        for pieces in self._ends:
            whole += self._play(ends(pieces))
        if self.local.grid.zero != 3:
            return whole + (self._play(layer, repeat=self._repeats) if self.layers else Played())
        size = self.local.model.dtype_bytes
        root = self._over_replicas(Weights(sum(self._end_parameters)), size, "all_gather")
        if scatters:
            sent = self.local.stack.sent_gradient_bytes
            root += self._over_replicas(Weights(sum(self._end_parameters)), sent, "reduce_scatter")
        alone = self._seconds(root)
        gathers = self._over_replicas(self._layer_weights, size, "all_gather")
        layers = layered(layer, self._repeats, gathers=gathers, scatters=scatters)
        return whole + Played(alone, alone) + self._play(layers)

    def _play(self, operations: Operations, repeat: int = 1) -> Played:
        if not operations:
            return Played()
        dispatch = Dispatch(operation_seconds=self.local.stack.operation_seconds)
        run = run_operations(operations, self.prices.seconds, dispatch, self.prices.rates, repeat=repeat)
        return Played(run.seconds, run.exposed_communication_seconds)

    def _gradient_sums(self, kind: CollectiveKind) -> tuple[Collective, ...]:
        """The sum of the gradients of what is played at once: a layer, or a part."""
        layer, lap = self._layer_weights, self.part.layers if self.part else 1
        weights = Weights(lap * layer.dense, lap * layer.routed)
        return self._over_replicas(weights, self.local.stack.sent_gradient_bytes, kind)

    def _over_replicas(self, weights: Weights, bytes_each: float, kind: CollectiveKind) -> tuple[Collective, ...]:
        """Collectives of weights among those that hold the same ones."""
        grid = self.local.grid
        groups = (
            ("replicas", grid.replicas, weights.dense),
            ("expert replicas", grid.replicas // grid.expert, weights.routed),
        )
        return tuple(
            Collective(kind=kind, message_bytes=count * bytes_each, ranks=ranks, axis=axis)
            for axis, ranks, count in groups
            if ranks > 1 and count
        )

    def _seconds(self, collectives: Sequence[Collective]) -> float:
        return sum(self.prices.seconds(collective) for collective in collectives)
