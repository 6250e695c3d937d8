"""What the compiler fuses: how many bytes each operator really moves, and how many kernels are launched.

XLA joins elementwise work into one kernel; only what a heavy operator, a reduction or the world outside reads or
writes goes through memory.
"""

from dataclasses import dataclass

from meshwright.plan.graph import LayerGraph, Operator

# These end a fusion: their result is written to memory.
_WRITES = ("reduce", "gather", "scatter", "sort", "top_k", "cum", "arg", "select_and", "concatenate", "pad", "rng")


@dataclass(frozen=True, slots=True)
class Traffic:
    """For one operator: the values it reads from and writes to memory, and the kernels it launches (0 if fused)."""

    reads: tuple[int, ...]
    writes: tuple[int, ...]
    launches: int


def ends_fusion(op: Operator) -> bool:
    return op.heavy or not op.rule.known or op.primitive.startswith(_WRITES)


def traffic(graph: LayerGraph) -> tuple[Traffic, ...]:
    """Memory traffic of each operator of the layer, every fused group reading each of its inputs once."""
    outside = {*graph.exits, *graph.residuals, *graph.gradients, *graph.entry_cotangents}
    barrier = {v for op in graph.operators if op.heavy or not op.rule.known for v in op.inputs}
    producer = graph.producer()
    # A constant (an iota, a zero fill) is made where it is used.
    constant: set[int] = set()
    for op in graph.operators:
        if not op.heavy and all(v in constant for v in op.inputs):
            constant.update(op.outputs)

    def in_memory(value: int) -> bool:
        if value not in producer:
            return True
        op = graph.operators[producer[value]]
        return value in outside or value in barrier or ends_fusion(op)

    group = list(range(len(graph.operators)))

    def root(index: int) -> int:
        while group[index] != index:
            group[index] = group[group[index]]
            index = group[index]
        return index

    for index, op in enumerate(graph.operators):
        if op.heavy or not op.rule.known:
            continue
        for value in op.inputs:
            maker = producer.get(value)
            if maker is not None and not in_memory(value) and value not in constant:
                group[root(maker)] = root(index)

    seen: set[tuple[int, int]] = set()
    launched: set[int] = set()
    result = []
    for index, op in enumerate(graph.operators):
        mine = root(index)
        reads = []
        for value in op.inputs:
            if value in constant or not in_memory(value) or (mine, value) in seen:
                continue
            seen.add((mine, value))
            reads.append(value)
        writes = [v for v in op.outputs if in_memory(v) and (v not in constant or v in outside)]
        launches = int(bool(writes) and mine not in launched)
        if launches:
            launched.add(mine)
        result.append(Traffic(tuple(reads), tuple(writes), launches))
    return tuple(result)
