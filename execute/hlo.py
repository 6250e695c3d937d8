"""Collectives in the text of a compiled program, as XLA prints it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from meshwright.simulate.collective import CollectiveKind

_KINDS: dict[str, CollectiveKind] = {
    "all-reduce": "all_reduce",
    "all-gather": "all_gather",
    "reduce-scatter": "reduce_scatter",
    "all-to-all": "all_to_all",
    "ragged-all-to-all": "all_to_all",
    "collective-permute": "permute",
}
# "%name = <type> all-reduce(...": a "-done" only waits for its "-start" and does not match.
_INSTRUCTION = re.compile(r"=\s+(?P<type>\(.*?\)|\S+)\s+(?P<kind>" + "|".join(_KINDS) + r")(?P<start>-start)?\(")
_SHAPE = re.compile(r"\b(?:pred|token|[a-z]+\d+\w*)\[(?P<dims>[\d,<=]*)\]")
_LISTED_GROUPS = re.compile(r"replica_groups=\{\{(?P<first>[\d,]*)\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[(?P<dims>[\d,]+)\]<=")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[(?P<mesh>[^\]]*)\][^{]*\{(?P<axes>[^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{(?P<pairs>.*?)\}\}")


@dataclass(frozen=True, slots=True)
class Compiled:
    """One array that a collective of a compiled program gives on each device.

    ``ranks``: devices of one group; 0 where the text does not say (one group of all).
    """

    kind: CollectiveKind
    elements: int
    ranks: int
    op_name: str = ""


def compiled_collectives(text: str) -> tuple[Compiled, ...]:
    """The collectives of an HLO module, each array of a combined one on its own, asynchronous ones once.

    Collectives among one device and those of nothing are left out. Source of the format: the printed form of XLA's
    HloInstruction, as of JAX 0.10.
    """
    return tuple(found for line in text.splitlines() for found in _of_line(line))


def _of_line(line: str) -> Iterator[Compiled]:
    match = _INSTRUCTION.search(line)
    if match is None:
        return
    kind = _KINDS[match["kind"]]
    ranks = _ranks(line)
    if ranks == 1:
        return
    name = re.search(r'op_name="([^"]*)"', line)
    sizes = [prod(int(n.strip("<=")) for n in s["dims"].split(",") if n) for s in _SHAPE.finditer(match["type"])]
    if match["start"] and kind in ("all_gather", "permute"):
        # (operands, results, then contexts of a permute): the results alone
        sizes = sizes[len(sizes) // 2 :] if kind == "all_gather" else sizes[1:2]
    if kind == "all_to_all" and len(sizes) > 1:
        sizes = [sum(sizes)]  # one piece to each device: the tuple is one array
    yield from (Compiled(kind, size, ranks, name[1] if name else "") for size in sizes)


def _ranks(line: str) -> int:
    if found := _LISTED_GROUPS.search(line):
        return len(found["first"].split(","))
    if found := _IOTA_GROUPS.search(line):
        return int(found["dims"].split(",")[-1])
    if found := _MESH_GROUPS.search(line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found["mesh"]))
        return prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", found["axes"]))
    if found := _PAIRS.search(line):
        return len(re.findall(r"\{\d+,\d+", found["pairs"])) or 1
    return 0
