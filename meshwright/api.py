"""The Python face of Meshwright: plan, predict, build. Reached as ``meshwright.find_plan`` and so on."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from meshwright.calibrate.hardware import Cluster, parse_cluster
from meshwright.errors import ModelError
from meshwright.execute.process_group import ProcessGroup
from meshwright.execute.train import Trainer
from meshwright.execute.train import build as build_trainer
from meshwright.models.base import Model
from meshwright.plan.graph import ModelGraph
from meshwright.plan.planfile import Plan
from meshwright.plan.request import MEMORY_MARGIN
from meshwright.plan.schedule_rules import RUNNABLE
from meshwright.plan.search import Fix, Progress, Request, search
from meshwright.plan.space import Memory
from meshwright.plan.trace.model import trace

PyTree = Any
LossFunction = Callable[[PyTree, PyTree], Any]


def cluster(spec: str) -> Cluster:
    """A cluster by name and count (``dgx-h100:2``), a sum of them, or a machine file. Errors: ClusterError."""
    return parse_cluster(spec)


def model_of(
    loss_fn: LossFunction, params: PyTree, batch: PyTree, has_aux: bool = False, name: str | None = None
) -> Model:
    """A ``Model`` from a loss function, its parameters and one whole batch; arrays or ``ShapeDtypeStruct`` alike.

    Dim 0 of every leaf of the batch counts samples, and the loss is their mean; for anything else make a ``Model``.
    Errors: ModelError if the batch's leaves differ in dim 0.
    """
    shapes = jax.tree.map(_shape, batch)
    _batch_size(shapes)

    def batch_fn(size: int) -> PyTree:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype), shapes)

    def init_fn(key: Any) -> PyTree:
        del key  # the parameters are given
        return jax.tree.map(_start, params)

    label = name or f"{loss_fn.__module__}:{getattr(loss_fn, '__qualname__', type(loss_fn).__name__)}"
    return Model(label, loss_fn, init_fn, batch_fn, has_aux=has_aux)


def find_plan(
    loss_fn: LossFunction | Model,
    params: PyTree = None,
    batch: PyTree = None,
    *,
    cluster: Cluster | str,
    optimizer: Any = None,
    batch_size: int | None = None,
    has_aux: bool = False,
    fix: Fix | None = None,
    progress: Progress | None = None,
    schedules: Sequence[str] = RUNNABLE,
    memory_margin: float = MEMORY_MARGIN,
    time_limit_seconds: float | None = None,
) -> Plan:
    """The fastest plan for one optimizer step on ``batch``.

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar`` (or ``(scalar, aux)``), the mean over the batch; or a ``Model``,
            for which ``batch_size`` takes the place of ``params`` and ``batch``.
        optimizer: optax; its state counts in memory. AdamW's two moments are assumed if it is not given.
        fix: what is not to be searched.
        schedules: those to search; by default those that ``build`` can run.
        memory_margin: share of each device's memory that the plan leaves free.
        time_limit_seconds: after which the best plan so far is given.
    Errors: ModelError, ClusterError, PlanError, each in one line.
    """
    if isinstance(loss_fn, Model):
        model = loss_fn
        if batch_size is None:
            raise ModelError("a Model needs batch_size=, the samples of one optimizer step")
    else:
        if params is None or batch is None:
            raise ModelError("a loss function needs params and batch; shapes (jax.ShapeDtypeStruct) will do")
        model = model_of(loss_fn, params, batch, has_aux)
        batch_size = _batch_size(batch)
    samples = batch_size
    hardware = parse_cluster(cluster) if isinstance(cluster, str) else cluster
    seen: list[ModelGraph] = []

    def graphs(microbatches: int) -> ModelGraph:
        seen.append(trace(model, samples, microbatches, like=seen[0] if seen else None).graph)
        return seen[-1]

    memory = Memory() if optimizer is None else optimizer_memory(optimizer, model)
    request = Request(
        hardware,
        samples,
        fix or Fix(),
        memory,
        schedules=tuple(schedules),
        memory_margin=memory_margin,
        time_limit_seconds=time_limit_seconds,
    )
    return search(graphs, request, progress)


def build(
    plan: Plan,
    loss_fn: LossFunction | Model,
    optimizer: Any,
    params: PyTree = None,
    batch: PyTree = None,
    *,
    has_aux: bool = False,
    group: ProcessGroup | None = None,
) -> Trainer:
    """The plan compiled for the devices here; every MPI rank calls it with its ``ProcessGroup``.

    A loss function wants ``params`` and ``batch`` as ``find_plan`` had them; ``trainer.init(key)`` then starts from
    these parameters if they are arrays.
    """
    model = loss_fn if isinstance(loss_fn, Model) else model_of(loss_fn, params, batch, has_aux)
    return build_trainer(plan, model, optimizer, group)


def optimizer_memory(optimizer: Any, model: Model) -> Memory:
    """Bytes of optimizer state per parameter element, and what an update moves: all state and weights both ways."""
    params = jax.eval_shape(model.init_fn, jax.random.key(0))
    state = jax.eval_shape(optimizer.init, params)
    elements = sum(leaf.size for leaf in jax.tree.leaves(params)) or 1
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    return Memory(held / elements, (2 * held + 3 * weights) / elements)


def _start(leaf: Any) -> jax.Array:
    """A given parameter as it is; zeros where only a shape was given."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.numpy.zeros(leaf.shape, leaf.dtype)
    return jax.numpy.asarray(leaf)


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jax.numpy.shape(leaf), jax.numpy.result_type(leaf))


def _batch_size(batch: PyTree) -> int:
    sizes = {jax.numpy.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or () in sizes:
        raise ModelError("the leaves of the batch differ in dim 0, which counts samples; make a Model to say otherwise")
    return int(sizes.pop()[0])
