"""Which numbers of a machine file a run says are wrong, and by how much.

What a group of instructions costs is a sum of parts, each proportional to one *number* of the file: kernels to the
device's rates, the start of a program to its dispatch, a transfer to the link's bandwidth and latency. So a run gives
one equation a group, sum of part times factor = found cost, and the factors are those of the least surprise: maximum a
posteriori, where the logarithm of a factor is Cauchy around 0, as wide as the file's own range (a number is as good as
it says, or it is plain wrong), and Huber's loss on the groups' logarithms, so that one strange group does not decide
(Huber, Ann. Math. Stat. 35 (1964) 73-101). A number that no group depends on keeps its factor of 1. Only what rates and
times cannot explain becomes a slowdown of a phase's programs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, hypot, log, sqrt
from statistics import median

import numpy as np
from numpy.typing import NDArray

from meshwright.calibrate.device import Device
from meshwright.calibrate.drift import Drift, Group, Observation, cost_of
from meshwright.calibrate.hardware import Cluster, Quantity
from meshwright.calibrate.link import Link
from meshwright.plan.planfile import Plan, PlannedStage
from meshwright.plan.predict import costs_of

Floats = NDArray[np.float64]
Parts = dict[Group, dict["Number", float]]
Rows = dict[tuple[int, Group], dict["Number", float]]  # by run
Targets = dict[tuple[int, Group], tuple[float, float]]  # logarithm of the seconds that were found, and its error

HUBER = 1.345  # standard errors beyond which a residual counts linearly: 95 % efficient on normal ones
OUTLIER = 3.0  # standard errors that a residual counts for at most in the misfit
ROUNDS, REFITS = 50, 6  # of reweighting; of fits, each with the misfit that the one before left
RANGE_SIGMAS = 4.0  # from low to high: two standard errors each way, as the fits state it
NARROWEST, WIDEST, UNSTATED = 0.2, 1.0, 0.7  # widths of the logarithm of a factor, before the run
SIGNIFICANT = 3.0  # standard errors; several numbers are looked at, and the errors come from few steps
LEAST_CHANGE = 0.01  # of a logarithm: what no clock of a run resolves is not corrected
BETWEEN_HOSTS = -1
KERNELS = ("compute", "matmul", "memory", "launch", "arithmetic")  # what a phase's slowdown multiplies
PHASE_OF = {"forward": "forward", "backward": "backward", "update": "once"}


@dataclass(frozen=True, slots=True, order=True)
class Number:
    """One number of the machine file, or several that a run cannot tell apart.

    ``kind``: of a device ``compute`` (all its rates), or ``matmul``, ``memory`` and ``launch`` where they are told
    apart; ``dispatch`` of an instruction; ``forward``, ``backward`` and ``once``, slowdowns of programs; of a link
    ``wire`` (bandwidth), ``latency`` and ``collectives``. ``host`` is the first host with this device or link, or
    ``BETWEEN_HOSTS``.
    """

    kind: str
    host: int

    def __str__(self) -> str:
        where = "between hosts" if self.host == BETWEEN_HOSTS else f"of host {self.host}"
        return f"{self.kind} {where}"


CONSTANT = Number("constant", BETWEEN_HOSTS)  # stands for parts that are not fitted


@dataclass(frozen=True, slots=True)
class Factor:
    """Seconds of what depends on a number, over those of the file: logarithm and its standard error."""

    log_value: float
    log_error: float

    @property
    def value(self) -> float:
        """The factor itself."""
        return exp(self.log_value)


@dataclass(frozen=True, slots=True)
class Fit:
    """Factors of the numbers that change; those that were looked at and stay are in ``kept``."""

    factors: dict[Number, Factor]
    kept: dict[Number, Factor] = field(default_factory=dict)

    def log_of(self, number: Number) -> float:
        """The logarithm of a number's factor, 0 where it stays."""
        return self.factors[number].log_value if number in self.factors else 0.0


def device_host(cluster: Cluster, stage: PlannedStage) -> int:
    """The first host whose device equals that of a stage."""
    device = cluster.device(stage.devices[0])
    return next(index for index, host in enumerate(cluster.hosts) if host.device == device)


