"""Flows over shared links: drawings with known answers, and a slow fluid simulator that knows no tricks."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import ScheduleError
from meshwright.simulate.bottleneck import bottlenecks
from meshwright.simulate.engine import Run, Tasks, make_tasks, run_tasks


def flows(
    links: list[list[int]],
    bytes: list[float],
    capacity: list[float],
    *,
    dependencies: list[list[tuple[int, float]]] | None = None,
    weights: list[list[float]] | None = None,
    caps: list[float] | None = None,
    executor: list[int] | None = None,
) -> Tasks:
    """Tasks that are all flows, each over a list of links."""
    count = len(links)
    return make_tasks(
        np.zeros(count),
        executor or [-1] * count,
        dependencies,
        flow_bytes=bytes,
        flow_links=(np.cumsum([0, *map(len, links)]), [link for over in links for link in over]),
        flow_weights=None if weights is None else [weight for over in weights for weight in over],
        flow_bytes_per_second=np.inf if caps is None else caps,
        link_bytes_per_second=capacity,
    )


def ends(tasks: Tasks) -> list[float]:
    return run_tasks(tasks).end_seconds.tolist()


@pytest.mark.parametrize("k", [1, 2, 3, 10])
def test_k_equal_flows_share_one_link_equally(k: int) -> None:
    assert ends(flows([[0]] * k, [6.0] * k, [2.0])) == pytest.approx([3.0 * k] * k)


def test_a_short_flow_leaves_the_link_to_the_long_one() -> None:
    """2 and 6 bytes over 2 bytes/s: both at 1 until 2 s, then the rest of 4 bytes at 2 until 4 s."""
    assert ends(flows([[0], [0]], [2.0, 6.0], [2.0])) == pytest.approx([2.0, 4.0])


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_parking_lot(n: int) -> None:
    """One flow over n links, and on each a flow of its own: all get half of a link while the long one lasts."""
    tasks = flows([list(range(n)), *([k] for k in range(n))], [1.0] + [2.0] * n, [1.0] * n)
    assert ends(tasks) == pytest.approx([2.0] + [3.0] * n)


def test_what_the_narrow_link_does_not_take_the_wide_one_gives_to_others() -> None:
    """Max-min, not equal shares: a over (1, 10), b over 1, c over 10 bytes/s get 0.5, 0.5 and 9.5."""
    tasks = flows([[0, 1], [0], [1]], [1.0, 1.0, 19.0], [1.0, 10.0])
    assert ends(tasks) == pytest.approx([2.0, 2.0, 2.0])


def test_incast() -> None:
    """Eight senders with cards of 1 byte/s to a receiver of 2: each gets a quarter."""
    tasks = flows([[k, 8] for k in range(8)], [1.0] * 8, [1.0] * 8 + [2.0])
    assert ends(tasks) == pytest.approx([4.0] * 8)


def test_a_cap_leaves_the_rest_to_others() -> None:
    assert ends(flows([[0], [0]], [1.0, 9.0], [10.0], caps=[1.0, math.inf])) == pytest.approx([1.0, 1.0])


def test_a_flow_of_many_links_weighs_on_each_as_it_says() -> None:
    """A ring that puts 1.5 bytes on a link for each of its own: alone at 2/3 of the link's capacity."""
    assert ends(flows([[0]], [2.0], [3.0], weights=[[1.5]])) == pytest.approx([1.0])
    both = flows([[0, 1], [1]], [2.0, 2.0], [9.0, 3.0], weights=[[1.5, 0.5], [1.0]])
    assert ends(both) == pytest.approx([1.0, 1.0])  # on link 1: 2 × 0.5 + 2 × 1 = 3


def test_a_channel_sends_in_order_and_latency_does_not_hold_it() -> None:
    """Two flows on one executor, 3 s each; what waits for the first one starts half a second after its end."""
    tasks = flows([[0], [0], [1]], [3.0] * 3, [1.0, 3.0], dependencies=[[], [], [(0, 0.5)]], executor=[0, 0, -1])
    assert ends(tasks) == pytest.approx([3.0, 6.0, 4.5])


def test_a_flow_of_no_link_moves_at_its_cap() -> None:
    assert ends(flows([[], [0]], [3.0, 1.0], [1.0], caps=[2.0, math.inf])) == [1.5, 1.0]


def test_no_bytes_take_no_time_and_hold_nobody() -> None:
    assert ends(flows([[0], [0]], [0.0, 4.0], [2.0])) == [0.0, 2.0]


