"""What is asked of the search: the request, what is fixed in it, and the sizes that this leaves open."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Literal, get_args

from meshwright.calibrate.hardware import Cluster
from meshwright.errors import PlanError
from meshwright.plan.cache import LayerCache
from meshwright.plan.schedule_rules import RUNNABLE, find_rule
from meshwright.plan.space import Memory
from meshwright.plan.stages import MeshKind, logical_mesh, mesh_kinds
from meshwright.plan.zero import LEVELS

Remat = Literal["none", "full"]

# The peaks of stacks whose tensors alone were reported are off by 2.9 to 5.7 % in the mean on rows that no constant was
# fitted to (docs/validation.md: Mist, zero bubble, Sailor on usual hosts): about that much is kept free.
MEMORY_MARGIN = 0.05
# The worst source there is 41.6 % off in the mean (an allocator's reserve counts): 1 / 0.7 is more than 1.416.
SURE_SHARE = 0.7


@dataclass(frozen=True, slots=True)
class Fix:
    """What the user gives instead of having it searched. ``stages`` lists a (data, tensor) mesh for each stage.

    ``schedule`` may name its number of stages a mesh, as in ``interleaved:4``. ``equal_layers`` gives each of
    ``pipeline`` stages the same number of layers, or one less.
    """

    microbatches: int | None = None
    schedule: str | None = None
    remat: Remat | None = None
    pipeline: int | None = None
    data: int | None = None
    tensor: int | None = None
    stages: tuple[tuple[int, int], ...] | None = None
    equal_layers: bool = False

    @property
    def meshes(self) -> bool:
        """Whether the user gives submeshes."""
        return any(x is not None for x in (self.pipeline, self.data, self.tensor, self.stages))

    def __post_init__(self) -> None:
        for name in ("microbatches", "pipeline", "data", "tensor"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PlanError(f"{name} is fixed to {value}; it is at least 1")
        if self.schedule is not None:
            find_rule(self.schedule)
        if self.equal_layers and self.pipeline is None:
            raise PlanError("equal_layers needs the number of stages; fix pipeline as well")
        if self.remat is not None and self.remat not in get_args(Remat):
            raise PlanError(f"remat {self.remat!r} is unknown; use {' or '.join(get_args(Remat))}")


@dataclass(frozen=True, slots=True)
class Request:
    """What to plan for.

    Args:
        cross_mesh: False plans by Alpa's objective: without transfers between stages, on all devices, and the plan that
            the objective likes best is not held against others.
        schedules: the schedules to search, if none is fixed; by default those that the executor runs.
        memory_margin: share of each device's memory that a plan leaves free.
        time_limit_seconds: after which the best plan so far is given; the step in hand is finished, and the search goes
            on until it has one plan that fits.
        zero: the highest level of ZeRO that the search may choose, parameter by parameter (``meshwright.plan.zero``);
            what the executor cannot run yet is planned only if asked for.
        cache: where layers solved by earlier searches are kept; by default nowhere.
    """

    cluster: Cluster
    batch: int
    fix: Fix = field(default_factory=Fix)
    memory: Memory = field(default_factory=Memory)
    cross_mesh: bool = True
    use_ilp: bool = False
    schedules: tuple[str, ...] = RUNNABLE
    memory_margin: float = MEMORY_MARGIN
    time_limit_seconds: float | None = None
    zero: int = 0
    cache: LayerCache | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.memory_margin < 1:
            raise PlanError(f"a memory margin of {self.memory_margin:g} is no share; give one from 0 to below 1")
        limit = self.time_limit_seconds
        if limit is not None and not (isfinite(limit) and limit > 0):
            raise PlanError(f"a time limit of {limit:g} seconds leaves no time; give more than 0")
        if self.zero not in LEVELS:
            raise PlanError(f"ZeRO level {self.zero} is unknown; use {', '.join(map(str, LEVELS))} or auto")
        if not self.schedules:
            raise PlanError(f"no schedule is left to search; give some of {', '.join(RUNNABLE)}")
        for name in self.schedules:
            find_rule(name)

    @property
    def usable_bytes(self) -> float:
        """Bytes of the smallest device that a plan may fill."""
        return (1 - self.memory_margin) * self.device_bytes

    @property
    def device_bytes(self) -> float:
        """Memory of the smallest device."""
        return min(host.device.memory_bytes.value for host in self.cluster.hosts)

    @property
    def searched_schedules(self) -> tuple[str, ...]:
        """The schedules to try."""
        return self.schedules if self.fix.schedule is None else (self.fix.schedule,)


def microbatch_counts(batch: int, fixed: int | None) -> list[int]:
    """Numbers of micro-batches to try: divisors of the batch, most first, at most one per factor of about two."""
    if batch < 1:
        raise PlanError(f"a batch of {batch} is not a batch; it is at least 1")
    if fixed is not None:
        if batch % fixed:
            near = " or ".join(str(d) for d in sorted(sorted(_divisors(batch), key=lambda d: abs(d - fixed))[:2]))
            raise PlanError(f"a batch of {batch} does not split into {fixed} micro-batches; use {near}")
        return [fixed]
    kept: list[int] = []
    for divisor in reversed(_divisors(batch)):
        if not kept or divisor <= kept[-1] / 1.9 or divisor == 1:
            kept.append(divisor)
    return kept


def refined_counts(batch: int, best: int, tried: Sequence[int]) -> list[int]:
    """Divisors of the batch that lie between the best number of micro-batches and the numbers tried beside it."""
    below = max((count for count in tried if count < best), default=best)
    above = min((count for count in tried if count > best), default=best)
    return [divisor for divisor in _divisors(batch) if below < divisor < above and divisor != best]


def _divisors(batch: int) -> list[int]:
    return [divisor for divisor in range(1, batch + 1) if batch % divisor == 0]


def requested_kinds(cluster: Cluster, fix: Fix, seconds_per_byte: float) -> tuple[MeshKind, ...]:
    """The submeshes that what is fixed leaves open."""
    total = cluster.devices
    if fix.stages is not None:
        used = sum(d * t for d, t in fix.stages)
        if used > total:
            raise PlanError(f"the given stages want {used} devices; the cluster has {total}")
        return tuple(
            MeshKind(logical_mesh(cluster, shape), ("data", "tensor"), seconds_per_byte) for shape in fix.stages
        )
    pipeline = fix.pipeline
    if fix.data is not None or fix.tensor is not None:
        given = (fix.data or 1) * (fix.tensor or 1) * (pipeline or 1)
        rest, left = divmod(total, given)
        if left:
            raise PlanError(f"fixed sizes multiply to {given}, which does not divide the cluster's {total} devices")
        data, tensor = fix.data, fix.tensor
        if data is None:
            data, rest = (rest, 1) if pipeline else (1, rest)
        elif tensor is None:
            tensor, rest = (rest, 1) if pipeline else (1, rest)
        if pipeline and rest != 1:
            raise PlanError(f"fixed sizes use {given} of the cluster's {total} devices; they must multiply to {total}")
        shape = (data, tensor or 1)
        return (MeshKind(logical_mesh(cluster, shape), ("data", "tensor"), seconds_per_byte),)
    kinds = tuple(replace(kind, seconds_per_byte=seconds_per_byte) for kind in mesh_kinds(cluster))
    if pipeline is None:
        return kinds
    if total % pipeline:
        raise PlanError(f"{pipeline} equal stages do not divide the cluster's {total} devices")
    return tuple(kind for kind in kinds if kind.mesh.devices == total // pipeline)
