"""The plan: everything the simulator and the executor need, as one readable JSON file that round-trips exactly."""

import math
import os
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import msgspec

from meshwright.calibrate.hardware import Cluster, cluster_from_data, cluster_to_data
from meshwright.errors import MeshwrightError, PlanError

FORMAT = "meshwright-plan"
VERSION = 1


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Layout(_Record, frozen=True):
    """How one layer is sharded.

    ``values`` gives the spec of the values that are pinned, keyed "number:what"; ``operands`` the spec that an
    equation wants of an operand that lives in another, keyed "equation.operand"; ``partial`` the mesh axes over which a
    value of a gradient stays a partial sum until the end of the iteration, and ``splits`` where such a sum begins: the
    dims, keyed "equation.operand.dim", that these axes cut before the sum. ``stored`` gives, by number, the spec that
    the optimizer state of a parameter is kept in where that is finer than the one in which it is read, ``zero`` its
    level: 1 for that state alone, 2 for the gradient as well, 3 for the parameter as well.
    """

    values: dict[str, str]
    operands: dict[str, str]
    partial: dict[str, str]
    splits: dict[str, str]
    stored: dict[str, str] = {}
    zero: dict[str, int] = {}


class PlannedCollective(_Record, frozen=True):
    """Alike collectives of a stage: how many there are in a phase, what they bring to a device, and what they take.

    ``phase`` is forward or backward (each micro-batch) or once (each iteration); ``bytes`` and ``seconds`` are those of
    all ``count`` together, bytes of their results on one device.
    """

    phase: Literal["forward", "backward", "once"]
    kind: str
    axes: str  # names of mesh axes, joined by +
    ranks: int
    count: int
    bytes: float
    seconds: float


class PlannedStage(_Record, frozen=True):
    """Layers ``layers[0] .. layers[1]-1`` on ``devices``, which form the mesh; one micro-batch's seconds.

    ``weight_gradient_seconds`` are the part of the backward computation that a schedule with split backwards puts off;
    ``remat`` is None in files that say it for the whole plan. ``collectives`` are what the communication seconds are
    made of, as priced (a forward that runs again in the backward is not listed twice).
    """

    layers: tuple[int, int]
    devices: tuple[int, ...]
    mesh: dict[str, int]
    boundaries: tuple[str, ...]  # how values are split before each layer and after the last: mesh axes, or "-"
    layouts: tuple[str, ...]  # per layer, a name in ``Plan.layouts``
    forward_compute_seconds: float
    forward_communication_seconds: float
    backward_compute_seconds: float
    backward_communication_seconds: float
    reduce_seconds: float
    update_seconds: float
    dispatch_seconds: float
    static_bytes: float
    saved_bytes: float
    transient_bytes: float
    peak_memory_bytes: float
    weight_gradient_seconds: float | None = None
    remat: Literal["none", "full"] | None = None
    collectives: tuple[PlannedCollective, ...] = ()

    @property
    def forward_seconds(self) -> float:
        return self.forward_compute_seconds + self.forward_communication_seconds + self.dispatch_seconds

    @property
    def backward_seconds(self) -> float:
        return self.backward_compute_seconds + self.backward_communication_seconds + self.dispatch_seconds


class Transfer(_Record, frozen=True):
    """What one stage sends another: once per micro-batch; for tied weights, once per iteration."""

    source: int
    target: int
    what: Literal["activation", "cotangent", "gradient", "parameter"]
    values: tuple[int, ...]  # model-wide values; for tied weights, parameter leaves
    bytes: float
    wire_seconds: float
    latency_seconds: float


class Predicted(_Record, frozen=True):
    """The simulator's answer."""

    iteration_seconds: float
    iteration_seconds_low: float
    iteration_seconds_high: float
    tokens_per_second: float
    model_flops_per_second_per_device: float
    mfu: float
    bubble_fraction: float
    exposed_communication_seconds: float
    peak_memory_bytes: float
    fits: bool


class Rival(_Record, frozen=True):
    """Another candidate and why it lost."""

    name: str
    iteration_seconds: float
    fits: bool
    why_not: str


