"""How long a step takes when nothing takes exactly as long as predicted: many samples of it, and what they say.

One sample draws, once for the whole step, which devices straggle, which links are slow and how fast each host is, and
for each task its own jitter. All are factors on the seconds of the predicted step, so no variability is exactly
``simulate``. Of a sample only its results are kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import ScheduleError
from meshwright.simulate.chances import COMPUTES, Chances, Step, factors, judge, sample_all, times
from meshwright.simulate.code import GATHER, KIND, RECEIVE, REDUCE, SEND, Code
from meshwright.simulate.compiled import KIND_COUNT, Compiled, compile_program
from meshwright.simulate.contention import overfull
from meshwright.simulate.costs import PipelineCosts
from meshwright.simulate.draws import Sampled, check_samples, refuse_outside
from meshwright.simulate.pipeline import Numbers, run_sharing
from meshwright.simulate.program import Program

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MOST_DRAWS = 10**10  # tasks × samples of one call: some minutes


@dataclass(frozen=True, slots=True, kw_only=True)
class Variability:
    """What makes a step differ from its prediction; by default nothing does.

    All of it multiplies predicted seconds. Jitter is lognormal with mean 1, and its number the standard deviation of
    the logarithm (0.05: about 5 %).

    Args:
        kernel_jitter: of each forward, backward (or half) and update, for itself.
        transfer_jitter: of each transfer, reduction and gather, for itself; of a transfer, its latency too.
        host_jitter: of all computations of a host together, once a step.
        straggler_probability: that a device is slow in a step. A stage goes at the speed of its slowest device.
        straggler_factor: how many times as long such a device computes.
        slow_link_probability: that the link from one mesh to another is slow in a step.
        slow_link_factor: how many times as long its transfers take, latency included.
        hosts: the devices of each host; only ``host_jitter`` wants them.
        slow_devices: what if? How many times as long these devices compute, in every step.
        slow_links: what if? How many times as long transfers from one mesh to another take, in every step.

    Raises:
        ScheduleError: a number is out of range, or hosts are missing or share a device.
    """

    kernel_jitter: float = 0.0
    transfer_jitter: float = 0.0
    host_jitter: float = 0.0
    straggler_probability: float = 0.0
    straggler_factor: float = 1.0
    slow_link_probability: float = 0.0
    slow_link_factor: float = 1.0
    hosts: tuple[tuple[int, ...] | range, ...] = ()
    slow_devices: Mapping[int, float] = field(default_factory=dict)
    slow_links: Mapping[tuple[int, int], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for item in fields(self):
            number = getattr(self, item.name)
            if item.name.endswith("_jitter"):
                refuse_outside(item.name, number, 0, 3)
            elif item.name.endswith("_probability"):
                refuse_outside(item.name, number, 0, 1)
            elif item.name.endswith("_factor"):
                refuse_outside(item.name, number, 1)
        for device, factor in self.slow_devices.items():
            refuse_outside(f"the slowdown of device {device}", factor, 0)
        for (source, target), factor in self.slow_links.items():
            refuse_outside(f"the slowdown of the link from mesh {source} to mesh {target}", factor, 0)
        housed = [device for host in self.hosts for device in host]
        if len(set(housed)) != len(housed):
            raise ScheduleError("a device stands on two of the hosts; name each device once")
        if self.host_jitter and not housed:
            raise ScheduleError(f"host_jitter is {self.host_jitter}, but no hosts are given; name the devices of each")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class StepSamples(Sampled):
    """Makespans of the samples as ``seconds``, and who was to blame.

    ``bubble_fractions[k, r]`` is the share of sample k in which mesh r computes nothing (reductions and gathers count
    as computing unless they run on a stream of their own), and ``critical_mesh[k]`` the mesh on which the critical
    path of sample k spends most of its seconds (the first of equals; -1: it spends none).
    """

    bubble_fractions: Floats
    critical_mesh: Ints

    @property
    def bubble_fraction(self) -> tuple[float, ...]:
        """Share of the step in which each mesh computes nothing, in the mean over the samples."""
        return tuple(self.bubble_fractions.mean(axis=0).tolist())

    @property
    def critical_share(self) -> tuple[float, ...]:
        """Share of the samples in which each mesh is the critical one."""
        meshes = self.bubble_fractions.shape[1]
        return tuple(float((self.critical_mesh == mesh).mean()) for mesh in range(meshes))


def sample_steps(
    program: Program | Code | Compiled,
    costs: PipelineCosts,
    variability: Variability,
    *,
    samples: int = 1000,
    seed: int = 0,
) -> StepSamples:
    """Times of many steps, each with chances of its own.

    The answer depends on the seed alone, to the last bit: not on the number of threads (Numba's), and sample k is the
    same whatever the number of samples. Programs that share cores, or links that they can fill, are sampled one after
    another, on the event queue where need be; all others on all threads. Transfers of a slow link that is shared move
    at their share of it for longer.

    Raises:
        ScheduleError: the program cannot be simulated, the variability names a device or link that it does not have,
            or the samples are too many to finish.
    """
    key = check_samples(samples, seed)
    if not isinstance(program, Compiled):
        program = compile_program(program, collective_stream=costs.collective_stream)
    tasks = program.code.count
    if tasks * samples > MOST_DRAWS:
        raise ScheduleError(
            f"{samples} samples of {tasks} tasks are {samples * tasks:.1e} draws; the most is {MOST_DRAWS:.0e}, "
            f"so ask for at most {MOST_DRAWS // tasks} samples"
        )
    numbers = Numbers(program, costs)
    numbers.check()
    step, chances = _step(numbers), _chances(numbers, variability)
    if numbers.resources is None and numbers.loads is None:
        makespans, critical, busy = sample_all(key, samples, step, chances)
    else:
        makespans, critical = np.empty(samples), np.empty(samples, np.int64)
        busy = np.zeros((samples, program.meshes))
        for sample in range(samples):
            factor = factors(key, sample, step, chances)
            start, end = _run_sharing(numbers, step, factor)
            makespans[sample], critical[sample] = judge(step, start, end, factor, busy[sample])
    total = np.where(makespans > 0, makespans, 1.0)[:, None]
    idle = np.where(makespans[:, None] > 0, np.maximum(1 - busy / total, 0.0), 0.0)
    return StepSamples(seconds=makespans, bubble_fractions=idle, critical_mesh=critical)


def _run_sharing(numbers: Numbers, step: Step, factor: Floats) -> tuple[Floats, Floats]:
    """Start and end of the tasks of one sample; links that its transfers never fill need no event queue."""
    if numbers.resources is None and numbers.loads is not None:
        start, end = times(step, factor)
        if not overfull(numbers.compiled, numbers.loads, start, end):
            return start, end
    return run_sharing(numbers, numbers.resources, factor)


def _step(numbers: Numbers) -> Step:
    compiled = numbers.compiled
    kind = compiled.code.table[:, KIND]
    works = (kind != SEND) & (kind != RECEIVE)
    return Step(
        order=compiled.order,
        before=compiled.before,
        need=compiled.need,
        need_slot=compiled.need_slot,
        slot=compiled.slot,
        mesh=compiled.code.mesh,
        works=works,
        occupies=works & (compiled.executor < compiled.meshes),
        meshes=compiled.meshes,
        slot_seconds=numbers.slot_seconds,
        slot_latency_seconds=numbers.slot_latency_seconds,
    )


def _chances(numbers: Numbers, variability: Variability) -> Chances:
    compiled, stages = numbers.compiled, numbers.costs.stages[: numbers.compiled.stages]
    devices = sorted({device for stage in stages for device in stage.devices})
    position = {device: at for at, device in enumerate(devices)}
    for device in variability.slow_devices:
        if device not in position:
            raise ScheduleError(f"device {device} is to be slow, but the program runs on {_listed(devices)}")
    host_of = {device: host for host, members in enumerate(variability.hosts) for device in members}
    homeless = [device for device in devices if device not in host_of] if variability.host_jitter else []
    if homeless:
        raise ScheduleError(f"host_jitter wants a host of each device; devices {_listed(homeless)} have none")

    mesh = compiled.mesh_of_stage.tolist()
    pairs = [(mesh[key.source], mesh[key.target]) for key in compiled.transfers]
    links = sorted(set(pairs))
    for pair in variability.slow_links:
        if pair not in links:
            raise ScheduleError(
                f"the link from mesh {pair[0]} to mesh {pair[1]} is to be slow, but nothing crosses it; "
                f"links in use: {_listed(links)}"
            )
    by_kind = np.zeros(KIND_COUNT)
    by_kind[list(COMPUTES)] = variability.kernel_jitter
    by_kind[[REDUCE, GATHER]] = variability.transfer_jitter
    jitter = [*np.tile(by_kind, len(stages)), *[variability.transfer_jitter] * len(pairs)]
    return Chances(
        slot_jitter=np.array(jitter, np.float64),
        device=np.array(devices, np.int64),
        device_factor=np.array([variability.slow_devices.get(device, 1.0) for device in devices], np.float64),
        device_host=np.array([host_of.get(device, 0) for device in devices], np.int64),
        stage_first=np.cumsum([0, *(len(stage.devices) for stage in stages)]),
        stage_device=np.array([position[device] for stage in stages for device in stage.devices], np.int64),
        link=np.array([source * compiled.meshes + target for source, target in links], np.int64),
        link_factor=np.array([variability.slow_links.get(pair, 1.0) for pair in links], np.float64),
        transfer_link=np.array([links.index(pair) for pair in pairs], np.int64),
        host_jitter=float(variability.host_jitter),
        straggler_probability=float(variability.straggler_probability),
        straggler_factor=float(variability.straggler_factor),
        slow_link_probability=float(variability.slow_link_probability),
        slow_link_factor=float(variability.slow_link_factor),
    )


def _listed(things: Sequence[object]) -> str:
    """The first few, and how many there are."""
    shown = ", ".join(map(str, things[:8]))
    return shown if len(things) <= 8 else f"{shown} ... ({len(things)} in all)"