def link_host(cluster: Cluster, devices: tuple[int, ...]) -> int:
    """The first host with the link that devices need among them, or ``BETWEEN_HOSTS``."""
    owners = {cluster.host_of(device) for device in devices}
    if len(owners) > 1:
        return BETWEEN_HOSTS
    link = cluster.hosts[owners.pop()].link
    return next(index for index, host in enumerate(cluster.hosts) if host.link == link)


def collectives_number(cluster: Cluster, devices: tuple[int, ...]) -> Number:
    """The number that collectives of a stage go by: their own measurements, or the plain link where there are none."""
    host = link_host(cluster, devices)
    link = cluster.inter_host if host == BETWEEN_HOSTS else cluster.hosts[host].link
    return Number("collectives" if link.collectives else "wire", host)


def parts_of(plan: Plan, shares: Mapping[Group, Mapping[str, float]] | None = None) -> Parts:
    """What each group costs, by the number that the seconds are proportional to.

    Args:
        shares: of the seconds of a group's kernels, what is ``matmul``, ``memory`` and ``launch``; without, all of them
            are ``compute``.
    """
    cluster = plan.hardware
    costs = costs_of(cluster, plan.stages, plan.transfers)
    parts: Parts = {}
    for index, stage in enumerate(plan.stages):
        here, sums = device_host(cluster, stage), collectives_number(cluster, stage.devices)
        device = cluster.device(stage.devices[0])
        whole = {
            "forward": stage.forward_compute_seconds,
            "backward": stage.backward_compute_seconds,
            "update": stage.update_seconds,
        }
        for what, seconds in whole.items():
            group = Group(index, what)
            fixed = device.program_seconds(PHASE_OF[what])
            kernels = max(0.0, seconds - fixed)
            collectives = cost_of(costs, group) - seconds - stage.dispatch_seconds
            split = (shares or {}).get(group, {"compute": 1.0})
            found = {Number(kind, here): share * kernels for kind, share in split.items()}
            found[Number("dispatch", here)] = stage.dispatch_seconds + fixed
            found[sums] = collectives
            parts[group] = found
        group = Group(index, "reduce")
        parts[group] = {sums: cost_of(costs, group)}
    for (source, target, what), cost in costs.transfers.items():
        link = link_host(cluster, (*plan.stages[source].devices, *plan.stages[target].devices))
        parts[Group(source, what, target)] = {
            Number("wire", link): cost.wire_seconds,
            Number("latency", link): cost.latency_seconds,
        }
    tiny = {group: 1e-9 * sum(found.values()) for group, found in parts.items()}
    return {group: {n: s for n, s in found.items() if s > tiny[group]} for group, found in parts.items()}


def stated_error(cluster: Cluster, number: Number) -> float | None:
    """Standard error of a number's logarithm by the range that the file states; None where it states none."""
    quantity = quantity_of(cluster, number)
    if quantity is None or not quantity.low or quantity.high is None:
        return None
    return log(quantity.high / quantity.low) / RANGE_SIGMAS


def quantity_of(cluster: Cluster, number: Number) -> Quantity | None:
    """The figure of the file that speaks for a number; None where it has none."""
    if number.kind in ("wire", "latency", "collectives"):
        link: Link = cluster.inter_host if number.host == BETWEEN_HOSTS else cluster.hosts[number.host].link
        if number.kind == "collectives":
            fits = [fit for kind in sorted(link.collectives) for fit in link.collectives[kind]]
            return fits[0].bytes_per_second if fits else link.bytes_per_second
        return link.latency_seconds if number.kind == "latency" else link.bytes_per_second
    device: Device = cluster.hosts[number.host].device
    match number.kind:
        case "compute" | "matmul":
            return device.matmul_efficiency
        case "memory":
            return device.memory_bytes_per_second
        case "launch":
            return device.launch_seconds
        case "dispatch":
            return device.dispatch_seconds
        case _:
            program = device.programs.get(number.kind)
            return None if program is None else program.slowdown