@st.composite
def networks(draw: st.DrawFn) -> Tasks:
    links, count = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    over = [draw(st.lists(st.integers(0, links - 1), unique=True, min_size=1, max_size=3)) for _ in range(count)]
    amounts = st.sampled_from([0.0, 1.0, 2.0, 3.5, 7.0])
    some_weights = st.sampled_from([0.5, 1.0, 1.75])
    return flows(
        over,
        [draw(amounts) for _ in range(count)],
        [draw(st.sampled_from([1.0, 2.0, 3.0, 10.0])) for _ in range(links)],
        dependencies=[
            [(k, draw(st.sampled_from([0.0, 0.5]))) for k in draw(st.sets(st.integers(0, t - 1), max_size=2))]
            if t
            else []
            for t in range(count)
        ],
        weights=[[draw(some_weights) for _ in one] for one in over],
        caps=[draw(st.sampled_from([0.5, 2.0, math.inf])) for _ in over],
        executor=[draw(st.integers(-1, 1)) for _ in range(count)],
    )


def water(tasks: Tasks, active: list[int]) -> dict[int, float]:
    """Rates by the definition: raise all together, stop those at a full link or at their cap, go on with the rest."""
    net = tasks.flows
    assert net is not None
    entries = {f: range(net.first[f], net.first[f + 1]) for f in active}
    uses = {f: [(net.link[e], net.weight[e]) for e in entries[f]] for f in active}
    rate, rising = dict.fromkeys(active, 0.0), set(active)
    while rising:
        steps = [net.bytes_per_second[f] - rate[f] for f in rising]
        for k, capacity in enumerate(net.link_bytes_per_second):
            load = sum(weight for f in rising for link, weight in uses[f] if link == k)
            used = sum(rate[f] * weight for f in active for link, weight in uses[f] if link == k)
            if load:
                steps.append((capacity - used) / load)
        step = max(0.0, min(steps))
        for f in rising:
            rate[f] += step
        full = {
            k
            for k, capacity in enumerate(net.link_bytes_per_second)
            if sum(rate[f] * weight for f in active for link, weight in uses[f] if link == k) >= capacity * (1 - 1e-9)
        }
        rising = {
            f
            for f in rising
            if rate[f] < net.bytes_per_second[f] * (1 - 1e-9) and not any(link in full for link, _ in uses[f])
        }
    return rate


def slow(tasks: Tasks) -> list[float]:
    """Ends of all flows, from one change to the next."""
    net = tasks.flows
    assert net is not None
    count, now = tasks.count, 0.0
    end, left = [math.inf] * count, net.bytes.tolist()
    started: set[int] = set()

    def ready_at(task: int) -> float:
        edges = range(tasks.edge_start[task], tasks.edge_start[task + 1])
        mates = [t for t in range(task) if tasks.executor[t] == tasks.executor[task] >= 0]
        arrivals = [end[tasks.edge_from[e]] + tasks.edge_latency_seconds[e] for e in edges]
        return max([0.0, *arrivals, *(end[t] for t in mates)])

    while math.inf in end:
        for task in range(count):  # tasks of no bytes may start others at this instant: later ones, as lists are sorted
            if task not in started and ready_at(task) <= now + 1e-12:
                started.add(task)
                if left[task] == 0:
                    end[task] = now
        active = [task for task in started if end[task] == math.inf]
        rate = water(tasks, active)
        arrivals = [ready_at(task) for task in range(count) if task not in started]
        then = min([*(now + left[f] / rate[f] for f in active), *arrivals], default=now)
        for f in active:
            left[f] -= rate[f] * (then - now)
            if left[f] <= 1e-9:
                left[f], end[f] = 0.0, then
        now = then
    return end


@given(networks())
@settings(max_examples=250, deadline=None)
def test_the_engine_equals_the_slow_fluid_simulator(tasks: Tasks) -> None:
    assert ends(tasks) == pytest.approx(slow(tasks), rel=1e-6, abs=1e-6)


@given(networks())
@settings(max_examples=60, deadline=None)
def test_the_same_input_gives_the_same_output_to_the_last_bit(tasks: Tasks) -> None:
    first, second = run_tasks(tasks), run_tasks(tasks)
    assert (first.start_seconds == second.start_seconds).all()
    assert (first.end_seconds == second.end_seconds).all()
    assert (first.waited_for == second.waited_for).all()


@given(networks())
@settings(max_examples=60, deadline=None)
def test_no_link_carries_more_than_it_can(tasks: Tasks) -> None:
    """Over the whole run: bytes on a link are at most its capacity times the time it is in use."""
    run, net = run_tasks(tasks), tasks.flows
    assert net is not None
    for k, capacity in enumerate(net.link_bytes_per_second):
        carried, spans = 0.0, []
        for f in range(tasks.count):
            for e in range(net.first[f], net.first[f + 1]):
                if net.link[e] == k and net.bytes[f]:
                    carried += net.weight[e] * net.bytes[f]
                    spans.append((run.start_seconds[f], run.end_seconds[f]))
        assert carried <= capacity * union(spans) * (1 + 1e-9)


