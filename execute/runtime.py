"""The interpreter of a program: walks the same instructions that the simulator timed, on real arrays."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from meshwright.errors import ExecutionError
from meshwright.execute.exchange import Incoming, post_array, receive_array, send_array
from meshwright.execute.optimizer import StagewiseOptimizer
from meshwright.execute.programs import StagePrograms, sharding
from meshwright.execute.resharding import TensorLayout, Transfer, layout_of, plan_transfers
from meshwright.execute.split import NamedSpec, StageSplit
from meshwright.execute.transport.base import TagSpace, Transport
from meshwright.plan.graph import ModelGraph, Tensor
from meshwright.plan.planfile import Plan
from meshwright.simulate.program import (
    Backward,
    Forward,
    Instruction,
    Payload,
    Program,
    Receive,
    Reduce,
    Send,
    Update,
    word,
)
from meshwright.simulate.timeline import Event

Array = Any


@dataclass(slots=True)
class StageState:
    """What a stage keeps from step to step: its parameters by leaf, and its share of the optimizer state."""

    parameters: dict[int, Array]
    optimizer: list[Array]


@dataclass(frozen=True, slots=True)
class Route:
    """The transfer of one value between two stages, and its number in the step's tag space."""

    value: int
    number: int
    transfer: Transfer
    spec: NamedSpec  # at the target


Key = tuple[int, int, Payload]  # source stage, target stage, payload


def plan_routes(
    plan: Plan, graph: ModelGraph, splits: Sequence[StageSplit], ranks: Sequence[int]
) -> dict[Key, tuple[Route, ...]]:
    """Every array that crosses meshes in a step: which boxes go from which device to which."""

    def layout(stage: int, tensor: Tensor, spec: NamedSpec) -> TensorLayout:
        split = splits[stage]
        return layout_of(tensor.shape, tensor.dtype, spec, split.axes, split.planned.devices)

    wanted: list[tuple[Key, int, NamedSpec]] = []
    pairs = []
    for t in plan.transfers:
        key: Key = (t.source, t.target, t.what)
        for value in t.values:
            before, after = splits[t.source], splits[t.target]
            match t.what:
                case "activation":
                    tensor, out, into = graph.values[value], before.produced_specs[value], after.received_specs[value]
                case "cotangent":
                    tensor, out, into = graph.values[value], before.received_specs[value], after.produced_specs[value]
                case _:
                    tensor = graph.parameters[value].tensor
                    out, into = before.parameter_specs[value], after.parameter_specs[value]
            wanted.append((key, value, into))
            pairs.append((layout(t.source, tensor, out), layout(t.target, tensor, into)))
    transfers = plan_transfers(pairs, ranks)
    routes: dict[Key, list[Route]] = {}
    for number, ((key, value, into), transfer) in enumerate(zip(wanted, transfers, strict=True)):
        routes.setdefault(key, []).append(Route(value, number, transfer, into))
    return {key: tuple(found) for key, found in routes.items()}


@dataclass(slots=True)
class Runtime:
    """Runs the rows of the meshes that this process has devices of; one row under MPI, all of them on fake devices."""

    plan: Plan
    graph: ModelGraph
    program: Program
    splits: Sequence[StageSplit]
    programs: Mapping[int, StagePrograms]  # stage -> its programs, for the stages here
    meshes: Mapping[int, Mesh]
    updates: Mapping[int, Any]  # stage -> compiled optimizer update
    optimizer: StagewiseOptimizer
    routes: Mapping[Key, tuple[Route, ...]]
    transport: Transport
    tags: TagSpace
    devices: Mapping[int, jax.Device]
    clock: Callable[[], float] = time.perf_counter  # of the events
    events: list[Event] = field(default_factory=list)
    peak_bytes: dict[int, float] = field(default_factory=dict)  # of the last measured step: stage -> bytes a device
    readers: dict[tuple[int, Payload], tuple[int, ...]] = field(init=False)  # (source, payload) -> target stages

    def __post_init__(self) -> None:
        self.readers = {}
        for source, target, payload in self.routes:
            self.readers[source, payload] = (*self.readers.get((source, payload), ()), target)

    def run_step(
        self, states: Mapping[int, StageState], batch: Sequence[np.ndarray[Any, Any]], measure: bool = False
    ) -> tuple[dict[int, list[Array]], dict[int, StageState]]:
        """One optimizer step; returns {value: one array per micro-batch} of loss and aux, and the new states.

        ``measure`` waits for each instruction and notes when it ran (``events``) and how many bytes each stage then
        held on a device (``peak_bytes``): arrays alive, plus what XLA says the program needs while it runs.
        """
        self.events.clear()
        self.peak_bytes.clear()
        step = _Step(self, states, batch, measure)
        rows = [
            (mesh, deque(row)) for mesh, row in enumerate(self.program) if any(i.stage in self.programs for i in row)
        ]
        for _, row in rows:
            step.post_next(row)
        while any(row for _, row in rows):
            moved = False
            for mesh, row in rows:
                while row and step.ready(row[0], alone=len(rows) == 1):
                    step.execute(mesh, row.popleft(), row)
                    moved = True
            if not moved:
                waits = ", ".join(str(row[0]) for _, row in rows if row)
                raise ExecutionError(f"the program deadlocks: {waits}")
        self.transport.finish()
        return step.outputs, step.states


