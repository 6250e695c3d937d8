"""Our search of Aceso's space under Aceso's terms: any operators, devices and recomputation per stage.

The space: contiguous stages cut between any two operators, each on 1, 2, 4 or 8 devices as any width × replicas, and
any set of recomputed operators; convolutional models may change widths inside a stage and split either way. For each
micro-batch size and a guess of the bottleneck, a dynamic program over (stages behind, devices behind, cut) finds the
least sum of stages; the guesses close in on the best total. A stage's recomputation is the least one at a price of
memory, mixed at one point with that of the next price: not proved best, but hardly any memory is left unused.
Terms: ``experiments.rivals.aceso_costs``; inner loops: ``experiments.rivals.aceso_kernels``.
"""

import itertools
import math
import time
from dataclasses import dataclass

import numpy as np

from experiments.rivals import aceso_costs as terms
from experiments.rivals import aceso_kernels as kernels
from experiments.rivals.aceso_costs import Plan, Profile, Stage
from meshwright.errors import PlanError
from meshwright.plan.frontier import BoolArray, FloatArray, IntArray

_MOST_STAGES = 16  # as Aceso's
_WIDEN = 1.02  # steps of the guess where nothing is known yet
_CLOSE = 1.0005  # guesses of the bottleneck within this ratio are as good as one
_MIXING = frozenset({"resnet"})  # families whose operators may differ in width and algorithm inside a stage


@dataclass(frozen=True, slots=True)
class Answer:
    """The plan, Aceso's prediction for it, its largest memory, and the seconds that the search took."""

    plan: Plan
    seconds: float
    memory_mb: float
    search_seconds: float


def plan(profile: Profile, batch: int, gpus: int, limit_mb: float) -> Answer:
    """A plan that Aceso predicts to be fast, on ``gpus`` V100s of ``limit_mb`` each.

    Raises:
        PlanError: no plan fits.
    """
    began = time.perf_counter()
    searches = [_Search(profile, batch, m, gpus, limit_mb) for m in profile.microbatch_sizes if batch % m == 0]
    best, total = None, math.inf
    while searches:  # always the micro-batch size that may still be fastest
        search = min(searches, key=lambda search: search.bound_seconds)
        if search.bound_seconds >= total:
            break
        found, seconds = search.advance(total)
        if found is not None and seconds < total:
            best, total = found, seconds
        if search.closed:
            searches.remove(search)
    if best is None:
        raise PlanError(
            f"no stages of {len(profile.ops)} operators fit in {limit_mb / 1000:.1f} GB on {gpus} devices. Use more "
            f"devices or a smaller model."
        )
    memory = max(terms.plan_mb(profile, best))
    return Answer(best, terms.plan_seconds(profile, best), memory, time.perf_counter() - began)