def union(spans: list[tuple[float, float]]) -> float:
    total, until = 0.0, -math.inf
    for begin, finish in sorted(spans):
        total += max(0.0, finish - max(begin, until))
        until = max(until, finish)
    return total


def test_a_thousand_flows_in_one_place_end_when_they_should() -> None:
    """Flow k brings k + 1 bytes to one link of 1 byte/s: the last one ends with the sum of all."""
    count = 1000
    run: Run = run_tasks(flows([[0]] * count, [k + 1.0 for k in range(count)], [1.0]))
    assert run.makespan_seconds == pytest.approx(count * (count + 1) / 2)
    assert (np.diff(run.end_seconds) > 0).all()


@st.composite
def stars(draw: st.DrawFn) -> Tasks:
    """Groups of flows into one link each, from cards of their own that are at least as quick."""
    over, capacity = [], [draw(st.sampled_from([1.0, 2.0, 3.0])) for _ in range(draw(st.integers(1, 3)))]
    hubs = len(capacity)
    for _ in range(draw(st.integers(1, 12))):
        hub = draw(st.integers(0, hubs - 1))
        over.append([len(capacity), hub])
        capacity.append(capacity[hub] * draw(st.sampled_from([1.0, 1.5])))
    count = len(over)
    return flows(
        over,
        [draw(st.sampled_from([0.0, 1.0, 2.0, 3.5])) for _ in range(count)],
        capacity,
        dependencies=[[(draw(st.integers(0, t - 1)), 0.5)] if t and draw(st.booleans()) else [] for t in range(count)],
    )


def only_links(tasks: Tasks) -> list[int]:
    net = tasks.flows
    assert net is not None
    arrays = (net.bytes, net.first, net.link, net.weight, net.bytes_per_second, net.link_bytes_per_second)
    found: list[int] = bottlenecks(*arrays)[0].tolist()
    return found


@given(stars())
@settings(max_examples=150, deadline=None)
def test_flows_that_one_link_holds_back_end_as_the_slow_simulator_says(tasks: Tasks) -> None:
    net = tasks.flows
    assert net is not None
    moves = net.bytes > 0
    assert [link >= 0 for link in only_links(tasks)] == moves.tolist()
    assert ends(tasks) == pytest.approx(slow(tasks), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        (flows([[0], [0]], [1.0, 1.0], [2.0]), [0, 0]),
        (flows([[0], [0]], [1.0, 1.0], [2.0], weights=[[1.0], [2.0]]), [-1, -1]),  # the lighter may be alone
        (flows([[0], [0]], [1.0, 1.0], [2.0], caps=[math.inf, 1.9]), [-1, -1]),
        (flows([[0, 1], [0], [1]], [1.0] * 3, [1.0, 10.0]), [-1, -1, -1]),
        (flows([[1, 0], [2, 0], [3]], [1.0] * 3, [2.0, 2.0, 1.9, 1.0]), [-1, -1, 3]),  # a slower card of its own
        (flows([[0, 0]], [1.0], [2.0]), [-1]),  # named twice, it carries the flow twice
    ],
)
def test_one_link_holds_flows_back_only_if_it_always_does(tasks: Tasks, expected: list[int]) -> None:
    assert only_links(tasks) == expected


@pytest.mark.parametrize(
    ("links", "bytes", "capacity", "extra", "message"),
    [
        ([[1]], [1.0], [1.0], {}, "link is out of range: 1..1"),
        ([[0]], [1.0], [0.0], {}, "a link's bytes per second is 0"),
        ([[0]], [1.0], [-2.0], {}, "a link's bytes per second is -2"),
        ([[0]], [1.0], [math.nan], {}, "a link's bytes per second is nan"),
        ([[0]], [1.0], [math.inf], {}, "a link's bytes per second is inf"),
        ([[0]], [-1.0], [1.0], {}, "bytes are negative or not finite"),
        ([[0]], [math.inf], [1.0], {}, "bytes are negative or not finite"),
        ([[0]], [1.0], [1.0], {"weights": [[0.0]]}, "weight on a link is 0"),
        ([[0]], [1.0], [1.0], {"caps": [0.0]}, "cap of bytes per second is 0"),
        ([[]], [1.0], [1.0], {}, "task 0 has no link and no cap"),
    ],
)
def test_impossible_flows_are_refused_in_one_line(
    links: list[list[int]], bytes: list[float], capacity: list[float], extra: dict[str, list[float]], message: str
) -> None:
    with pytest.raises(ScheduleError, match=message):
        flows(links, bytes, capacity, **extra)  # type: ignore[arg-type]
