"""The part of an exported JAX file that is the same for every plan.

Nothing imports this module: ``meshwright.plan.export.jax`` puts its text under the tables of a plan, in place of the
tables of one device that stand here so that it can be checked like any other file.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# --- tables
BATCH, MICROBATCHES = 1, 1
LOSS_IS_MEAN = True
LOSS_STAGE = 0
STAGES: list[dict[str, Any]] = [
    {"devices": [0], "mesh": {"data": 1}, "layers": (0, 1), "recompute": False, "from": []},
]
WARMUP: list[int] | None = [0]
ROWS: list[str] = []
ENTERS: list[list[tuple[str, ...]]] = [[(), ()]]
STACKED: dict[str, int] = {}
PARAMETERS: dict[str, dict[int, P]] = {}
KEPT: dict[str, dict[int, P]] = {}
BATCH_LEAVES: dict[str, dict[int, P]] = {}
# --- end of tables

Tree = Any
Named = dict[str, jax.Array]
StageFunction = Callable[[Named, Tree, dict[int, Tree]], Any]


def mesh(stage: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a stage, of the devices given (default: all that JAX sees)."""
    every = list(jax.devices() if devices is None else devices)
    if max(d for s in STAGES for d in s["devices"]) >= len(every):
        raise ValueError(f"the plan names device {max(d for s in STAGES for d in s['devices'])}; {len(every)} are here")
    sizes: dict[str, int] = STAGES[stage]["mesh"]
    box = np.array([every[d] for d in STAGES[stage]["devices"]]).reshape(tuple(sizes.values()))
    return Mesh(box, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def names(tree: Tree) -> list[str]:
    """The leaves' names, as the tables have them."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]


def rows(params: Tree) -> Named:
    """The parameters by name; leaves that stack layers as one row a layer, ``name[row]``."""
    found: Named = {}
    for name, x in zip(names(params), jax.tree.leaves(params), strict=True):
        if name in STACKED:
            found |= {f"{name}[{i}]": jnp.take(x, i, axis=STACKED[name]) for i in range(x.shape[STACKED[name]])}
        else:
            found[name] = x
    return found


def kept_spec(name: str, stage: int) -> P:
    """How gradient and optimizer state of a parameter lie: as it does, or split further (ZeRO)."""
    return KEPT.get(name, {}).get(stage, PARAMETERS[name][stage])


def parameter_shardings(
    params: Tree, stage: int = 0, devices: Sequence[jax.Device] | None = None, *, kept: bool = False
) -> Tree:
    """A sharding for each parameter, or for its gradient and optimizer state if ``kept``; None where a stage has none.

    A leaf that stacks layers lies as its first row of the stage does.
    """
    where = mesh(stage, devices)

    def place(name: str) -> NamedSharding | None:
        of_stage = [n for n in PARAMETERS if n == name or n.startswith(f"{name}[")]
        first = next((n for n in of_stage if stage in PARAMETERS[n]), None)
        if first is None:
            return None
        spec = kept_spec(first, stage) if kept else PARAMETERS[first][stage]
        if name not in STACKED:
            return NamedSharding(where, spec)
        at = STACKED[name]
        return NamedSharding(where, P(*spec[:at], None, *spec[at:]))

    return jax.tree.unflatten(jax.tree.structure(params), [place(name) for name in names(params)])


def own_parameters(params: Tree, stage: int, devices: Sequence[jax.Device] | None = None) -> Named:
    """The parameters that a stage reads, by name, on its mesh."""
    where = mesh(stage, devices)
    own = {name: x for name, x in rows(params).items() if stage in PARAMETERS.get(name, {})}
    return {name: jax.device_put(x, NamedSharding(where, PARAMETERS[name][stage])) for name, x in own.items()}


def microbatches(batch: Tree) -> Iterator[Tree]:
    """The batch in equal parts of dim 0."""
    each = BATCH // MICROBATCHES
    for start in range(0, BATCH, each):
        yield jax.tree.map(lambda x, at=start: x[at : at + each], batch)


def place_batch(piece: Tree, stage: int, devices: Sequence[jax.Device] | None = None) -> Tree:
    """A micro-batch on a stage's mesh; whole on every device where the plan says nothing of a leaf."""
    where = mesh(stage, devices)
    specs = [BATCH_LEAVES.get(name, {}).get(stage, P()) for name in names(piece)]
    leaves = [jax.device_put(x, NamedSharding(where, s)) for x, s in zip(jax.tree.leaves(piece), specs, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(piece), leaves)


def between(x: jax.Array, axes: tuple[str, ...], where: Mesh) -> NamedSharding:
    """How a value between layers lies: dim 0 split over the axes, or whole where they do not divide it."""
    parts = int(np.prod([where.shape[a] for a in axes], dtype=int))
    split = bool(axes) and x.ndim > 0 and x.shape[0] % parts == 0
    return NamedSharding(where, P(axes) if split else P())


def pin(x: jax.Array, layer: int) -> jax.Array:
    """For use inside a model: the value that enters a layer, laid out as planned."""
    stage = next(s for s, row in enumerate(STAGES) if row["layers"][0] <= layer < row["layers"][1])
    axes = ENTERS[stage][layer - STAGES[stage]["layers"][0]]
    pinned: jax.Array = jax.lax.with_sharding_constraint(x, between(x, axes, mesh(stage)))
    return pinned


def place_between(tree: Tree, stage: int, axes: tuple[str, ...], devices: Sequence[jax.Device] | None) -> Tree:
    """Values on the mesh of a stage."""
    where = mesh(stage, devices)
    return jax.tree.map(lambda x: jax.device_put(x, between(x, axes, where)), tree)


def value_and_grad(
    loss_fn: Callable[[Tree, Tree], Any], params: Tree, batch: Tree, devices: Sequence[jax.Device] | None = None
) -> tuple[jax.Array, Tree]:
    """Loss and gradients of one optimizer step of a plan of one stage, micro-batch by micro-batch."""
    if len(STAGES) > 1:
        raise ValueError(f"the plan has {len(STAGES)} stages: give pipeline_value_and_grad a function for each")
    kept = parameter_shardings(params, 0, devices, kept=True)

    def loss_of(weights: Tree, piece: Tree) -> Any:
        out = loss_fn(weights, piece)
        return out[0] if isinstance(out, tuple) else out

    @jax.jit
    def one(weights: Tree, piece: Tree) -> tuple[jax.Array, Tree]:
        loss, gradients = jax.value_and_grad(loss_of)(weights, piece)
        return loss, jax.lax.with_sharding_constraint(gradients, kept)

    weights = jax.device_put(params, parameter_shardings(params, 0, devices))
    total: Any = None
    for piece in microbatches(batch):
        total = _add(total, one(weights, place_batch(piece, 0, devices)))
    scale = 1.0 / MICROBATCHES if LOSS_IS_MEAN else 1.0
    loss, gradients = jax.tree.map(lambda x: x * jnp.asarray(scale, x.dtype), total)
    return loss, gradients


def pipeline_value_and_grad(
    functions: Sequence[StageFunction], params: Tree, batch: Tree, devices: Sequence[jax.Device] | None = None
) -> tuple[jax.Array, Tree]:
    """Loss and gradients of one optimizer step, by one function for each stage.

    ``functions[s](parameters by name, micro-batch, {stage: what it sent})`` gives ``{stage: what is sent to it}``; that
    of ``LOSS_STAGE`` gives the loss. Instructions are dispatched in the plan's order, so meshes work side by side.
    """
    count = range(len(STAGES))
    if len(functions) != len(STAGES):
        raise ValueError(f"the plan has {len(STAGES)} stages; {len(functions)} functions were given")
    weights = [own_parameters(params, s, devices) for s in count]
    programs = [_halves(functions[s], s, devices) for s in count]
    pieces = list(microbatches(batch))
    arrived: dict[tuple[str, int, int, int], Tree] = {}  # ("F" or "B", to stage, from stage, micro-batch)
    held: dict[tuple[int, int], Any] = {}
    sums: list[Any] = [None for _ in count]
    loss: Any = None
    for kind, s, m in order():
        forward, backward = programs[s]
        if kind == "F":
            received = {src: arrived.pop(("F", s, src, m)) for src in STAGES[s]["from"]}
            out, kept = forward(weights[s], place_batch(pieces[m], s, devices), received)
            held[s, m] = kept
            if s == LOSS_STAGE:
                loss = out if loss is None else loss + out
                continue
            for target, sent in out.items():
                arrived["F", target, s, m] = place_between(sent, target, ENTERS[target][0], devices)
        else:
            targets = [t for t in count if s in STAGES[t]["from"]]
            cotangent = {t: arrived.pop(("B", s, t, m)) for t in targets}
            gradients, back = backward(held.pop((s, m)), jnp.ones((), loss.dtype) if s == LOSS_STAGE else cotangent)
            sums[s] = _add(sums[s], gradients)
            for source, sent in back.items():
                arrived["B", source, s, m] = place_between(sent, source, ENTERS[source][-1], devices)
    scale = 1.0 / MICROBATCHES if LOSS_IS_MEAN else 1.0
    return loss * scale, _whole_gradients(params, sums, scale, devices)


def order() -> Iterator[tuple[str, int, int]]:
    """Forwards ("F") and backwards ("B") of (stage, micro-batch), each mesh in the plan's order."""
    texts = ROWS or [_steady(s, ahead) for s, ahead in enumerate(WARMUP or [])]
    waiting = [[_step(word) for word in reversed(text.split())] for text in texts]
    done: set[tuple[Any, ...]] = set()
    while any(waiting):
        before = len(done)
        for row in waiting:
            while row and _needed(*row[-1]) <= done:
                done.add(row[-1])
                yield row.pop()
        if len(done) == before:
            raise RuntimeError("the rows of this file deadlock")


def _step(word: str) -> tuple[str, int, int]:
    stage, _, microbatch = word[1:].partition(".")
    return word[0], int(stage), int(microbatch)


def _needed(kind: str, s: int, m: int) -> set[tuple[Any, ...]]:
    if kind == "F":
        return {("F", source, m) for source in STAGES[s]["from"]}
    return {("F", s, m), *(("B", t, m) for t, stage in enumerate(STAGES) if s in stage["from"])}


def _steady(s: int, ahead: int) -> str:
    """So many forwards ahead, then one forward and one backward in turn, then the backwards left."""
    turns = [f"F{s}.{m + ahead} B{s}.{m}" for m in range(MICROBATCHES - ahead)]
    first, last = range(ahead), range(MICROBATCHES - ahead, MICROBATCHES)
    return " ".join([*(f"F{s}.{m}" for m in first), *turns, *(f"B{s}.{m}" for m in last)])


def _halves(function: StageFunction, s: int, devices: Sequence[jax.Device] | None) -> tuple[Any, Any]:
    """A stage's compiled forward (what is sent, what the backward needs) and backward (gradients, cotangents)."""
    where = mesh(s, devices)
    enters, leaves = ENTERS[s][0], ENTERS[s][-1]

    def lay(tree: Tree, axes: tuple[str, ...]) -> Tree:
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, between(x, axes, where)), tree)

    def pull_of(weights: Named, piece: Tree, received: Tree) -> Any:
        floats, others = _split(received)

        def run(weights: Named, floats: Tree) -> tuple[Tree, Tree]:
            out = function(weights, piece, _merge(floats, others))
            return _split(out if s == LOSS_STAGE else lay(out, leaves))

        return jax.vjp(run, weights, floats, has_aux=True)

    def backward(pull: Any, cotangent: Tree) -> tuple[Named, Tree]:
        gradients, back = pull(cotangent)
        specs = {n: NamedSharding(where, kept_spec(n, s)) for n in gradients}
        return jax.lax.with_sharding_constraint(gradients, specs), lay(back, enters)

    if not STAGES[s]["recompute"]:

        @jax.jit
        def forward(weights: Named, piece: Tree, received: Tree) -> tuple[Tree, Any]:
            floats, pull, others = pull_of(weights, piece, received)
            return _merge(floats, others), pull

        return forward, jax.jit(lambda pull, cotangent: backward(pull, _split(cotangent)[0]))

    alone = jax.jit(lambda *given: _merge(*pull_of(*given)[::2]))
    again = jax.jit(lambda given, cotangent: backward(pull_of(*given)[1], _split(cotangent)[0]))
    return lambda *given: (alone(*given), given), again


