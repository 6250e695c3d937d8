"""What fills a device's memory: model states by precision and ZeRO level, buffers, and what the allocator loses.

Activations are no part of this: the schedule decides how many micro-batches are alive (``live.py``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from meshwright.errors import ScheduleError
from meshwright.simulate.timeline import Parts, Timeline

ZERO_LEVELS = (0, 1, 2, 3)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Bytes that training keeps for each parameter: the weight itself, its gradient, and the optimizer's state.

    A master copy in f32 counts as optimizer state.
    """

    parameter_bytes: float
    gradient_bytes: float
    optimizer_bytes: float

    @property
    def bytes_per_parameter(self) -> float:
        """All of it, with nothing shared out."""
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes


RECIPES = {
    "f32-sgd": Recipe(4, 4, 0),
    "f32-momentum": Recipe(4, 4, 4),
    "f32-adam": Recipe(4, 4, 8),
    "mixed-adam": Recipe(2, 2, 12),  # f16 or bf16 with an f32 master: Rajbhandari et al., section 3.1, K = 12
    "mixed-adam-f32-gradients": Recipe(2, 4, 12),  # Megatron-LM's: 18 bytes (Narayanan et al., SC 2021, section 3.5)
    "bf16-adam": Recipe(2, 2, 4),  # everything in bf16
}


def model_state_bytes(parameters: float, recipe: Recipe, *, zero: int = 0, ranks: int = 1) -> Parts:
    """Bytes of parameters, gradients and optimizer state on each of ``ranks`` data-parallel devices.

    Level 1 shares out the optimizer's state, level 2 the gradients too, level 3 the parameters too.
    Source: Rajbhandari et al., ZeRO, SC 2020, section 5 and figure 1.

    Args:
        parameters: parameters that one device would hold without ZeRO (after tensor and pipeline parallelism).

    Raises:
        ScheduleError: the level is none of 0 to 3, or a number is impossible.
    """
    if zero not in ZERO_LEVELS:
        raise ScheduleError(f"ZeRO level {zero} was asked for; there are 0 (none), 1, 2 and 3")
    if ranks < 1:
        raise ScheduleError(f"{ranks} data-parallel ranks were given; at least 1 is needed")
    if not (isfinite(parameters) and parameters >= 0):
        raise ScheduleError(f"{parameters} parameters were given; a finite number of at least 0 is needed")

    def shared_from(level: int) -> float:
        return 1 / ranks if zero >= level else 1.0

    return (
        ("parameters", parameters * recipe.parameter_bytes * shared_from(3)),
        ("gradients", parameters * recipe.gradient_bytes * shared_from(2)),
        ("optimizer", parameters * recipe.optimizer_bytes * shared_from(1)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Overheads:
    """What a device holds besides model states and activations.

    ``communication_bytes`` are buffers of collectives: buckets of gradients on their way, gathered layers of ZeRO-3;
    ``workspace_bytes`` what kernels want for themselves (cuBLAS, cuDNN); ``context_bytes`` what driver and libraries
    take before anything runs. ``fragmentation`` is what the allocator loses, as a share of all the rest.
    """

    communication_bytes: float = 0.0
    workspace_bytes: float = 0.0
    context_bytes: float = 0.0
    fragmentation: float = 0.0

    def __post_init__(self) -> None:
        for name in ("communication_bytes", "workspace_bytes", "context_bytes", "fragmentation"):
            number = getattr(self, name)
            if not (isfinite(number) and number >= 0):
                raise ScheduleError(f"{name} is {number}; a finite number of at least 0 is needed")


NO_OVERHEADS = Overheads()


def gathered_bytes(layer_parameters: float, recipe: Recipe, *, prefetch: int = 1) -> float:
    """Buffers that ZeRO-3 gathers parameters into: the layer at work and those fetched ahead of it."""
    return (1 + prefetch) * layer_parameters * recipe.parameter_bytes


def static_parts(states: Parts, overheads: Overheads = NO_OVERHEADS, live_bytes: float = 0.0) -> Parts:
    """Everything that a device holds all the time, by name; the sum is a ``StageCosts``' ``static_bytes``.

    Args:
        live_bytes: the most that activations add, of which the allocator loses its share too.
    """
    parts = [
        *states,
        ("communication buffers", overheads.communication_bytes),
        ("workspace", overheads.workspace_bytes),
        ("context", overheads.context_bytes),
    ]
    held = total(parts) - overheads.context_bytes + live_bytes
    parts.append(("fragmentation", overheads.fragmentation * held))
    return tuple((name, size) for name, size in parts if size)


def total(parts: Sequence[tuple[str, float]]) -> float:
    """The sum of all parts."""
    return sum(size for _, size in parts)


def need_fit(timeline: Timeline, memory_bytes: Sequence[float], margin: float = 0.0) -> None:
    """Raise ``ScheduleError`` unless every mesh's peak fits its devices, with a share of them left free.

    Args:
        memory_bytes: memory of each device of each mesh.
        margin: share of the memory that is to stay free.
    """
    peaks = zip(timeline.peak_bytes, timeline.peak_parts, memory_bytes, strict=True)
    over = [(peak - size * (1 - margin), mesh, peak, parts, size) for mesh, (peak, parts, size) in enumerate(peaks)]
    excess, mesh, peak, parts, size = max(over, default=(0.0, 0, 0.0, (), 0.0))
    if excess > 0:
        name, largest = max(parts, key=lambda part: part[1])
        kept = f" of which {margin:.0%} stay free" if margin else ""
        raise ScheduleError(
            f"mesh {mesh} needs {peak / 1e9:.1f} GB on each of its devices, {excess / 1e9:.1f} GB more than their "
            f"{size / 1e9:.1f} GB{kept}; most of it are {name} ({largest / 1e9:.1f} GB): use more devices, a smaller "
            "micro-batch or rematerialisation"
        )
