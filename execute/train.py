"""A plan as a trainer: stages compiled for the devices at hand, state made where it lives, steps with their loss."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from meshwright.errors import ExecutionError
from meshwright.execute.optimizer import StagewiseOptimizer
from meshwright.execute.process_group import ProcessGroup
from meshwright.execute.programs import build_stage, sharding
from meshwright.execute.runtime import Runtime, StageState, plan_routes
from meshwright.execute.split import StageSplit, owners, split_plan
from meshwright.execute.transport.base import TagSpace, Transport
from meshwright.execute.transport.local import LocalTransport
from meshwright.models.base import Model
from meshwright.plan.planfile import Plan, plan_json
from meshwright.plan.predict import program_of
from meshwright.plan.schedule_rules import RUNNABLE
from meshwright.plan.trace.model import Trace, trace
from meshwright.plan.trace.parts import join_parts
from meshwright.simulate.timeline import Timeline

PyTree = Any
State = dict[int, StageState]


@dataclass(frozen=True, slots=True)
class Metrics:
    """One step: the mean (or summed) loss of its micro-batches, where it is known, and its wall time."""

    step: int
    loss: float
    step_seconds: float


@dataclass(slots=True)
class Trainer:
    """Runs a plan. In one process it drives all devices itself; under MPI each rank drives its own."""

    plan: Plan
    trace: Trace
    runtime: Runtime
    splits: tuple[StageSplit, ...]
    optimizer: StagewiseOptimizer
    group: ProcessGroup | None
    steps_done: int = 0

    @property
    def model(self) -> Model:
        return self.trace.model

    def init(self, key: jax.Array) -> State:
        """First parameters and optimizer state, made where they live; values are those of ``model.init_fn(key)``."""
        typed = jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key)
        # The words of the key: a key itself cannot be placed on devices of other processes.
        words = np.asarray(jax.random.key_data(key))
        states: State = {}
        for stage in self.runtime.programs:
            split, mesh = self.splits[stage], self.runtime.meshes[stage]
            places = [sharding(mesh, split.parameter_specs[leaf]) for leaf in split.parameters]

            def make(words: jax.Array, leaves: tuple[int, ...] = split.parameters) -> list[Any]:
                own_key = jax.random.wrap_key_data(words, impl=jax.random.key_impl(key)) if typed else words
                every = jax.tree.leaves(self.model.init_fn(own_key))
                return [self.trace.parts[leaf].of(every) for leaf in leaves]

            everywhere = NamedSharding(mesh, PartitionSpec())
            placed = jax.make_array_from_callback(words.shape, everywhere, words.__getitem__)
            arrays = jax.jit(make, out_shardings=places)(placed)
            weights = dict(zip(split.parameters, arrays, strict=True))
            owned = self.optimizer.owned(stage)
            begin = jax.jit(
                lambda w, stage=stage: self.optimizer.init(stage, w), out_shardings=self._state_places(stage)
            )
            states[stage] = StageState(weights, begin([weights[leaf] for leaf in owned]))
        return states

    def _state_places(self, stage: int) -> list[NamedSharding]:
        return state_places(self.optimizer, self.splits[stage], self.runtime.meshes[stage])

    def step(self, state: State, batch: PyTree, measure: bool = False) -> tuple[State, Metrics]:
        """One optimizer step on a whole batch of host arrays; every rank passes the same batch.

        Returns the new state (the old one must not be used again) and the metrics, with the loss on every rank.
        """
        start = time.perf_counter()
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(batch)]
        wants = self.runtime.graph.batch
        if len(leaves) != len(wants):
            names = ", ".join(leaf.name for leaf in wants)
            raise ExecutionError(f"the batch has {len(leaves)} leaves; the model wants {len(wants)}: {names}")
        for leaf, planned in zip(leaves, wants, strict=True):
            wanted = (self.plan.batch, *planned.tensor.shape[1:])
            if leaf.shape != wanted:
                raise ExecutionError(f"batch leaf {planned.name!r} has shape {leaf.shape}; the plan is for {wanted}")
        outputs, states = self.runtime.run_step(state, leaves, measure)
        losses = [
            float(np.asarray(array.addressable_shards[0].data)) for array in outputs.get(self.runtime.graph.loss, [])
        ]
        local = sum(losses) if losses else None
        if local is not None and self.model.loss_reduction == "mean":
            local /= len(losses)
        loss = self._share(local)
        jax.block_until_ready([list(s.parameters.values()) for s in states.values()])
        self.steps_done += 1
        return states, Metrics(self.steps_done, loss, time.perf_counter() - start)

    def _share(self, value: float | None) -> float:
        if self.group is None:
            if value is None:
                raise ExecutionError("no stage made a loss; please report this with the plan file")
            return value
        found = [v for v in self.group.communicator.allgather(value) if v is not None]
        return float(found[0])

    def parameters(self, state: State) -> PyTree:
        """The whole parameter tree as host arrays; in one process only (a checkpoint is the way under MPI)."""
        if self.group is not None and self.group.size > 1:
            raise ExecutionError("parameters live on several ranks; gather them from a run in one process")
        owner = owners(self.splits)
        leaves = [np.asarray(state[owner[leaf]].parameters[leaf]) for leaf in range(len(self.runtime.graph.parameters))]
        return jax.tree.unflatten(self.trace.parameter_tree, join_parts(self.trace.parts, leaves))

    @property
    def timeline(self) -> Timeline:
        """The last measured step as this process saw it."""
        return Timeline(tuple(stage.devices for stage in self.plan.stages), tuple(self.runtime.events))


def state_places(optimizer: StagewiseOptimizer, split: StageSplit, mesh: Mesh) -> list[NamedSharding]:
    """Where a stage's optimizer state lies: like its parameter, or whole on every device."""
    places = []
    for state in optimizer.states(split.index):
        leaf = optimizer.parameter_of_state(state)
        spec = split.parameter_specs[leaf] if leaf is not None else ()
        places.append(sharding(mesh, spec))
    return places