def file_error(cluster: Cluster, parts: Mapping[Number, float], what: str) -> float:
    """Standard error of the logarithm of a group's predicted seconds, by the ranges of the numbers behind them."""
    total = sum(parts.values())
    errors = [seconds / total * (stated_error(cluster, number) or 0.0) for number, seconds in parts.items()]
    if what in PHASE_OF:
        kernels = sum(seconds for number, seconds in parts.items() if number.kind in KERNELS)
        hosts = [number.host for number in parts if number.kind in KERNELS]
        if hosts:
            slowdown = stated_error(cluster, Number(PHASE_OF[what], hosts[0]))
            errors.append(kernels / total * (slowdown or 0.0))
    return hypot(*errors)


def fit_factors(seen: Sequence[tuple[Drift, Parts]], cluster: Cluster) -> Fit:
    """The factors that the found costs of one or several runs on one machine tell.

    Numbers whose factor the runs know to be 1 stay as they are, and the others are fitted without them; then the
    slowdowns of the programs' phases take what is left.
    """
    targets: Targets = {
        (run, o.group): (log(o.found_seconds), max(o.log_error, usual_error(drift, o)))
        for run, (drift, _) in enumerate(seen)
        for o in drift.observations
        if o.log_ratio is not None
    }
    known = {
        (run, group): found
        for run, (_, parts) in enumerate(seen)
        for group, found in parts.items()
        if (run, group) in targets and found
    }
    rates = _chosen(known, targets, cluster)
    slowdowns = _chosen(_phase_parts(known, rates), targets, cluster)
    return Fit({**rates.factors, **slowdowns.factors}, {**rates.kept, **slowdowns.kept})


def usual_error(drift: Drift, seen: Observation) -> float:
    """The standard error that groups like this one have: in a few steps, one of them agrees with itself by chance."""
    return median(
        o.log_error
        for o in drift.observations
        if o.log_ratio is not None and o.group.is_transfer == seen.group.is_transfer
    )


def _chosen(parts: Rows, targets: Targets, cluster: Cluster) -> Fit:
    """The fewest numbers that explain the costs: the one that explains most first, then what still adds something.

    Of numbers that a run cannot tell apart, the one that explains more is left to change; those that differ from 1 by
    less than they are uncertain leave in the end.
    """
    equations = _Equations.of(parts, targets, cluster)
    every = list(range(len(equations.numbers)))
    if not every:
        return Fit({})
    noise = np.hypot(equations.noise, equations.settle(every).misfit)
    chosen: list[int] = []
    surprise = equations.solve(chosen, noise).surprise
    while rest := [number for number in every if number not in chosen]:
        found = {number: equations.solve([*chosen, number], noise).surprise for number in rest}
        best = min(rest, key=lambda number: (found[number], number))
        if surprise - found[best] < SIGNIFICANT**2 / 2:
            break
        chosen, surprise = [*chosen, best], found[best]
    while True:
        factors = equations.factors(chosen)
        least = min(chosen, key=lambda number: _certainty(factors[equations.numbers[number]]), default=None)
        if least is None or _certainty(factors[equations.numbers[least]]) >= SIGNIFICANT:
            break
        chosen = [number for number in chosen if number != least]
    kept = {
        equations.numbers[n]: equations.factors([*chosen, n])[equations.numbers[n]] for n in every if n not in chosen
    }
    return Fit(factors, kept)


def _certainty(factor: Factor) -> float:
    """By how many standard errors a factor differs from 1; by none, where by less than clocks tell."""
    return abs(factor.log_value) / factor.log_error if abs(factor.log_value) > LEAST_CHANGE else 0.0


@dataclass(frozen=True, slots=True)
class _Solution:
    """Logarithms of the factors that were free, how sharp they are, and how well and how likely they fit.

    ``misfit`` is what groups differ from the model by beyond their noise, ``surprise`` the negative log posterior.
    """

    logs: Floats
    precision: Floats
    misfit: float
    surprise: float


