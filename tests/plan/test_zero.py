"""ZeRO's ladder in closed forms, and as strategies that elimination, the ILP and brute force choose alike."""

from functools import cache
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.calibrate.hardware import Link, parse_cluster
from meshwright.calibrate.quantity import Quantity
from meshwright.models.zoo import get_model
from meshwright.plan.graph import Dims, LayerGraph, Operator, Phase, Rule, Tensor
from meshwright.plan.intra import Weights, problem_of, solve_layer
from meshwright.plan.priced import priced_collectives
from meshwright.plan.sharding import LogicalMesh, reduce_to, shards
from meshwright.plan.space import BM, FM, OC, OM, STATIC, Memory, Space, build_space
from meshwright.plan.trace.model import trace
from meshwright.plan.zero import finer, stored_ways

SAMPLES, WIDE, NARROW = 16, 32, 24
PARAMETER_BYTES = 4 * WIDE * NARROW
RATE = 1e6  # bytes per second of every link: seconds times rate are bytes sent


def mesh(*sizes: int) -> LogicalMesh:
    link = Link(bytes_per_second=Quantity(RATE, "test"), latency_seconds=Quantity(0.0, "test"))
    return LogicalMesh(sizes, (link,) * len(sizes), parse_cluster("dgx-a100:1").device(0))


def product_of_samples() -> LayerGraph:
    """y = x W and, backward, dx = dy Wᵀ and dW = xᵀ dy: the smallest layer that trains."""
    x, w, dy = (SAMPLES, WIDE), (WIDE, NARROW), (SAMPLES, NARROW)
    tensors = tuple(Tensor(shape, "float32") for shape in (x, w, dy, dy, x, w))

    def matmul(phase: Phase, inputs: Dims, output: int, left: Dims, right: Dims, result: Dims) -> Operator:
        contracted = frozenset(set(left) - set(result))
        rule = Rule((left, right), (result,), (SAMPLES, WIDE, NARROW), contracted)
        return Operator("dot_general", inputs, (output,), rule, "matmul", 2.0 * SAMPLES * WIDE * NARROW, phase)

    operators = (  # factors: 0 samples, 1 wide, 2 narrow
        matmul("forward", (0, 1), 2, (0, 1), (1, 2), (0, 2)),
        matmul("backward", (3, 1), 4, (0, 2), (1, 2), (0, 1)),
        matmul("backward", (0, 3), 5, (0, 1), (0, 2), (1, 2)),
    )
    return LayerGraph(tensors, operators, (1,), (), (0,), (2,), (4,), (3,), (5,), (), (0,))


def space_of(sizes: tuple[int, ...], zero: int) -> Space:
    grid = mesh(*sizes)
    data = tuple(range(len(sizes)))
    return build_space(product_of_samples(), grid, Memory(), [data], ("data",) * len(sizes), zero)


def best_at_level(space: Space, level: int) -> tuple[int, ...]:
    """The best data-parallel assignment whose one parameter is kept at a level, over all axes."""
    problem = problem_of(space, Weights(4))
    (storage,) = space.stored.values()
    choices = product(*(range(costs.size) for costs in problem.node_seconds))
    finest = [c for c in choices if storage.options[c[storage.node]].level == level]
    whole = [c for c in finest if level == 0 or shards(storage.options[c[storage.node]].kept, space.mesh) == 4]
    return min(whole, key=problem.seconds)


@pytest.mark.parametrize("sizes", [(4,), (2, 2)])
@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_each_level_holds_and_sends_what_the_paper_says(sizes: tuple[int, ...], level: int) -> None:
    """Rajbhandari et al., SC 2020: with Adam in f32, P bytes of weights keep P + P + 2P; each becomes 1 / n in turn.

    Sent: 2(n-1)/n P a step at levels 0 and 1; level 2 scatters (n-1)/n P every micro-batch and gathers as much once;
    level 3 gathers twice and scatters once every micro-batch (the paper's 1.5 times, section 7.2.2, with one).
    """
    space = space_of(sizes, 3)
    costs = space.costs(best_at_level(space, level))
    p, n = PARAMETER_BYTES, 4
    part = p / n
    resident = {0: 4 * p, 1: 2 * p + 2 * part, 2: p + 3 * part, 3: 4 * part}[level]
    assert costs[STATIC] == pytest.approx(resident)
    gather = {(4,): 3 / 4, (2, 2): 1 / 4 + 1 / 2}[sizes] * p  # axis by axis the same bytes
    all_reduce = {(4,): 2 * 3 / 4, (2, 2): 2 * (1 / 2 + 1 / 2)}[sizes] * p
    sent = {0: (0, 0, all_reduce), 1: (0, 0, 2 * gather), 2: (0, gather, gather), 3: (gather, 2 * gather, 0)}[level]
    assert costs[[FM, BM, OM]] * RATE == pytest.approx(np.array(sent))
    plain = space_of(sizes, 0)
    assert plain.costs([0] * len(plain.node_costs))[OC] == pytest.approx(costs[OC] * {0: 1, 1: 40 / 19}.get(level, n))


def test_without_zero_nothing_changes() -> None:
    plain, offered = space_of((4,), 0), space_of((4,), 3)
    assert plain.stored == {}
    np.testing.assert_allclose(
        plain.costs([0] * len(plain.node_costs)), offered.costs(best_at_level(offered, 0)), rtol=1e-12
    )