def build(plan: Plan, model: Model, optimizer: Any, group: ProcessGroup | None = None) -> Trainer:
    """Compile the plan's stages for the devices of this process (all of JAX's devices, or this rank's under MPI).

    Errors: ExecutionError if there are too few devices; PlanError if the plan is for another model, or the optimizer
    couples parameters of several stages.
    """
    traced = trace(model, plan.batch, plan.microbatches)
    splits = split_plan(plan, traced.graph)
    every: Sequence[jax.Device]
    ranks: Sequence[int]
    if group is None:
        every = jax.devices()
        ranks = [0] * plan.devices
        devices = dict(enumerate(every[: plan.devices]))
        transport: Transport = LocalTransport()
    else:
        group.allgather_equal(plan_json(plan).decode(), "the plan")
        group.allgather_equal(traced.graph.fingerprint, "the model")
        spans = any(len({group.device_ranks[d] for d in stage.devices}) > 1 for stage in plan.stages)
        devices = group.local_devices()
        if group.distributed or spans:
            every = group.global_devices()
        else:
            every = [devices.get(d, next(iter(devices.values()))) for d in range(group.size * group.devices_per_rank)]
        ranks = group.device_ranks
        from meshwright.execute.transport.mpi import MpiTransport

        transport = MpiTransport(group.communicator)
    if plan.schedule not in RUNNABLE:
        raise ExecutionError(
            f"schedule {plan.schedule} can be planned but not executed yet; plan with --schedules {','.join(RUNNABLE)}"
        )
    if plan.devices > len(every):
        raise ExecutionError(f"the plan wants {plan.devices} devices and there are {len(every)}; start more ranks")
    tree_owners = owners(splits)
    cut = StagewiseOptimizer(optimizer, traced.parameter_tree, traced.user_parameters, tree_owners, traced.parts)
    routes = plan_routes(plan, traced.graph, splits, list(ranks))
    tiles = max((len(route.transfer.tiles) for found in routes.values() for route in found), default=1)
    tags = TagSpace(sum(map(len, routes.values())) or 1, max(tiles, 1), transport.tag_upper_bound)

    meshes: dict[int, Mesh] = {}
    programs = {}
    updates: dict[int, Callable[..., Any]] = {}
    for split in splits:
        stage = split.planned
        if not any(d in devices for d in stage.devices):
            continue
        box = np.array([every[d] for d in stage.devices]).reshape(tuple(stage.mesh.values()))
        mesh = Mesh(box, tuple(stage.mesh), axis_types=(AxisType.Auto,) * len(stage.mesh))
        meshes[split.index] = mesh
        programs[split.index] = build_stage(split, traced, mesh, plan.microbatches, plan.recomputes(split.index))
        updates[split.index] = _compiled_update(cut, split, mesh)
    program = program_of(plan.schedule, plan.microbatches, len(plan.stages), plan.transfers, plan.tied)
    runtime = Runtime(
        plan, traced.graph, program, splits, programs, meshes, updates, cut, routes, transport, tags, devices
    )
    return Trainer(plan, traced, runtime, splits, cut, group)


def _compiled_update(optimizer: StagewiseOptimizer, split: StageSplit, mesh: Mesh) -> Callable[..., Any]:
    weights = [sharding(mesh, split.parameter_specs[leaf]) for leaf in optimizer.owned(split.index)]
    state = state_places(optimizer, split, mesh)

    def update(gradients: Any, old: Any, values: Any) -> Any:
        return optimizer.update(split.index, gradients, old, values)

    # Old parameters are not donated: a transfer of a tied weight may still be reading them.
    return jax.jit(update, in_shardings=(weights, state, weights), out_shardings=(weights, state), donate_argnums=(1,))


def merge_timelines(parts: Sequence[Timeline], devices: tuple[tuple[int, ...], ...]) -> Timeline:
    """The rows that different ranks measured as one timeline; of several ranks of a mesh the slowest tells."""
    rows: dict[int, Timeline] = {}
    for part in parts:
        for mesh in {event.mesh for event in part.events}:
            if mesh not in rows or part.makespan_seconds > rows[mesh].makespan_seconds:
                rows[mesh] = part
    events = [event for mesh, part in rows.items() for event in part.events if event.mesh == mesh]
    return Timeline(devices, tuple(sorted(events, key=lambda e: (e.start_seconds, e.mesh))))