@dataclass(frozen=True, slots=True, eq=False)
class _Equations:
    """One row a group: ``rest`` + the sum of ``seconds`` times factors is ``exp(target)``, to within ``noise``."""

    numbers: list[Number]
    seconds: Floats
    rest: Floats
    target: Floats
    noise: Floats
    width: Floats

    @staticmethod
    def of(parts: Rows, targets: Targets, cluster: Cluster) -> "_Equations":
        fixed = ("arithmetic", CONSTANT.kind)
        numbers = sorted({number for found in parts.values() for number in found if number.kind not in fixed})
        seconds = np.array([[found.get(number, 0.0) for number in numbers] for found in parts.values()])
        seconds = seconds.reshape(len(parts), len(numbers))
        return _Equations(
            numbers=numbers,
            seconds=seconds,
            rest=np.array([sum(found.values()) for found in parts.values()]) - seconds.sum(axis=1),
            target=np.array([targets[row][0] for row in parts]),
            noise=np.array([targets[row][1] for row in parts]),
            width=np.array([_width(cluster, number) for number in numbers]),
        )

    def solve(self, free: list[int], errors: Floats) -> _Solution:
        """Maximum a posteriori with all other factors 1: Gauss-Newton steps with Huber's and Cauchy's weights."""
        stay = self.rest + np.delete(self.seconds, free, axis=1).sum(axis=1)
        seconds, width = self.seconds[:, free], self.width[free]
        logs, precision = np.zeros(len(free)), np.zeros((len(free), len(free)))
        information = precision
        for _ in range(ROUNDS if free else 0):
            terms = seconds * np.exp(logs)
            model = stay + terms.sum(axis=1)
            slopes = terms / model[:, None]
            residual = self.target - np.log(model)
            weights = np.minimum(1.0, HUBER * errors / np.maximum(np.abs(residual), errors)) / errors**2
            information = (slopes.T * weights) @ slopes
            doubt = 2.0 / (width**2 + logs**2)  # of a Cauchy prior: the curvature of its tangent parabola
            precision = information + np.diag(doubt)
            step = np.linalg.solve(precision, slopes.T @ (weights * residual) - doubt * logs)
            logs = logs + np.clip(step, -1.0, 1.0)
            if np.abs(step).max() < 1e-6:
                break
        residual = self.target - np.log(stay + (seconds * np.exp(logs)).sum(axis=1))
        used = float(np.trace(np.linalg.solve(precision, information))) if free else 0.0
        near = np.minimum(np.abs(residual), OUTLIER * errors)
        excess = (near**2 - self.noise**2).sum() / max(1.0, len(residual) - used)
        far = np.abs(residual / errors)
        loss = np.where(far <= HUBER, far**2 / 2, HUBER * (far - HUBER / 2)).sum()
        return _Solution(logs, precision, sqrt(max(0.0, excess)), float(loss + np.log1p((logs / width) ** 2).sum()))

    def settle(self, free: list[int]) -> _Solution:
        """``solve`` with errors that hold what the groups differ from the model by."""
        solution = self.solve(free, self.noise)
        for _ in range(REFITS):
            solution = self.solve(free, np.hypot(self.noise, solution.misfit))
        return solution

    def factors(self, free: list[int]) -> dict[Number, Factor]:
        """The factors, with errors that the misfit widens."""
        solution = self.settle(free)
        errors = np.sqrt(np.diag(np.linalg.inv(solution.precision))) if free else np.zeros(0)
        return {
            self.numbers[number]: Factor(float(value), float(error))
            for number, value, error in zip(free, solution.logs, errors, strict=True)
        }


def _width(cluster: Cluster, number: Number) -> float:
    """How far from 1 a factor may be before the run: as the file states, but no number is beyond all doubt.

    The dispatch is measured by tiny programs in a row; what an executor adds to it nobody knows before it ran.
    """
    if number.kind == "dispatch" and not cluster.hosts[number.host].device.programs:
        return WIDEST
    stated = stated_error(cluster, number)
    return UNSTATED if stated is None else min(max(stated, NARROWEST), WIDEST)


def _phase_parts(rows: Rows, rates: Fit) -> Rows:
    """The parts as the rates leave them, those of kernels now in the name of their phase's slowdown."""
    phases: Rows = {}
    for (run, group), found in rows.items():
        if group.what not in PHASE_OF or group.is_transfer:
            continue
        now: dict[Number, float] = {}
        for number, seconds in found.items():
            name = Number(PHASE_OF[group.what], number.host) if number.kind in KERNELS else CONSTANT
            now[name] = now.get(name, 0.0) + seconds * exp(rates.log_of(number))
        phases[run, group] = now
    return phases