@pytest.mark.parametrize("sizes", [(2,), (2, 2)])
@pytest.mark.parametrize("price", [0.0, 1e-9, 1e-6, 1e-3])
def test_elimination_the_ilp_and_brute_force_agree(sizes: tuple[int, ...], price: float) -> None:
    space = build_space(product_of_samples(), mesh(*sizes), Memory(), zero=3)
    weights = Weights(2, seconds_per_byte=price)
    problem = problem_of(space, weights)
    eliminated, solved = solve_layer(space, weights), solve_layer(space, weights, use_ilp=True)
    np.testing.assert_allclose(eliminated.objective, solved.objective, rtol=1e-9)
    if len(sizes) == 1:
        everything = product(*(range(costs.size) for costs in problem.node_seconds))
        assert min(map(problem.seconds, everything)) == pytest.approx(eliminated.objective.min(), rel=1e-12)


def test_a_dearer_byte_is_kept_more_finely() -> None:
    """With four micro-batches level 2 costs 9/16 P more of traffic than level 1 and level 3 21/16 P more than level 2.

    Each keeps 3/4 P less: at 10⁶ bytes a second they pay from 0.75 and 1.75 µs a byte on. Level 1 halves the update for
    nothing.
    """
    space = space_of((4,), 3)
    (gradient,) = space.stored
    found = [solve_layer(space, Weights(4, seconds_per_byte=price)) for price in (0.0, 0.7e-6, 0.8e-6, 1.7e-6, 1.8e-6)]
    levels = [space.way(gradient, table.choice(0, 0)) for table in found]
    assert [way.level for way in levels if way is not None] == [1, 1, 2, 2, 3]
    resident = [float(table.costs[STATIC, 0, 0]) for table in found]
    assert resident == sorted(resident, reverse=True)
    assert resident[-1] == PARAMETER_BYTES


def test_what_is_gathered_and_scattered_is_held_for_a_moment() -> None:
    space = space_of((4,), 3)
    held = [space.momentary_bytes(best_at_level(space, level)) for level in range(4)]
    assert held == [0, 0, PARAMETER_BYTES, 2 * PARAMETER_BYTES]


def test_a_sum_that_is_scattered_in_each_micro_batch_does_not_wait() -> None:
    space = space_of((4,), 3)
    assert [space.partial_axes(5, best_at_level(space, level)) for level in range(4)] == [(0,), (0,), (), ()]


@cache
def block_space() -> Space:
    graph = trace(get_model("gpt:layers=3,hidden=32,heads=4,seq=16,vocab=64"), 4, 1).graph
    return build_space(graph.classes[graph.layers[1].layer_class], mesh(2, 2), Memory(), zero=3)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_second_of_storage_is_listed_as_a_collective(seed: int) -> None:
    space = block_space()
    random = np.random.default_rng(seed)
    choice = [int(random.integers(costs.shape[1])) for costs in space.node_costs]
    totals = dict.fromkeys(("forward", "backward", "once"), 0.0)
    for priced in priced_collectives(space, choice):
        totals[priced.phase] += priced.seconds
    costs = space.costs(choice)
    assert list(totals.values()) == pytest.approx([costs[FM], costs[BM], costs[OM]], rel=1e-9, abs=1e-15)


def test_more_ways_are_never_worse_and_agree_with_the_ilp_on_a_transformer_layer() -> None:
    space = block_space()
    plain = build_space(space.graph, space.mesh, Memory())
    for price in (0.0, 1e-7):
        weights = Weights(4, seconds_per_byte=price)
        table = solve_layer(space, weights)
        assert (table.objective <= solve_layer(plain, weights).objective * (1 + 1e-12)).all()
    line = build_space(space.graph, mesh(2), Memory(), zero=3)
    by_ilp = solve_layer(line, weights, use_ilp=True)
    np.testing.assert_allclose(solve_layer(line, weights).objective, by_ilp.objective, rtol=1e-9)


def test_a_finer_split_takes_whole_dims_first_and_none_that_does_not_divide() -> None:
    grid = mesh(2, 4)
    assert finer(Tensor((8, 16), "float32"), ((1,), ()), (0,), grid) == ((1,), (0,))
    assert finer(Tensor((8, 3), "float32"), ((1,), ()), (0,), grid) == ((0, 1), ())
    assert finer(Tensor((3, 5), "float32"), ((), ()), (0,), grid) is None
    ways = stored_ways(Tensor((8,), "float32"), [((),), ((1,),), ((0, 1),)], grid, 2)
    assert len(ways) == 3 + 2 * 3 + 2 * 1  # plain; whole over either axis or both; split by one, over the other
    assert all(shards(way.kept, grid) > shards(way.read, grid) for way in ways if way.level)


def test_partial_sums_go_straight_to_a_split_result() -> None:
    """A reduce-scatter sends half of an all-reduce's bytes; an axis that does not split the result is all-reduced."""
    grid, tensor = mesh(2, 4), Tensor((8, 16), "float32")
    straight = reduce_to(tensor, ((), ()), (1,), ((1,), ()), grid)
    assert [(c.kind, c.axes, c.elements) for c in straight] == [("reduce_scatter", (1,), 32)]
    assert straight[0].seconds * RATE == pytest.approx(3 / 4 * tensor.bytes)
    both = reduce_to(tensor, ((), ()), (0, 1), ((1,), ()), grid)
    assert [(c.kind, c.axes, c.elements) for c in both] == [("reduce_scatter", (1,), 32), ("all_reduce", (0,), 32)]
    moved = reduce_to(tensor, ((0,), ()), (1,), ((), (1,)), grid)
    assert [(c.kind, c.axes) for c in moved] == [("reduce_scatter", (1,)), ("all_gather", (0,))]