def _whole_gradients(params: Tree, sums: Sequence[Named], scale: float, devices: Sequence[jax.Device] | None) -> Tree:
    """The stages' gradients in the order of the parameters; a tied weight's are summed where it comes first."""

    def whole(name: str, like: jax.Array) -> jax.Array:
        stages = sorted(PARAMETERS.get(name, {}))
        if not stages:
            return jnp.zeros_like(like)
        home = NamedSharding(mesh(stages[0], devices), kept_spec(name, stages[0]))
        parts = [jax.device_put(sums[s][name], home) for s in stages]
        total: jax.Array = sum(parts[1:], parts[0]) * jnp.asarray(scale, like.dtype)
        return total

    by_name = {name: whole(name, x) for name, x in rows(params).items()}
    found = []
    for name, leaf in zip(names(params), jax.tree.leaves(params), strict=True):
        if name in STACKED:
            own = [by_name[f"{name}[{i}]"] for i in range(leaf.shape[STACKED[name]])]
            found.append(jnp.stack([jax.device_put(x, own[0].sharding) for x in own], axis=STACKED[name]))
        else:
            found.append(by_name[name])
    return jax.tree.unflatten(jax.tree.structure(params), found)


def _add(total: Tree, more: Tree) -> Tree:
    return more if total is None else _sum(total, more)


@jax.jit
def _sum(one: Tree, other: Tree) -> Tree:
    return jax.tree.map(jnp.add, one, other)


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _split(tree: Tree) -> tuple[Tree, Tree]:
    """What has a gradient, and what has none; None where the other has the value."""
    return jax.tree.map(lambda x: x if _is_float(x) else None, tree), jax.tree.map(
        lambda x: None if _is_float(x) else x, tree
    )


def _merge(floats: Tree, others: Tree) -> Tree:
    return jax.tree.map(lambda a, b: b if a is None else a, floats, others, is_leaf=lambda x: x is None)