class Plan(_Record, frozen=True):
    """A model's training step, cut, sharded and scheduled for a cluster.

    Stages that name the same devices share a mesh (virtual stages). ``remat`` is "mixed" where stages differ.
    ``fallback`` is a leaner plan, for the case that the device holds more than was predicted; None: this plan is lean
    enough, or there is no leaner one (then a note says so).
    """

    format: str
    version: int
    model: str
    fingerprint: str  # of the traced program: the plan holds for no other
    cluster: dict[str, Any]
    batch: int
    microbatches: int
    schedule: str
    remat: Literal["none", "full", "mixed"]
    tokens_per_sample: int
    parameters: int
    model_flops: float  # of one micro-batch
    compute_dtype: str  # of most matmul FLOPs
    stages: tuple[PlannedStage, ...]
    layouts: dict[str, Layout]
    transfers: tuple[Transfer, ...]
    tied: tuple[tuple[int, int], ...]  # (owner stage, user stage)
    predicted: Predicted
    search: dict[str, int | float]
    rivals: tuple[Rival, ...]
    notes: tuple[str, ...] = ()
    fallback: "Plan | None" = None

    def __post_init__(self) -> None:
        layers = [stage.layers for stage in self.stages]
        if not layers or layers[0][0] != 0 or any(a[1] != b[0] for a, b in pairwise(layers)):
            raise PlanError(f"stages hold layers {layers}; they must follow one another from 0")
        devices = [d for mesh in self.meshes for d in mesh]
        if len(set(devices)) != len(devices):
            raise PlanError("a device is in two meshes; stages share all of their devices or none")
        if len(self.stages) % len(self.meshes):
            raise PlanError(f"{len(self.stages)} stages do not spread evenly over {len(self.meshes)} meshes")
        if self.microbatches < 1 or self.batch % self.microbatches:
            raise PlanError(f"a batch of {self.batch} does not split into {self.microbatches} micro-batches")
        for index, stage in enumerate(self.stages):
            count = stage.layers[1] - stage.layers[0]
            if len(stage.layouts) != count or len(stage.boundaries) != count + 1:
                raise PlanError(f"stages[{index}] has {count} layers but {len(stage.layouts)} layouts")
            if math.prod(stage.mesh.values()) != len(stage.devices):
                raise PlanError(f"stages[{index}] has {len(stage.devices)} devices but a mesh of {stage.mesh}")
            for name in stage.layouts:
                if name not in self.layouts:
                    raise PlanError(f"stages[{index}] names layout {name!r}, which the plan lacks")

    @property
    def hardware(self) -> Cluster:
        return cluster_from_data(self.cluster, "plan.cluster")

    @property
    def meshes(self) -> tuple[tuple[int, ...], ...]:
        """The devices of each mesh; each holds one stage, or as many as every other."""
        return tuple(dict.fromkeys(stage.devices for stage in self.stages))

    @property
    def devices(self) -> int:
        return sum(len(mesh) for mesh in self.meshes)

    @property
    def zero(self) -> int:
        """The highest level of ZeRO at which a parameter is kept."""
        return max((level for layout in self.layouts.values() for level in layout.zero.values()), default=0)

    def recomputes(self, stage: int) -> bool:
        """Whether a stage runs its forward again in its backward."""
        return (self.stages[stage].remat or self.remat) == "full"

    @property
    def microbatch_size(self) -> int:
        return self.batch // self.microbatches

    def __str__(self) -> str:
        return table(self)


def cluster_data(cluster: Cluster) -> dict[str, Any]:
    """The cluster as JSON gives it back, lists for tuples, so that a plan equals its own file."""
    data: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(cluster_to_data(cluster)))
    return data


def plan_json(plan: Plan) -> bytes:
    """The file's text: short lists on one line, everything else indented."""
    return msgspec.json.format(msgspec.json.encode(plan), indent=1) + b"\n"


