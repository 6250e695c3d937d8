"""What a run leaves behind: a folder with its plan, the measured timelines of some steps, and a summary.

    plan.json       the plan that ran, with its prediction and the machine that it was made for
    timeline.json   per measured step and device, when each instruction ran
    summary.json    seconds and losses of all timed steps, peak memory, devices, versions
    metrics.jsonl   one line a step, as it went

``timeline.json`` and ``summary.json`` name the plan by its digest, so that files of two runs are never mixed.
"""

import hashlib
import os
import platform
import socket
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import msgspec

from meshwright.errors import ExecutionError
from meshwright.plan.planfile import Plan, parse_plan, plan_json, save_plan
from meshwright.simulate.program import parse_word, word
from meshwright.simulate.timeline import Event, Timeline

FORMAT, VERSION = "meshwright-run", 1
PLAN, TIMELINE, SUMMARY, METRICS = "plan.json", "timeline.json", "summary.json", "metrics.jsonl"
PACKAGES = ("meshwright", "jax", "jaxlib", "optax", "numpy", "mpi4py")

EventRow = tuple[str, float, float]  # word of the instruction, start and end in seconds since the step began


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class DeviceRow(_Record, frozen=True):
    """One device of a run: its number in the plan, and what it was."""

    device: int
    host: str
    platform: str  # as JAX names it: cpu, gpu, tpu
    kind: str  # the model of the device


class DeviceEvents(_Record, frozen=True):
    """What one device did in one step, on the row of one mesh."""

    device: int
    mesh: int
    events: tuple[EventRow, ...]


class TimelineFile(_Record, frozen=True):
    """``timeline.json``: one entry a measured step."""

    format: str
    version: int
    plan_digest: str
    steps: tuple[tuple[DeviceEvents, ...], ...]


class Summary(_Record, frozen=True):
    """``summary.json``. ``step_seconds`` are those of steps in which nothing was waited for but the end."""

    format: str
    version: int
    plan_digest: str
    date: str
    step_seconds: tuple[float, ...]
    losses: tuple[float | None, ...]  # null: it diverged
    predicted_step_seconds: float
    peak_memory_bytes: float
    devices: tuple[DeviceRow, ...]
    versions: dict[str, str]


class Run(msgspec.Struct, frozen=True):
    """A run as read back."""

    plan: Plan
    steps: tuple[tuple[DeviceEvents, ...], ...]
    summary: Summary

    @property
    def timelines(self) -> tuple[Timeline, ...]:
        """The measured steps, one event for each instruction of a mesh (``together``)."""
        devices = tuple(stage.devices for stage in self.plan.stages)
        return tuple(together(step, devices) for step in self.steps)


def digest(plan: Plan) -> str:
    """A name for exactly this plan."""
    return hashlib.sha256(plan_json(plan)).hexdigest()[:16]


def device_row(device: int, kind: str, platform_name: str) -> DeviceRow:
    """The device of this rank; a CPU's own name tells more than JAX's."""
    return DeviceRow(device, socket.gethostname(), platform_name, _processor() if platform_name == "cpu" else kind)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide how fast a step is."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device_events(timeline: Timeline, device: int) -> list[DeviceEvents]:
    """What one rank measured in a step, as rows of its device."""
    meshes = sorted({event.mesh for event in timeline.events})
    return [
        DeviceEvents(
            device,
            mesh,
            tuple((word(e.instruction), e.start_seconds, e.end_seconds) for e in timeline.events if e.mesh == mesh),
        )
        for mesh in meshes
    ]


def together(rows: Sequence[DeviceEvents], mesh_devices: tuple[tuple[int, ...], ...]) -> Timeline:
    """One event for each instruction of a mesh: from when its last device is there until its last device is done.

    Devices of a mesh meet in collectives, where one that comes early waits: its own time would count that wait.
    """
    spans: dict[tuple[int, str], tuple[float, float]] = {}
    for row in rows:
        for text, start, end in row.events:
            known = spans.get((row.mesh, text), (0.0, 0.0))
            spans[row.mesh, text] = max(known[0], start), max(known[1], end)
    events = [
        Event(mesh, parse_word(text), min(start, end), end) for (mesh, text), (start, end) in sorted(spans.items())
    ]
    return Timeline(mesh_devices, tuple(sorted(events, key=lambda e: (e.start_seconds, e.mesh, e.end_seconds))))


def write_run(
    folder: str | os.PathLike[str], plan: Plan, steps: Sequence[Sequence[DeviceEvents]], summary: Summary
) -> None:
    """Write the folder's files; each appears whole or not at all, the summary last."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    save_plan(plan, target / PLAN)
    timeline = TimelineFile(FORMAT, VERSION, digest(plan), tuple(tuple(step) for step in steps))
    for name, data in ((TIMELINE, msgspec.json.encode(timeline)), (SUMMARY, msgspec.json.encode(summary))):
        hidden = target / f".{name}"
        hidden.write_bytes(msgspec.json.format(data, indent=1 if name == SUMMARY else 0) + b"\n")
        hidden.replace(target / name)


Found = TypeVar("Found", TimelineFile, Summary)


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Read a run's folder.

    Raises:
        ExecutionError: a file is missing or damaged, or was written by a run of another plan.
    """
    where = Path(folder)
    plan = parse_plan(_bytes(where / PLAN), str(where / PLAN))
    timeline = _decode(where / TIMELINE, TimelineFile)
    summary = _decode(where / SUMMARY, Summary)
    for name, found in ((TIMELINE, timeline.plan_digest), (SUMMARY, summary.plan_digest)):
        if found != digest(plan):
            raise ExecutionError(
                f"{where / name} is of a run of another plan than {PLAN} beside it ({found}, not {digest(plan)}); "
                f"run `meshwright execute {where / PLAN} -o {where}` again"
            )
    return Run(plan, timeline.steps, summary)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ExecutionError(
            f"{path} cannot be read ({error.strerror}); give a folder that `meshwright execute PLAN -o RUN` wrote"
        ) from None


def _decode(path: Path, kind: type[Found]) -> Found:
    try:
        found = msgspec.json.decode(_bytes(path), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ExecutionError(f"{path} is damaged ({error}); run `meshwright execute PLAN -o RUN` again") from None
    if (found.format, found.version) != (FORMAT, VERSION):
        raise ExecutionError(
            f"{path} is {found.format} {found.version}; this Meshwright reads {FORMAT} {VERSION}: run again"
        )
    return found
