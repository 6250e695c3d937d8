"""How a transformer's step is laid out over devices."""

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Literal

from meshwright.errors import PlanError
from meshwright.simulate.schedules.table import find_schedule
from meshwright.simulate.workload.transformer import Transformer

Recompute = Literal["none", "selective", "full"]
RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Sizes of the parallel axes and what goes with them.

    ``data`` counts replicas of the dense weights' grid along which the batch is split; ``expert`` splits the experts
    over ``expert`` neighbours of these (and of ``context``). ``zero`` is the ZeRO stage over data and context: 1 shards
    the optimizer, 2 also gradients, 3 also weights (FSDP). ``layers_per_stage``, ``recompute_per_stage`` and
    ``tensor_per_mesh`` are for stages that are not alike; ``operators_per_stage`` (see ``parts``) instead of the
    first two for stages that begin or end inside a layer.

    Devices are numbered tensor fastest, then context, data, pipeline (Megatron-LM's and DeepSpeed's order).
    """

    batch: int
    microbatch_size: int = 1
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    context: int = 1
    expert: int = 1
    chunks: int = 1
    zero: int = 0
    sequence_parallel: bool = False
    recompute: Recompute = "none"
    schedule: str = "1f1b"
    fused_attention: bool = True
    layers_per_stage: tuple[int, ...] | None = None
    recompute_per_stage: tuple[Recompute, ...] | None = None  # None: ``recompute`` on all
    tensor_per_mesh: tuple[int, ...] | None = None  # None: ``tensor`` on all
    operators_per_stage: tuple[tuple[bool, ...], ...] | None = None  # of its layers: whether each is recomputed

    def __post_init__(self) -> None:
        for name in ("batch", "microbatch_size", "tensor", "pipeline", "data", "context", "expert", "chunks"):
            size = getattr(self, name)
            if not (isinstance(size, int) and size >= 1):
                raise PlanError(f"{name} of a grid is {size}; a whole number of at least 1 is needed")
        if self.zero not in (0, 1, 2, 3):
            raise PlanError(f"zero is {self.zero}; ZeRO has the stages 0 (off), 1, 2 and 3")
        for policy in (self.recompute, *(self.recompute_per_stage or ())):
            if policy not in RECOMPUTES:
                raise PlanError(f"recompute {policy!r} is unknown; known are {', '.join(RECOMPUTES)}")
        find_schedule(self.schedule)
        if self.tensor_per_mesh is not None:
            if len(self.tensor_per_mesh) != self.pipeline:
                raise PlanError(
                    f"tensor_per_mesh names {len(self.tensor_per_mesh)} meshes; the grid has {self.pipeline}"
                )
            if not all(isinstance(size, int) and size >= 1 for size in self.tensor_per_mesh):
                raise PlanError(f"tensor_per_mesh is {self.tensor_per_mesh}; whole numbers of at least 1 are needed")
        part = self.microbatch_size * self.data
        if self.batch % part:
            below = self.batch // part * part
            near = f"{below} or {below + part}" if below else f"{part}"
            raise PlanError(
                f"a batch of {self.batch} does not split into micro-batches of {self.microbatch_size} on {self.data} "
                f"data-parallel ranks. Use a batch of {near}."
            )
        if (self.data * self.context) % self.expert:
            raise PlanError(
                f"expert is {self.expert}, but experts are split over {self.data * self.context} devices of the data "
                "and context axes; use a divisor of that"
            )
        if self.layers_per_stage is not None and len(self.layers_per_stage) != self.stages:
            raise PlanError(f"layers_per_stage names {len(self.layers_per_stage)} stages; the grid has {self.stages}")
        if self.operators_per_stage is not None:
            self._check_operators(self.operators_per_stage)
        if self.recompute_per_stage is not None and len(self.recompute_per_stage) != self.stages:
            raise PlanError(
                f"recompute_per_stage names {len(self.recompute_per_stage)} stages; the grid has {self.stages}"
            )

    def _check_operators(self, operators: tuple[tuple[bool, ...], ...]) -> None:
        if len(operators) != self.stages:
            raise PlanError(f"operators_per_stage names {len(operators)} stages; the grid has {self.stages}")
        if self.layers_per_stage is not None or self.recompute_per_stage is not None:
            raise PlanError("operators_per_stage says layers and recomputation; leave out the others of each stage")
        if self.zero == 3:
            raise PlanError("zero 3 gathers whole layers, which operators_per_stage may cut; use zero 2 at most")

    @property
    def mesh_devices(self) -> int:
        """Devices of a mesh of ``tensor``: those of all axes but the pipeline's."""
        return self.tensor * self.context * self.data

    @property
    def devices(self) -> int:
        """Devices of the whole grid."""
        return sum(self.tensors) * self.context * self.data

    @property
    def replicas(self) -> int:
        """Devices that hold the same dense weights, between which their gradients are summed."""
        return self.data * self.context

    @property
    def microbatches(self) -> int:
        """Micro-batches that each replica runs in a step."""
        return self.batch // (self.microbatch_size * self.data)

    @property
    def stages(self) -> int:
        """Stages of the pipeline, all chunks counted."""
        return self.pipeline * self.chunks

    @property
    def tensors(self) -> tuple[int, ...]:
        """Size of the tensor axis on each mesh."""
        return self.tensor_per_mesh or (self.tensor,) * self.pipeline

    def seen_from(self, stage: int, mesh: int) -> "Grid":
        """The grid as if all stages and meshes were like these."""
        if self.tensor_per_mesh is None and self.recompute_per_stage is None:
            return self
        return replace(
            self,
            tensor=self.tensors[mesh],
            recompute=self.recomputes[stage],
            tensor_per_mesh=None,
            recompute_per_stage=None,
        )

    @property
    def recomputes(self) -> tuple[Recompute, ...]:
        """What each stage computes again in its backward; of operators, the policy that is most like theirs."""
        if self.operators_per_stage is not None:
            return tuple(nearest_policy(flags) for flags in self.operators_per_stage)
        return self.recompute_per_stage or (self.recompute,) * self.stages