class _Search:
    """One micro-batch size: the profile as arrays over (stage size, configuration, operator)."""

    def __init__(self, profile: Profile, batch: int, microbatch: int, gpus: int, limit_mb: float) -> None:
        self.profile, self.batch, self.microbatch, self.gpus, self.limit_mb = profile, batch, microbatch, gpus, limit_mb
        self.host = min(terms.HOST_GPUS, gpus)
        self.sizes = np.array([size for size in terms.WIDTHS if size <= self.host])
        self.steps = batch // microbatch - 1
        self.configurations = [self._configurations(int(size)) for size in self.sizes]
        most = max(map(len, self.configurations))
        mixed = profile.family in _MIXING
        shape = (len(self.sizes), 8, most, len(profile.ops))
        self.costs = np.full(shape, np.inf)
        self.algorithm = np.zeros((shape[0], most, shape[3]), dtype=np.int64)
        self.relayout = np.full((shape[0], most, most, shape[3]), np.inf)
        for s, configurations in enumerate(self.configurations):
            for c, configuration in enumerate(configurations):
                self._measure(s, c, configuration, terms.ALGORITHMS if mixed else 1)
            for a, b in itertools.product(range(len(configurations)), repeat=2):
                if a == b:
                    self.relayout[s, a, b] = 0.0
                elif mixed:
                    self.relayout[s, a, b] = [
                        terms.relayout_us(profile, configurations[a], configurations[b], size)
                        for size in self.costs[s, kernels.INPUT, b]
                    ]
        _, _, self.ends = terms.saved_by_recomputing(profile, np.zeros(shape[3]))
        fastest = np.minimum(self.costs[:, kernels.BOTH].min(axis=1), terms.FORBIDDEN_US)  # where nothing was measured
        zero = np.zeros((len(self.sizes), 1))
        self.least = np.concatenate((zero, fastest.cumsum(axis=1)), axis=1)
        self.work = np.concatenate(([0.0], (fastest * self.sizes[:, None]).min(axis=0).cumsum()))
        self.enter, self.leave = self._messages()
        self.groups = self._groups(mixed, most)
        self.twin, self.alike = self._repeats()
        self.shortest = float(fastest.min(axis=0).sum())  # of all operators, were each on the devices that suit it best
        self.low = float(self.work[-1]) / gpus  # no bottleneck below it
        messages = max(float(x.max(where=np.isfinite(x), initial=0.0)) for x in (self.enter, self.leave))
        self.slowest = 2 * (float(self.work[-1]) + messages)  # all on one device, all of it recomputed
        self.guess = self.low
        self.closed = False
        depth, cuts = min(gpus, _MOST_STAGES), shape[3] + 1
        memo = np.zeros((len(self.sizes), depth, cuts, cuts))
        self.caches = (memo, np.zeros(memo.shape, np.int8), np.zeros(memo.shape, np.int8))

    @property
    def bound_seconds(self) -> float:
        """No iteration of this micro-batch size that is still to be found is below it."""
        return (self.steps * self.low + self.shortest) * 1e-6

    def _configurations(self, size: int) -> list[tuple[int, int]]:
        """(width, replicas) of a stage size whose share of the micro-batch was profiled."""
        return [
            (width, size // width)
            for width in terms.WIDTHS
            if size % width == 0
            and self.microbatch % (size // width) == 0
            and self.microbatch // (size // width) in self.profile.microbatch_sizes
        ]

    def _groups(self, mixed: bool, most: int) -> BoolArray:
        """Per stage size, sets of configurations that may be used together."""
        single = np.tile(np.eye(most, dtype=bool), (len(self.sizes), 1, 1))
        return np.concatenate((single, np.ones_like(single[:, :1])), axis=1) if mixed and most > 1 else single

    def _measure(self, s: int, c: int, configuration: tuple[int, int], algorithms: int) -> None:
        """Fill in what was measured of a configuration, each operator split in its faster way."""
        width, replicas = configuration
        where = (
            slice(None),
            self.profile.microbatch_sizes.index(self.microbatch // replicas),
            terms.WIDTHS.index(width),
        )
        both = (self.profile.field("fwd_us") + self.profile.field("bwd_us"))[where][:, :algorithms]
        algorithm = both.argmin(axis=1)
        self.algorithm[s, c] = algorithm

        def pick(name: str) -> FloatArray:
            chosen: FloatArray = np.take_along_axis(self.profile.field(name)[where], algorithm[:, None], axis=1)[:, 0]
            return chosen

        held, spared, _ = terms.saved_by_recomputing(self.profile, pick("activations_MB"))
        barred = [op in terms.NEVER_RECOMPUTED for op in self.profile.ops]
        again = np.where(barred, terms.FORBIDDEN_US, pick("fwd_us"))
        rows = (again, pick("fwd_us") + pick("bwd_us"), held, spared, pick("weights_MB"))
        reserves = (pick("fwd_reserved_MB"), pick("bwd_reserved_MB"))
        self.costs[s, :, c] = np.stack((*rows, *reserves, pick("input_MB")))

    def _messages(self) -> tuple[FloatArray, FloatArray]:
        """µs to receive a stage's input, by (between hosts, size, first configuration, first operator), and to send its
        output, by (between hosts, size, first and last configuration, last operator).
        """
        sizes, _, most, operators = self.costs.shape
        enter, leave = np.full((2, sizes, most, operators), np.inf), np.full((2, sizes, most, most, operators), np.inf)
        output = self.profile.field("output_MB")
        for between, (s, configurations) in itertools.product((False, True), enumerate(self.configurations)):
            for a, (width, _) in enumerate(configurations):
                for n in range(operators):
                    size = self.costs[s, kernels.INPUT, a, n]
                    enter[int(between), s, a, n] = size / terms.bandwidth(self.profile, size, between)
                    for b, (_, replicas) in enumerate(configurations):
                        samples = self.profile.microbatch_sizes.index(self.microbatch // replicas)
                        sent = output[n, samples, terms.WIDTHS.index(width), self.algorithm[s, b, n]]
                        leave[int(between), s, a, b, n] = sent / terms.bandwidth(self.profile, sent, between)
        return enter, leave

    def _repeats(self) -> tuple[IntArray, IntArray]:
        """For each operator, an earlier one (or itself) from which the longest equal run starts, and its length."""
        columns = np.concatenate(
            (
                self.costs.reshape(-1, self.costs.shape[-1]),
                self.relayout.reshape(-1, self.costs.shape[-1]),
                self.ends[None],
            )
        )
        kinds = np.unique(columns, axis=1, return_inverse=True)[1].ravel()
        count = len(kinds)
        run = np.zeros((count + 1, count + 1), dtype=np.int64)  # length of the equal run from each pair of operators
        for n in range(count - 1, -1, -1):
            run[n, :count] = np.where(kinds[n] == kinds, run[n + 1, 1:] + 1, 0)
        earlier = np.tril(run[:count, :count], -1)
        twin = earlier.argmax(axis=1)
        alike = earlier[np.arange(count), twin]
        return np.where(alike > 0, twin, np.arange(count)), alike

    def advance(self, upper_seconds: float) -> tuple[Plan | None, float]:
        """Try the next guess of the bottleneck; where it leads to a plan, find the best one below ``upper_seconds``."""
        candidate = self._probe(self.guess)
        if candidate is None:
            self.low, self.guess = self.guess, self.guess * _WIDEN
            self.closed = self.low > self.slowest  # what is missing is memory
            return None, math.inf
        self.closed = True
        found, best = candidate, terms.plan_seconds(self.profile, candidate)
        low, high = self.low, self._slowest(candidate)
        while high > _CLOSE * low:
            middle = math.sqrt(low * high)
            candidate = self._probe(middle)
            if candidate is None:
                low = middle
            else:
                high = min(middle, self._slowest(candidate))  # choices found anew may be a trifle slower
                found, best = self._better(candidate, found, best)
        guess = high * _WIDEN  # a slower slowest stage may need fewer stages in all
        while (self.steps * guess + self.shortest) * 1e-6 < min(best, upper_seconds):
            candidate = self._probe(guess)
            if candidate is not None:
                found, best = self._better(candidate, found, best)
            guess *= _WIDEN
        return found, best

    def _better(self, candidate: Plan, found: Plan, best: float) -> tuple[Plan, float]:
        seconds = terms.plan_seconds(self.profile, candidate)
        return (candidate, seconds) if seconds < best else (found, best)

    def _slowest(self, candidate: Plan) -> float:
        times, first, gpus = [], 0, 0
        for stage in candidate.stages:
            seconds = terms.stage_seconds(self.profile, first, stage, self.microbatch, gpus, self.host)
            times.append(seconds)
            first, gpus = first + len(stage.width), gpus + stage.gpus
        return max(times) * 1e6

    def _probe(self, bottleneck: float) -> Plan | None:
        """The plan of least sum among those within a bottleneck (µs)."""
        total, after, size = kernels.chain(
            bottleneck, self.gpus, self.host, self.sizes, self.costs, self.relayout, self.groups, self.ends,
            self.profile.state_factor, self.limit_mb, self.least, self.work, self.enter, self.leave,
            self.twin, self.alike, *self.caches,
        )  # fmt: skip
        depth = int(total[:, self.gpus, 0].argmin())
        if total[depth, self.gpus, 0] == np.inf:
            return None
        stages, first, left = [], 0, self.gpus
        for k in range(depth, 0, -1):
            last, s = int(after[k, left, first]), int(size[k, left, first])
            stages.append(self._stage(s, first, last, k))
            first, left = last, left - int(self.sizes[s])
        return Plan(self.batch, self.microbatch, tuple(stages))

    def _stage(self, s: int, first: int, last: int, live: int) -> Stage:
        operators = len(self.profile.ops)
        config, again = np.zeros(operators, dtype=np.int64), np.zeros(operators, dtype=np.int64)
        scratch = np.zeros((4, operators), dtype=np.int64)
        parents = np.zeros((operators, 2 * self.costs.shape[2]), dtype=np.int64)
        kernels.stage(
            self.costs[s], self.relayout[s], self.groups[s], self.ends, self.profile.state_factor, self.limit_mb,
            np.inf, first, last, live, config, again, scratch, parents, np.ones(1),
        )  # fmt: skip
        span: IntArray = config[first:last]
        pairs = [self.configurations[s][c] for c in span]
        return Stage(
            int(self.sizes[s]),
            tuple(width for width, _ in pairs),
            tuple(replicas for _, replicas in pairs),
            tuple(int(self.algorithm[s, c, n]) for n, c in zip(range(first, last), span, strict=True)),
            tuple(bool(flag) for flag in again[first:last]),
        )
