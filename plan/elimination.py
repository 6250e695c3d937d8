"""Exact min-plus bucket elimination: the whole table over some kept nodes in one pass.

Nodes are eliminated one by one, each time adding the tables that mention the node and minimising over it. The cost is
exponential only in the treewidth, which is small for the graph of a network layer. The order is settled before any
number is touched, and every table has its axes in that order: the next node to go is always axis 0, so that no table is
ever transposed and the minimum runs over whole contiguous rows.
Source: Dechter, Bucket elimination, Artificial Intelligence 113 (1999) 41-85.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod

import numpy as np

from meshwright.errors import PlanError
from meshwright.plan.assignment import FloatArray, Problem
from meshwright.plan.reduction import IntArray, worthwhile_strategies

_BLOCK_ENTRIES = 65_536  # a temporary of half a megabyte stays in a core's cache
_REDUCE_ABOVE_ENTRIES = 2_000_000  # of all joint tables: about ten milliseconds, what finding strategies to drop takes
_MERGE_RATIO = 8  # two tables are added beforehand if their sum has at most this part of the joint table's entries


class TreewidthError(PlanError):
    """The graph needs larger tables than allowed; the ILP is the way."""


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """Seconds as a function of the strategies of the nodes in ``scope``, one axis each, first eliminated first."""

    scope: tuple[int, ...]
    seconds: FloatArray

    def over(self, scope: Sequence[int]) -> FloatArray:
        """A view with an axis for each node of a wider scope, of length 1 where this table does not depend on it."""
        lengths = dict(zip(self.scope, self.seconds.shape, strict=True))
        return self.seconds.reshape([lengths.get(v, 1) for v in scope])


@dataclass(frozen=True, slots=True, eq=False)
class Elimination:
    """What elimination leaves.

    table[i, j, …]: least seconds when the kept nodes take strategies i, j, …, in the order in which ``keep`` names
    them; +inf where no allowed assignment has them.
    """

    keep: tuple[int, ...]
    table: FloatArray
    trail: tuple[tuple[int, tuple[_Table, ...]], ...]  # each eliminated node and the tables that mentioned it
    strategies: tuple[IntArray, ...]  # of each node, those that its axis of a table stands for

    def backtrack(self, kept_choice: Sequence[int]) -> tuple[int, ...]:
        """An optimal full assignment in which the kept nodes take these strategies; a node's ties go to its lowest.

        Errors: PlanError if there is none, or if the strategies do not fit the kept nodes.
        """
        if len(kept_choice) != len(self.keep) or not all(
            0 <= s < size for s, size in zip(kept_choice, self.table.shape, strict=False)
        ):
            raise PlanError(
                f"strategies {tuple(kept_choice)} do not fit the kept nodes {self.keep}, "
                f"which have {self.table.shape} strategies"
            )
        if np.isposinf(self.table[tuple(kept_choice)]):
            raise PlanError(
                f"no allowed assignment has strategies {tuple(kept_choice)} at nodes {self.keep}; "
                "take an entry of the table that is finite"
            )
        choice = dict(zip(self.keep, kept_choice, strict=True))
        for node, tables in reversed(self.trail):
            seconds = np.zeros(())
            for table in tables:
                where: tuple[slice | int, ...] = (slice(None), *(choice[v] for v in table.scope[1:]))
                seconds = seconds + table.seconds[where]
            choice[node] = int(seconds.argmin())
        return tuple(int(self.strategies[v][choice[v]]) for v in range(len(choice)))


def eliminate(
    problem: Problem,
    keep: Sequence[int] = (),
    max_table_entries: int = 20_000_000,
    price_seconds_per_byte: float = 0.0,
) -> Elimination:
    """Eliminate every node but ``keep``. Memory enters as a price; a hard limit is the ILP's work and is not read here.

    Args:
        max_table_entries: the largest table that may be stored, of 8 bytes an entry.
        price_seconds_per_byte: what a resident byte costs; the table then holds seconds plus price times bytes.
    Errors: TreewidthError if a table would be larger, before any is made; PlanError if ``keep`` names a node twice or
    one that does not exist.
    """
    keep = tuple(keep)
    if len(set(keep)) < len(keep) or not all(0 <= v < problem.nodes for v in keep):
        raise PlanError(f"keep {keep} must name different nodes of 0 to {problem.nodes - 1}")
    priced = _priced(problem, price_seconds_per_byte)
    left = tuple(np.arange(costs.size) for costs in priced.node_seconds)
    order = _min_fill_order([ps.size for ps in left], priced.edge_seconds, keep)
    if order.joint_entries > _REDUCE_ABOVE_ENTRIES or order.largest_entries > max_table_entries:
        with suppress(PlanError):  # some node is never allowed: the table will say so
            left = worthwhile_strategies(priced, keep=keep)
        order = _min_fill_order([ps.size for ps in left], priced.edge_seconds, keep)
    if order.largest_entries > max_table_entries:
        raise TreewidthError(
            f"elimination would need a table of {order.largest_entries:,} entries "
            f"and {max_table_entries:,} are allowed; keep fewer nodes, or solve this problem with the ILP"
        )
    sizes = [ps.size for ps in left]
    rank = {v: i for i, v in enumerate((*order.nodes, *keep))}

    # One for each node to go, with the tables whose first node it is; the last holds what is over the kept nodes alone.
    buckets: list[list[_Table]] = [[] for _ in range(len(order.nodes) + 1)]

    def file(table: _Table) -> None:
        first = rank[table.scope[0]] if table.scope else len(order.nodes)
        buckets[min(first, len(order.nodes))].append(table)

    for v, costs in enumerate(priced.node_seconds):
        file(_Table((v,), costs[left[v]]))
    for (u, v), costs in sorted(priced.edge_seconds.items()):
        part = costs[np.ix_(left[u], left[v])]
        file(_Table((u, v), part) if rank[u] < rank[v] else _Table((v, u), np.ascontiguousarray(part.T)))

    trail = []
    for node, bucket in zip(order.nodes, buckets, strict=False):
        scope = tuple(sorted({v for table in bucket for v in table.scope}, key=rank.__getitem__))
        tables = _merged(bucket, scope, sizes)
        shape = tuple(sizes[v] for v in scope)
        file(_Table(scope[1:], _least([table.over(scope) for table in tables], shape)))
        trail.append((node, tables))
    rest = np.zeros([sizes[v] for v in keep])
    for table in buckets[-1]:
        rest = rest + table.over(keep)
    return Elimination(keep, np.asarray(rest), tuple(trail), left)


def _priced(problem: Problem, price_seconds_per_byte: float) -> Problem:
    """The problem with its bytes as costs and without its limit."""
    if problem.node_bytes is None:
        return problem
    both = zip(problem.node_seconds, problem.node_bytes, strict=True)
    return Problem(tuple(costs + price_seconds_per_byte * held for costs, held in both), problem.edge_seconds)


def _merged(tables: Sequence[_Table], scope: tuple[int, ...], sizes: Sequence[int]) -> tuple[_Table, ...]:
    """The same sum in fewer tables: small ones are added while their sum stays small beside the joint table."""
    most = prod(sizes[v] for v in scope) // _MERGE_RATIO
    small_first = sorted(tables, key=lambda t: t.seconds.size)
    merged = [small_first[0]]
    for table in small_first[1:]:
        held = {*merged[-1].scope, *table.scope}
        if held != set(table.scope) and prod(sizes[v] for v in held) > most:
            merged.append(table)
            continue
        joint = tuple(v for v in scope if v in held)
        merged[-1] = _Table(joint, merged[-1].over(joint) + table.over(joint))
    return tuple(merged)


def _least(parts: Sequence[FloatArray], shape: tuple[int, ...]) -> FloatArray:
    """The minimum over axis 0 of the sum of at least one array, each of which broadcasts to ``shape``.

    The sum is never held as a whole: it is made in blocks of axis 0 and, where a single row of that is too large, of
    axis 1, so that the one scratch array stays in the cache.
    """
    if len(parts) == 1:
        return np.asarray(parts[0].min(axis=0))
    row = prod(shape[1:])
    if row > _BLOCK_ENTRIES:
        least = np.empty(shape[1:])
        for i in range(shape[1]):
            least[i] = _least([part[:, i if part.shape[1] > 1 else 0] for part in parts], (shape[0], *shape[2:]))
        return least
    block = min(shape[0], max(1, _BLOCK_ENTRIES // row))
    scratch = np.empty((block, *shape[1:]))
    least = np.full(shape[1:], np.inf)
    for start in range(0, shape[0], block):
        rows = [part[start : start + block] for part in parts]
        total = scratch[: rows[0].shape[0]]
        np.add(rows[-1], rows[-2], out=total)
        for more in rows[:-2]:
            np.add(total, more, out=total)
        np.minimum(least, total.min(axis=0), out=least)
    return least


@dataclass(frozen=True, slots=True)
class _Order:
    """Nodes in the order of their elimination, and what that costs."""

    nodes: tuple[int, ...]
    largest_entries: int  # of the tables that are stored
    joint_entries: int  # of all tables that are minimised, together: the work


def _min_fill_order(sizes: Sequence[int], edges: Iterable[tuple[int, int]], keep: Sequence[int]) -> _Order:
    """Nodes but ``keep``, each time the one that joins the fewest strangers, then with the smallest table, then first.

    Neighbourhoods are bit sets: the neighbours of v that u lacks are one ``&`` and a count.
    Source: Kjærulff, Triangulation of graphs, Aalborg University R-90-09 (1990).
    """
    near = [0] * len(sizes)
    for u, v in edges:
        near[u] |= 1 << v
        near[v] |= 1 << u
    left = set(range(len(sizes))) - set(keep)
    worth: dict[int, tuple[int, int, int]] = {}
    stale = left
    order = []
    largest, joint = prod(sizes[v] for v in keep), 0
    while left:
        for v in stale:
            around = _members(near[v])
            strangers = sum((near[v] & ~near[u]).bit_count() - 1 for u in around)  # u itself is in near[v]
            worth[v] = (strangers, prod(sizes[u] for u in around), v)
        node = min(left, key=worth.__getitem__)
        largest = max(largest, worth[node][1])
        joint += worth[node][1] * sizes[node]
        order.append(node)
        left.remove(node)
        around = _members(near[node])
        for u in around:
            near[u] = (near[u] | near[node]) & ~(1 << u | 1 << node)
        stale = {w for u in around for w in (u, *_members(near[u]))} & left
    return _Order(tuple(order), largest, joint)


def _members(bits: int) -> list[int]:
    """The set bits, lowest first."""
    members = []
    while bits:
        low = bits & -bits
        members.append(low.bit_length() - 1)
        bits ^= low
    return members