def nearest_policy(recomputed: tuple[bool, ...]) -> Recompute:
    """The policy that is most like operators of which some are recomputed: more than half is ``full``."""
    if not any(recomputed):
        return "none"
    return "full" if 2 * sum(recomputed) > len(recomputed) else "selective"


def stage_layers(model: Transformer, grid: Grid) -> tuple[int, ...]:
    """Layers of each stage: as asked; else equal; else equal with embedding and head counted as a layer each.

    Raises:
        PlanError: they cannot be so, or do not add up to the model's.
    """
    stages = grid.stages
    if grid.operators_per_stage is not None:
        return whole_layers(tuple(map(len, grid.operators_per_stage)), model.layers)
    if grid.layers_per_stage is not None:
        counts = grid.layers_per_stage
        if sum(counts) != model.layers or min(counts) < 0:
            raise PlanError(f"layers_per_stage {counts} do not add up to the model's {model.layers} layers")
        return counts
    if model.layers % stages == 0:
        return (model.layers // stages,) * stages
    if stages >= 2 and (model.layers + 2) % stages == 0:
        each = (model.layers + 2) // stages
        return (each - 1, *((each,) * (stages - 2)), each - 1)
    below = model.layers // stages * stages
    raise PlanError(
        f"{model.layers} layers do not split over {stages} stages. Use {below or stages} or {below + stages} layers "
        "(or 2 fewer), another pipeline, or give layers_per_stage."
    )


def whole_layers(operators: tuple[int, ...], layers: int) -> tuple[int, ...]:
    """Layers of each stage of so many operators, borders moved to the nearest between layers."""
    total = sum(operators)
    borders = [0, *(round(end / total * layers) for end in accumulate(operators))]
    return tuple(after - before for before, after in pairwise(borders))


def spread_layers(layers: int, stages: int) -> tuple[int, ...]:
    """Layers as evenly as may be, with those that are left over on the middle stages, far from embedding and head."""
    each, left = divmod(layers, stages)
    first = (stages - left) // 2
    return tuple(each + (first <= stage < first + left) for stage in range(stages))


def check_grid(model: Transformer, grid: Grid, devices: int) -> None:
    """Raise ``PlanError`` where the model does not divide over the grid, or the grid over the devices."""
    if grid.devices != devices:
        tensor = grid.tensor if grid.tensor_per_mesh is None else grid.tensor_per_mesh
        raise PlanError(
            f"a grid of {tensor} tensor × {grid.context} context × {grid.data} data × {grid.pipeline} pipeline "
            f"needs {grid.devices} devices; there are {devices}"
        )
    for tensor in sorted(set(grid.tensors)):
        _check_tensor(model, grid, tensor)
    if model.experts % grid.expert:
        raise PlanError(f"{model.experts} experts do not split over {grid.expert} devices; use a divisor")
    stage_layers(model, grid)


def _check_tensor(model: Transformer, grid: Grid, tensor: int) -> None:
    """Raise ``PlanError`` where a layer does not divide over the tensor axis of a mesh."""
    for what, size in (("heads", model.heads), ("ffn_hidden", model.ffn)):
        if size % tensor:
            raise PlanError(f"{what} {size} do not split over {tensor} tensor-parallel devices; use a divisor")
    if model.key_heads % tensor and tensor % model.key_heads:
        raise PlanError(f"{model.key_heads} kv_heads and {tensor} tensor-parallel devices do not divide each other")
    split = grid.context * (tensor if grid.sequence_parallel else 1)
    if model.sequence % split:
        raise PlanError(f"a sequence of {model.sequence} does not split over {split} context and tensor devices")