class _Step:
    """The buffers of one step."""

    def __init__(
        self, runtime: Runtime, states: Mapping[int, StageState], batch: Sequence[np.ndarray[Any, Any]], measure: bool
    ) -> None:
        self.r, self.before, self.batch, self.measure = runtime, states, batch, measure
        self.states = {s: StageState(dict(state.parameters), list(state.optimizer)) for s, state in states.items()}
        self.samples: dict[tuple[int, int], list[Array]] = {}
        # (stage, micro-batch) -> value, and for cotangents also the stage it came from -> array
        self.activations: dict[tuple[int, int], dict[int, Array]] = {}
        self.cotangents: dict[tuple[int, int], dict[tuple[int, int], Array]] = {}
        self.kept: dict[tuple[int, int], list[Array]] = {}
        self.produced: dict[tuple[int, Payload, int], dict[int, Array]] = {}
        self.accumulators = {s: list(programs.zeros()) for s, programs in runtime.programs.items()}
        self.gradients: dict[int, dict[int, Array]] = {}
        self.outputs: dict[int, list[Array]] = {}
        self.incoming: dict[Receive, list[tuple[Route, Incoming]]] = {}
        self.sent: set[tuple[int, int, str, int]] = set()
        self.unsent: dict[tuple[int, Payload, int], set[int]] = {}
        self.begun = runtime.clock()

    # -- order ------------------------------------------------------------------------------------------------------

    def ready(self, step: Instruction, alone: bool) -> bool:
        """A lone row just waits; several rows in one process must not wait for each other."""
        if alone or not isinstance(step, Receive):
            return True
        return (step.source, step.stage, step.what, step.microbatch) in self.sent

    def post_next(self, row: deque[Instruction]) -> None:
        """Post the next receive of the row, so that its bytes may move while something else runs."""
        for step in row:
            if isinstance(step, Receive):
                if step not in self.incoming:
                    self.incoming[step] = [
                        (
                            route,
                            post_array(
                                self.r.transport, route.transfer, self._tag(route, step.microbatch), self.r.devices
                            ),
                        )
                        for route in self.r.routes[step.source, step.stage, step.what]
                    ]
                return

    def _tag(self, route: Route, microbatch: int) -> int:
        return self.r.tags.first_tag(route.number, microbatch)

    # -- instructions -----------------------------------------------------------------------------------------------

    def execute(self, mesh: int, step: Instruction, rest: deque[Instruction]) -> None:
        before = self._bytes_held(step.stage) if self.measure else 0.0
        start = self.r.clock()
        match step:
            case Forward(stage, m):
                made = self._forward(stage, m)
            case Backward(stage, m):
                made = self._backward(stage, m)
            case Send():
                made = None
                self._send(step)
            case Receive():
                made = self._receive(step)
                self.post_next(rest)
            case Reduce(stage):
                made = self._reduce(stage)
            case Update(stage):
                made = self._update(stage)
            case _:
                raise ExecutionError(
                    f"the executor cannot run {word(step)}; plan with a schedule that is searched by default"
                )
        self.r.transport.poll()
        if self.measure:
            jax.block_until_ready(made)
            self.r.events.append(Event(mesh, step, start - self.begun, self.r.clock() - self.begun))
            # While it runs, a program's operands are held as well as its results; many results take an operand's place.
            held = max(before, self._bytes_held(step.stage)) + self._working_bytes(step)
            self.r.peak_bytes[step.stage] = max(held, self.r.peak_bytes.get(step.stage, 0.0))

    def _bytes_held(self, stage: int) -> float:
        """Bytes of the arrays of a stage that are alive, on each of its devices here."""
        state = self.states[stage]
        groups: list[Iterable[Array]] = [state.parameters.values(), state.optimizer, self.accumulators.get(stage, ())]
        # Old weights are not donated to the update, so they live on beside the new ones until the step returns.
        groups += [self.before[stage].parameters.values(), self.gradients.get(stage, {}).values()]
        groups += [arrays for (s, _), arrays in (*self.kept.items(), *self.samples.items()) if s == stage]
        groups += [arrays.values() for (s, _), arrays in self.activations.items() if s == stage]
        groups += [arrays.values() for (s, _), arrays in self.cotangents.items() if s == stage]
        groups += [arrays.values() for key, arrays in self.produced.items() if key[0] == stage]
        alive = {id(array): array for group in groups for array in group}
        shards = [shard.data.nbytes for array in alive.values() for shard in array.addressable_shards]
        here = sum(device in self.r.devices for device in self.r.splits[stage].planned.devices)
        return float(sum(shards)) / max(here, 1)

    def _working_bytes(self, step: Instruction) -> float:
        programs = self.r.programs[step.stage]
        return {
            Forward: programs.forward_temp_bytes,
            Backward: programs.backward_temp_bytes,
            Reduce: programs.reduce_temp_bytes,
        }.get(type(step), 0.0)

    def _samples(self, stage: int, m: int) -> list[Array]:
        if (stage, m) not in self.samples:
            split, graph = self.r.splits[stage], self.r.graph
            size = graph.microbatch_size
            arrays = []
            for leaf in split.batch:
                part = self.batch[leaf][m * size : (m + 1) * size]
                place = sharding(self.r.meshes[stage], split.batch_specs[leaf])
                arrays.append(jax.make_array_from_callback(part.shape, place, part.__getitem__))
            self.samples[stage, m] = arrays
        return self.samples[stage, m]

    def _weights(self, stage: int) -> list[Array]:
        return [self.states[stage].parameters[leaf] for leaf in self.r.splits[stage].parameters]

    def _received(self, stage: int, m: int) -> list[Array]:
        arrays = self.activations.get((stage, m), {})
        return [arrays[value] for value in self.r.splits[stage].received]

    def _forward(self, stage: int, m: int) -> Any:
        split, programs = self.r.splits[stage], self.r.programs[stage]
        sent, kept, outputs = programs.forward(self._weights(stage), self._samples(stage, m), self._received(stage, m))
        self.kept[stage, m] = kept
        self._hand_out(stage, "activation", m, dict(zip(split.sent, sent, strict=True)))
        for value, array in zip(programs.outputs, outputs, strict=True):
            self.outputs.setdefault(value, []).append(array)
        return sent, kept, outputs

    def _backward(self, stage: int, m: int) -> Any:
        split, programs = self.r.splits[stage], self.r.programs[stage]
        arrived = self.cotangents.pop((stage, m), {})
        cotangents = [arrived[key] for key in split.cotangents_in]
        totals, returned = programs.backward(
            self._weights(stage),
            self._samples(stage, m),
            self._received(stage, m),
            self.kept.pop((stage, m)),
            cotangents,
            self.accumulators[stage],
        )
        self.accumulators[stage] = totals
        self._hand_out(stage, "cotangent", m, dict(zip(split.cotangents_out, returned, strict=True)))
        self.samples.pop((stage, m), None)
        self.activations.pop((stage, m), None)
        return totals, returned

    def _hand_out(self, stage: int, what: Payload, m: int, arrays: dict[int, Array]) -> None:
        """Keep what was made until it has been sent to every stage that reads it."""
        targets = self.r.readers.get((stage, what))
        if targets:
            self.produced[stage, what, m] = arrays
            self.unsent[stage, what, m] = set(targets)

    def _send(self, step: Send) -> None:
        for route in self.r.routes[step.stage, step.target, step.what]:
            if step.what == "gradient":
                array = self.gradients[step.stage][route.value]
            elif step.what == "parameter":
                array = self.states[step.stage].parameters[route.value]
            else:
                array = self.produced[step.stage, step.what, step.microbatch][route.value]
            send_array(self.r.transport, route.transfer, array, self._tag(route, step.microbatch), self.r.devices)
        key = (step.stage, step.what, step.microbatch)
        if key in self.unsent:
            self.unsent[key].discard(step.target)
            if not self.unsent[key]:
                del self.unsent[key], self.produced[key]
        self.sent.add((step.stage, step.target, step.what, step.microbatch))

    def _receive(self, step: Receive) -> Any:
        if step not in self.incoming:
            raise ExecutionError(f"{step} was never posted")
        arrays = {}
        for route, incoming in self.incoming.pop(step):
            place = sharding(self.r.meshes[step.stage], route.spec)
            arrays[route.value] = receive_array(self.r.transport, incoming, place, self.r.devices)
        if step.what == "parameter":
            self.states[step.stage].parameters.update(arrays)
        elif step.what == "gradient":
            mine = self.gradients[step.stage]
            for leaf, array in arrays.items():
                mine[leaf] = mine[leaf] + array
        elif step.what == "activation":
            self.activations.setdefault((step.stage, step.microbatch), {}).update(arrays)
        else:
            from_there = self.cotangents.setdefault((step.stage, step.microbatch), {})
            from_there.update({(value, step.source): array for value, array in arrays.items()})
        return arrays

    def _reduce(self, stage: int) -> Any:
        with_gradient = {key.leaf for key in self.r.splits[stage].gradients}
        leaves = [leaf for leaf in self.r.splits[stage].parameters if leaf in with_gradient]
        gradients = self.r.programs[stage].reduce(*self.accumulators.pop(stage))
        self.gradients[stage] = dict(zip(leaves, gradients, strict=True))
        return gradients

    def _update(self, stage: int) -> Any:
        state, owned = self.states[stage], self.r.optimizer.owned(stage)
        weights = [state.parameters[leaf] for leaf in owned]
        new, kept = self.r.updates[stage]([self.gradients[stage][leaf] for leaf in owned], state.optimizer, weights)
        state.parameters.update(zip(owned, new, strict=True))
        state.optimizer = kept
        return new, kept