def save_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write the plan; the file appears whole or not at all."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(plan_json(plan))
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan. Errors: PlanError, one line, if it is missing, damaged, newer, or no plan."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise PlanError(
            f"{path} cannot be read ({error.strerror}); make a plan with `meshwright plan … -o {path}`"
        ) from None
    return parse_plan(data, str(path))


def parse_plan(data: bytes, where: str = "plan") -> Plan:
    try:
        head = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"{where} is damaged: {error}; make it again with `meshwright plan`") from None
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise PlanError(f'{where} is not a plan: it has no "format": "{FORMAT}"')
    version = head.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise PlanError(f"{where}: version is {version!r}; this meshwright reads versions 1 to {VERSION}")
    if version > VERSION:
        raise PlanError(f"{where} has version {version}; this meshwright reads up to {VERSION}: update meshwright")
    try:
        plan = msgspec.convert(head, Plan)
        _ = plan.hardware
    except (msgspec.ValidationError, MeshwrightError) as error:
        raise PlanError(f"{where} is damaged: {error}; make it again with `meshwright plan`") from None
    return plan


def table(plan: Plan) -> str:
    """The plan as a table for people."""
    p = plan.predicted
    head = (
        f"{plan.model} on {plan.cluster.get('name', '?')}: batch {plan.batch} as {plan.microbatches} micro-batches of "
        f"{plan.microbatch_size}, schedule {plan.schedule}, rematerialisation {plan.remat}"
    )
    lines = [
        head,
        "",
        f"{'stage':>5}  {'layers':>9}  {'devices':>11}  {'mesh':<18}  {'forward':>9}  {'backward':>9}  {'peak':>11}",
    ]
    for index, stage in enumerate(plan.stages):
        devices = f"{stage.devices[0]}-{stage.devices[-1]}" if len(stage.devices) > 1 else str(stage.devices[0])
        mesh = " × ".join(f"{name} {size}" for name, size in stage.mesh.items() if size > 1) or "one device"
        lines.append(
            f"{index:>5}  {f'{stage.layers[0]}-{stage.layers[1] - 1}':>9}  {devices:>11}  {mesh:<18}  "
            f"{seconds_text(stage.forward_seconds):>9}  {seconds_text(stage.backward_seconds):>9}  "
            f"{bytes_text(stage.peak_memory_bytes):>11}"
        )
    lines += [
        "",
        f"predicted: {seconds_text(p.iteration_seconds)} a step, {p.tokens_per_second:,.0f} tokens/s, "
        f"{p.mfu:.1%} of peak FLOP/s, bubble {p.bubble_fraction:.1%}, peak memory {bytes_text(p.peak_memory_bytes)}"
        + ("" if p.fits else "  (does NOT fit)"),
    ]
    lines += [f"note: {note}" for note in plan.notes]
    return "\n".join(lines)


def seconds_text(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds / scale < 1000 else f"{seconds / scale:.0f} {unit}"
    return f"{seconds / 1e-6:.2g} µs"


def bytes_text(count: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count / scale < 1000 else f"{count / scale:.0f} {unit}"
    return f"{count:.0f} B"


def public_json(plan: Plan) -> dict[str, Any]:
    """What ``--json`` prints for ``plan`` and ``simulate`` (the documented contract)."""
    return {
        "model": plan.model,
        "cluster": plan.cluster.get("name"),
        "batch": plan.batch,
        "microbatches": plan.microbatches,
        "schedule": plan.schedule,
        "remat": plan.remat,
        "stages": [
            {
                "layers": list(stage.layers),
                "devices": list(stage.devices),
                "mesh": stage.mesh,
                "forward_seconds": stage.forward_seconds,
                "backward_seconds": stage.backward_seconds,
                "peak_memory_bytes": stage.peak_memory_bytes,
                "remat": "full" if plan.recomputes(index) else "none",
            }
            for index, stage in enumerate(plan.stages)
        ],
        "predicted": msgspec.to_builtins(plan.predicted),
        "search": plan.search,
        "rivals": [msgspec.to_builtins(rival) for rival in plan.rivals],
        "notes": list(plan.notes),
        "fallback": None if plan.fallback is None else public_json(plan.fallback),
    }
