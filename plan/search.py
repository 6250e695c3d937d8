"""The outer loop: micro-batch count × schedule × rematerialisation, stages by the DP, the simulator as the judge.

No JAX here: the caller passes a function that gives the traced graph for a number of micro-batches.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from meshwright.errors import ModelError, PlanError
from meshwright.plan.answer import plan_of
from meshwright.plan.bounds import least_seconds
from meshwright.plan.candidates import MEMORY_PRICES, Priced, Way, memory_is_no_matter, stage_plans
from meshwright.plan.graph import ModelGraph
from meshwright.plan.judge import Candidate, Judged, judge_candidate, winner_of, within
from meshwright.plan.planfile import Plan, bytes_text
from meshwright.plan.request import SURE_SHARE, Fix, Request, microbatch_counts, refined_counts
from meshwright.plan.schedule_rules import GRAPH, SIMPLE, ScheduleRule, find_rule
from meshwright.plan.zero import ZERO_PRICES

__all__ = ["Fix", "Graphs", "Progress", "Request", "microbatch_counts", "search"]

Graphs = Callable[[int], ModelGraph]
Progress = Callable[[int, int, str], None]

_MICROBATCHES_A_DEVICE = 4  # where the search starts: enough to fill a pipeline of all devices
_SIMULATED_PER_SETTING = 3
_CLEARLY_LEANER = 0.05  # of a device: a fallback that saves less is none


def search(graphs: Graphs, request: Request, progress: Progress | None = None) -> Plan:
    """The best plan found, with its runners-up and a fallback.

    Errors: PlanError if no plan fits, or if what is fixed does not go together.
    """
    return _Search(graphs, request, progress).run()


@dataclass(slots=True)
class _Clock:
    """Where the search spends its time, and how much it did."""

    begun: float = field(default_factory=time.perf_counter)
    trace: float = 0.0
    intra: float = 0.0
    inter: float = 0.0
    simulate: float = 0.0
    candidates: int = 0
    simulations: int = 0
    ilp_solves: int = 0
    counts: int = 0
    pruned: int = 0

    def facts(self) -> dict[str, int | float]:
        """For the plan."""
        return {
            "seconds": time.perf_counter() - self.begun,
            "trace_seconds": self.trace,
            "ilp_seconds": self.intra,
            "ilp_solves": self.ilp_solves,
            "dp_seconds": self.inter,
            "simulate_seconds": self.simulate,
            "candidates": self.candidates,
            "simulations": self.simulations,
            "microbatch_counts": self.counts,
            "pruned": self.pruned,
        }


class _Search:
    """One search: what was asked, and all that was found so far."""

    def __init__(self, graphs: Graphs, request: Request, progress: Progress | None) -> None:
        self.graphs, self.request, self.progress = graphs, request, progress
        rules = [find_rule(name) for name in request.searched_schedules]
        self.rules = tuple(sorted(rules, key=lambda rule: rule.name != "1f1b"))  # which holds least: it goes first
        self.clock = _Clock()
        self.judged: list[Judged] = []
        self.reasons: list[str] = []
        self.untraced: ModelError | None = None
        self.bounds: dict[int, float] = {}  # micro-batches -> least seconds of a step
        self.too_large: set[int] = set()  # numbers of micro-batches with which nothing fits

    @property
    def finalists(self) -> int:
        """Stages that the simulator judges, of each setting; Alpa's objective is taken at its word."""
        return _SIMULATED_PER_SETTING if self.request.cross_mesh else 1

    def run(self) -> Plan:
        """Try all numbers of micro-batches that may win, the likeliest first, and those beside the best."""
        request = self.request
        counts = microbatch_counts(request.batch, request.fix.microbatches)
        stopped = self._try_all(counts)
        best = self._best()
        if best is not None and request.fix.microbatches is None and not stopped:
            finer = refined_counts(request.batch, best.candidate.microbatches, counts)
            stopped = self._try_all(finer)
        winner = self._best()
        if winner is None:
            if self.untraced is not None and not self.judged and not self.reasons:
                raise self.untraced
            raise PlanError(self._why_nothing_fits())
        fallback = self._fallback(winner)
        self._tell(1, 1, "done")
        notes = [stopped] if stopped else []
        return plan_of(winner, self.judged, fallback, request, self.clock.facts(), notes)

    # -- numbers of micro-batches -----------------------------------------------------------------------------------

    def _try_all(self, counts: list[int]) -> str:
        """Try these numbers, from the middle outwards; says so if the time was over before the end."""
        start = _MICROBATCHES_A_DEVICE * self.request.cluster.devices
        outwards = sorted(counts, key=lambda count: (max(count, start) / min(count, start), -count))
        for done, count in enumerate(outwards):
            if self._time_is_over():
                limit = self.request.time_limit_seconds
                return (
                    f"the search stopped after its {limit:g} seconds with {done} of {len(outwards)} numbers of "
                    "micro-batches tried; a longer --time-limit may find a better plan"
                )
            if self._cannot_win(count):
                self.clock.pruned += 1
                continue
            self._tell(done, len(outwards), f"{count} micro-batches")
            self._try(count)
        return ""

    def _cannot_win(self, count: int) -> bool:
        """Whether a number tried before says that this one is slower or does not fit.

        More micro-batches are smaller, and no kernel is quicker per sample for that: their least time is not below that
        of fewer. Fewer are larger, and need more memory.
        """
        best = self._best()
        slow = best is not None and any(tried < count and least > best.seconds for tried, least in self.bounds.items())
        return slow or any(tried > count for tried in self.too_large)

    def _try(self, count: int) -> None:
        start = time.perf_counter()
        try:
            graph = self.graphs(count)
        except ModelError as error:  # micro-batches too small for the model's groups, or not allowed at all
            self.untraced = error
            return
        finally:
            self.clock.trace += time.perf_counter() - start
        self.clock.counts += 1
        _refuse_if_hopeless(graph, self.request)
        priced = Priced(graph, count, self.request)
        if self._least_is_too_much(priced):
            self.clock.pruned += 1
            return
        found = False
        for candidate in self._candidates(priced):
            found = True
            self.judged.append(self._judge(candidate, self.request))
            if self._time_is_over():
                break
        self.clock.ilp_solves += priced.ilp_solves
        if not found and any(rule.name in SIMPLE for rule in self.rules):  # others may refuse the number itself
            self.too_large.add(count)

    def _least_is_too_much(self, priced: Priced) -> bool:
        """Whether even a step without a bubble, a transfer or a limit of memory is slower than the best so far."""
        start = time.perf_counter()
        _, table = priced.at(*self.ways[0])
        least = least_seconds(table, priced.microbatches) / priced.slowdown
        self.clock.intra += time.perf_counter() - start
        self.bounds[priced.microbatches] = least
        best = self._best()
        return best is not None and least > best.seconds

    def _candidates(self, priced: Priced) -> Iterator[Candidate]:
        """The stage DP's best for each schedule; where memory is short, each stage may be run in any way.

        A schedule that does not fit where another does is given up.
        """
        request, count = priced.request, priced.microbatches
        unsolved = [rule for rule in self.rules if rule is not GRAPH or priced.branches]
        if not unsolved:
            self.reasons.append(f"no layers of {priced.graph.name} may run side by side; use 1f1b for {GRAPH.name}")
        for ways in self.ways:
            if not unsolved:
                return
            start = time.perf_counter()
            pricer, table = priced.at(*ways)
            self.clock.intra += time.perf_counter() - start
            failed: set[ScheduleRule] = set()
            found = False
            for rule in tuple(unsolved):
                if SIMPLE["1f1b"] in failed and rule.name in SIMPLE:
                    failed.add(rule)  # no other schedule with one stage a mesh holds fewer micro-batches
                    continue
                start = time.perf_counter()
                try:
                    plans = stage_plans(pricer, table, request, count, rule, self.finalists)
                    free = all(price == 0.0 for _, price in ways)
                    enough = free and memory_is_no_matter(pricer, table, plans[0], request, count, rule)
                except PlanError as error:
                    self.reasons.append(str(error))
                    failed.add(rule)
                    continue
                finally:
                    self.clock.inter += time.perf_counter() - start
                if enough:
                    unsolved.remove(rule)
                self.clock.candidates += len(plans)
                yield from (Candidate(rule, pricer, plan) for plan in plans)
                found = True
            if found:
                unsolved = [rule for rule in unsolved if rule not in failed]

    @cached_property
    def ways(self) -> tuple[tuple[Way, ...], ...]:
        """The ways to run a stage among which the stage DP chooses: first the quickest, then by price of memory.

        Which price is best cannot be told beforehand: strategies that keep fewer bytes may be slower, and yet allow
        larger stages, or some to recompute nothing.
        """
        remat = self.request.fix.remat
        prices = sorted({*MEMORY_PRICES, *(ZERO_PRICES if self.request.zero else ())})
        if remat is not None:
            return tuple(((remat, price),) for price in prices)
        return ((("none", 0.0),), *((("none", price), ("full", price)) for price in prices))

    def _judge(self, candidate: Candidate, request: Request) -> Judged:
        start = time.perf_counter()
        judged = judge_candidate(candidate, request)
        self.clock.simulate += time.perf_counter() - start
        self.clock.simulations += 1
        return judged

    # -- the best so far --------------------------------------------------------------------------------------------

    def _best(self) -> Judged | None:
        """The winner among what was judged, within the memory margin."""
        fitting = within(self.judged, self.request.usable_bytes)
        return winner_of(fitting, self.request) if fitting else None

    def _fallback(self, winner: Judged) -> Judged | None:
        """A leaner plan than the winner: the fastest that surely fits, else the leanest if it is clearly leaner."""
        request = replace(self.request, memory_margin=1 - SURE_SHARE)
        if within([winner], request.usable_bytes):
            return None
        known = [j for j in self.judged if j.candidate.rule.runnable or not winner.candidate.rule.runnable]
        if not within(known, request.usable_bytes) and not self._time_is_over():
            known += [self._judge(candidate, request) for candidate in self._lean(winner, request)]
        sure = within(known, request.usable_bytes)
        if sure:
            return winner_of(sure, request)
        leanest = min(known, key=lambda j: (j.predicted.peak_memory_bytes, j.seconds, j.name))
        saved = winner.predicted.peak_memory_bytes - leanest.predicted.peak_memory_bytes
        return leanest if saved > _CLEARLY_LEANER * request.device_bytes else None

    def _lean(self, winner: Judged, request: Request) -> Iterator[Candidate]:
        """Candidates beside the winner within the memory of a request."""
        rule, count = winner.candidate.rule, winner.candidate.microbatches
        priced = Priced(winner.candidate.graph, count, request, winner.candidate.pricer.spaces)
        start = time.perf_counter()
        try:
            pricer, table = priced.at(*self.ways[-1])  # the leanest
            plans = stage_plans(pricer, table, request, count, rule, 1)
        except PlanError:
            return
        finally:
            self.clock.intra += time.perf_counter() - start
        yield from (Candidate(rule, pricer, plan) for plan in plans)

    def _time_is_over(self) -> bool:
        limit = self.request.time_limit_seconds
        return limit is not None and time.perf_counter() - self.clock.begun > limit and self._best() is not None

    def _tell(self, done: int, total: int, text: str) -> None:
        if self.progress is None:
            return
        best = self._best()
        so_far = "" if best is None else f", best {best.seconds:.4g} s: {best.name}"
        self.progress(done, total, text + so_far)

    def _why_nothing_fits(self) -> str:
        request = self.request
        if not self.judged:
            why = self.reasons[-1] if self.reasons else "nothing was tried"
            return f"no plan fits on {request.cluster.name}: {why}"
        least = min(j.predicted.peak_memory_bytes for j in self.judged)
        free = f" of which {request.memory_margin:.0%} are kept free" if request.memory_margin else ""
        return (
            f"no plan fits: the leanest needs {bytes_text(least)} on a device of {bytes_text(request.device_bytes)}"
            f"{free}; use more devices, a smaller batch or a smaller model"
            + ("" if self.request.zero else ", or plan with --zero auto (for which there is no executor yet)")
        )


def _refuse_if_hopeless(graph: ModelGraph, request: Request) -> None:
    """Say at once that weights, gradients and optimizer state alone exceed the memory of all devices together."""
    needed = graph.training_bytes(request.memory.optimizer_bytes)
    there = sum(host.devices * host.device.memory_bytes.value for host in request.cluster.hosts)
    if needed > there:
        devices = sum(host.devices for host in request.cluster.hosts)
        raise PlanError(
            f"no plan fits: weights, gradients and optimizer state of {graph.name} need {bytes_text(needed)}, and the "
            f"{devices} devices of {request.cluster.name} have {bytes_text(there)} together; "
            f"use more than {int(needed / there * devices)} such devices or a smaller model"
        )
