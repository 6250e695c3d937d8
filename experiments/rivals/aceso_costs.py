"""Aceso's cost terms: what it predicts for a plan from its profile of single operators.

Terms (Liu et al., "Aceso: Efficient Parallel DNN Training through Iterative Bottleneck Alleviation", EuroSys 2024,
section 3.3, and the released cost model; times in µs and sizes in MB until the last line):

- a stage takes, per micro-batch, the profiled forward and backward of its operators, the forward again of those that
  are recomputed, the change of layouts between operators (an all-gather where a sample gathers, a free split where it
  spreads, the reverse in the backward), and input and output at the measured point-to-point bandwidth;
- an iteration of B micro-batches takes the sum of the stages and (B - 1) times the slowest;
- a device holds weights, gradients and optimizer state; the activations of the micro-batches in flight, less what is
  recomputed; the largest run of recomputed activations; and the allocator's reserve.
"""

import csv
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from meshwright.errors import ModelError
from meshwright.plan.frontier import BoolArray, FloatArray

WIDTHS = (1, 2, 4, 8)  # tensor-parallel widths that were profiled
ALGORITHMS = 2  # ways to split an operator among its devices
HOST_GPUS = 8
FORBIDDEN_US = 1e8  # Aceso's price of a message that was not profiled
NEVER_RECOMPUTED = frozenset({"encoder-embedding", "decoder-embedding", "gpt-post-process", "t5-post-process", "conv1"})
_FIELDS = (
    "fwd_us",
    "bwd_us",
    "input_MB",
    "output_MB",
    "weights_MB",
    "activations_MB",
    "fwd_reserved_MB",
    "bwd_reserved_MB",
)
_STATE = {"gpt": 8.0, "t5": 8.0, "resnet": 4.0}  # bytes of weights, gradients and optimizer per byte of weights


@dataclass(frozen=True, slots=True)
class Profile:
    """A model's operators in order and what was measured of them; ``inf`` where nothing was."""

    family: str
    ops: tuple[str, ...]
    microbatch_sizes: tuple[int, ...]  # per replica
    measured: FloatArray  # (fields, ops, sizes, widths, algorithms)
    gather_us: dict[tuple[int, int], float]  # (devices, MB rounded) → all-gather
    between_hosts: tuple[float, ...]  # MB/µs by power of two of the size
    inside_host: tuple[float, ...]

    @property
    def state_factor(self) -> float:
        """MB of training state per MB of weights."""
        return _STATE[self.family]

    def field(self, name: str) -> FloatArray:
        """(ops, sizes, widths, algorithms) of one measured quantity."""
        chosen: FloatArray = self.measured[_FIELDS.index(name)]
        return chosen


@dataclass(frozen=True, slots=True)
class Stage:
    """Operators of a stage in order: width, replicas, algorithm of each, and whether it is recomputed."""

    gpus: int
    width: tuple[int, ...]
    replicas: tuple[int, ...]
    algorithm: tuple[int, ...]
    recomputed: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """Aceso's answer: stages over one micro-batch size."""

    batch: int
    microbatch: int
    stages: tuple[Stage, ...]

    @property
    def gpus(self) -> int:
        """Devices of all stages."""
        return sum(stage.gpus for stage in self.stages)


def read_profile(folder: Path, family: str, size: str, layers: int) -> Profile:
    """Read the profile of one model on V100-32GB; ``layers`` counts those of a transformer (of each half of T5).

    Raises:
        ModelError: the model was not profiled.
    """
    rows: list[dict[str, str]] = []
    for path in sorted(folder.glob(f"op_profile_{family}*.csv")):
        rows += [row for row in _rows(path) if row["model_size"] == size]
    if not rows:
        raise ModelError(
            f"there is no profile of {family} {size} in {folder.name}; profiled models are in its op_profile files"
        )
    first = (rows[0]["mbs"], rows[0]["tp"], rows[0]["algo"])
    distinct = [row["op"] for row in rows if (row["mbs"], row["tp"], row["algo"]) == first]
    sizes = tuple(sorted({int(row["mbs"]) for row in rows}))
    table = np.full((len(_FIELDS), len(distinct), len(sizes), len(WIDTHS), ALGORITHMS), np.inf)
    number = {op: n for n, op in enumerate(distinct)}
    for row in rows:
        where = (number[row["op"]], sizes.index(int(row["mbs"])), WIDTHS.index(int(row["tp"])), int(row["algo"]))
        for field, name in enumerate(_FIELDS):
            table[(field, *where)] = float(row[name])
    ops = _whole_model(family, distinct, layers)
    return Profile(
        family,
        ops,
        sizes,
        table[:, [number[op] for op in ops]],
        {
            (int(row["num_gpus"]), round(float(row["data_MB"]))): 1000 * float(row["time_ms_mean"])
            for row in _rows(folder / "collectives.csv")
            if row["collective"] == "all_gather"
        },
        _bandwidths(folder, "inter_node"),
        _bandwidths(folder, "intra_node"),
    )


def read_case(folder: Path, raw: dict[str, Any]) -> tuple[Profile, Plan]:
    """The profile of a case of ``aceso_best_plans.json`` and Aceso's plan for it."""
    plan = raw["plan_rle"]
    layers = plan["num_layers"] if isinstance(plan["num_layers"], int) else 0  # a convolutional model is profiled whole
    return read_profile(folder, plan["model_name"], plan["model_size"], layers), read_plan(plan)


def limit_mb(case: str) -> float:
    """Memory limit that Aceso's scripts give to a case."""
    return 28_000.0 if case.startswith("large") else 12_000.0


def read_plan(raw: dict[str, Any]) -> Plan:
    """One plan of ``aceso_best_plans.json``, whose lists are run-length encoded."""

    def spread(key: str) -> list[tuple[int, ...]]:
        return [tuple(value for value, count in runs for _ in range(count)) for runs in raw[key]]

    columns = (
        spread(key)
        for key in (
            "model_parallel_size_of_each_op",
            "data_parallel_size_of_each_op",
            "algo_of_each_op",
            "recompute_ops",
        )
    )
    stages = tuple(
        Stage(gpus, width, replicas, algorithm, tuple(map(bool, again)))
        for gpus, width, replicas, algorithm, again in zip(raw["num_gpus"], *columns, strict=True)
    )
    return Plan(raw["global_batch_size"], raw["micro_batch_size"], stages)


def read_plans(path: Path) -> dict[str, dict[str, Any]]:
    """The best plans that Aceso found, by case."""
    return {plan["case"]: plan for plan in msgspec.json.decode(path.read_bytes())["plans"]}


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def _bandwidths(folder: Path, link: str) -> tuple[float, ...]:
    rows = sorted(
        (float(r["data_MB"]), float(r["bandwidth_GBps"]))
        for r in _rows(folder / "p2p_bandwidth.csv")
        if r["link"] == link
    )
    return tuple(value * 1e-3 for _, value in rows)


def _whole_model(family: str, distinct: list[str], layers: int) -> tuple[str, ...]:
    """The operators of the model in order: those of one layer were profiled once."""
    if family == "gpt":
        return (distinct[0], *distinct[1:14] * layers, *distinct[14:])
    if family == "t5":
        return (distinct[0], *distinct[1:14] * layers, *distinct[14:16], *distinct[16:37] * layers, *distinct[37:])
    return tuple(distinct)


def bandwidth(profile: Profile, size_mb: float, between_hosts: bool) -> float:
    """MB/µs of a message between stages, by the power of two below half its size, as Aceso looks it up."""
    table = profile.between_hosts if between_hosts else profile.inside_host
    if size_mb <= 0:
        return 1.0
    index = int(math.log(size_mb, 2))
    return table[min(index - 1 if index >= 1 else index, len(table) - 1)]


def relayout_us(profile: Profile, before: tuple[int, int], after: tuple[int, int], size_mb: float) -> float:
    """Forward and backward of a change of (width, replicas) between operators; ``size_mb`` is the later one's input."""
    if before == after:
        return 0.0
    devices = max(before[0], after[0]) // min(before[0], after[0])
    for size in (round(size_mb), round(size_mb - 1)):  # gathered one way, split for nothing the other
        if (devices, size) in profile.gather_us:
            return profile.gather_us[devices, size]
    return FORBIDDEN_US


def saved_by_recomputing(profile: Profile, activations: FloatArray) -> tuple[FloatArray, FloatArray, BoolArray]:
    """What recomputing an operator and its follower spares, by operator of the model, given all their activations.

    Returns:
        MB held by each operator; MB spared where it and its follower are recomputed (what enters a layer is kept); and
        whether a run of recomputed operators ends with it.
    """
    held, spared, ends = activations.copy(), activations.copy(), np.zeros(len(activations), dtype=bool)
    followers = (*profile.ops[1:], "")
    for n, (op, after) in enumerate(zip(profile.ops, followers, strict=True)):
        if op == "enc-attention-dropout":
            held[n] = spared[n] = 1.5 * activations[n]
        elif shares_its_output(op):
            held[n] = spared[n] = 0.0
        elif after == "enc-1st-layernorm" or "-conv1" in after:
            spared[n], ends[n] = 0.0, True
    return held, spared, ends


def shares_its_output(op: str) -> bool:
    """Whether an operator's result takes the place of another array, so that it holds nothing of its own."""
    return op in ("enc-attention-softmax", "bn1") or "-bn3" in op or ("-downsample" in op and "0-0" not in op)


def stage_seconds(profile: Profile, first: int, stage: Stage, microbatch: int, gpus_before: int, host: int) -> float:
    """One micro-batch of a stage from operator ``first`` on, after ``gpus_before`` GPUs, ``host`` of them on a host."""
    sizes = _sizes(profile, stage, microbatch)
    pick = _picker(profile, first, stage, sizes)
    forward, backward, inputs = pick("fwd_us"), pick("bwd_us"), pick("input_MB")
    again = float(forward[list(stage.recomputed)].sum())
    pairs = list(zip(stage.width, stage.replicas, strict=True))
    relayout = sum(
        relayout_us(profile, before, after, size)
        for (before, after), size in zip(itertools.pairwise(pairs), inputs[1:], strict=True)
    )
    if profile.family == "t5":
        relayout = 0.0  # not priced there
    # the output is looked up at the width of the first operator, as Aceso does
    last = profile.field("output_MB")[
        first + len(sizes) - 1, sizes[-1], WIDTHS.index(stage.width[0]), stage.algorithm[-1]
    ]
    enters = gpus_before % host == 0 and gpus_before > 0
    leaves = (gpus_before + stage.gpus) % host == 0
    messages = inputs[0] / bandwidth(profile, inputs[0], enters) + last / bandwidth(profile, last, leaves)
    return float(forward.sum() + backward.sum() + again + relayout + messages) * 1e-6


def stage_mb(profile: Profile, first: int, stage: Stage, microbatch: int, after: int) -> float:
    """Memory of each device of a stage with ``after`` stages behind it."""
    pick = _picker(profile, first, stage, _sizes(profile, stage, microbatch))
    weights = float(pick("weights_MB").sum())
    held, spared, ends = saved_by_recomputing(profile, _spread(profile, first, pick("activations_MB")))
    span = slice(first, first + len(stage.width))
    both = np.array([a and b for a, b in itertools.pairwise(stage.recomputed)] + [False])
    kept = pick("input_MB")[0] + held[span].sum() - spared[span][both].sum()
    run, largest = 0.0, 0.0
    for size, pair, end in zip(held[span], both, ends[span], strict=True):
        run = run + size if pair else 0.0
        largest = max(largest, run)
        run = 0.0 if end else run
    reserve = max(pick("fwd_reserved_MB")[:-1].max(initial=0) + pick("bwd_reserved_MB")[:-1].max(initial=0), weights)
    return float(weights * profile.state_factor + kept * (after + 1) + largest + reserve)


def _sizes(profile: Profile, stage: Stage, microbatch: int) -> list[int]:
    """Index of the profiled size per replica of each operator."""
    return [profile.microbatch_sizes.index(microbatch // replicas) for replicas in stage.replicas]


def _picker(profile: Profile, first: int, stage: Stage, sizes: list[int]) -> Callable[[str], FloatArray]:
    span = np.arange(first, first + len(sizes))
    widths = [WIDTHS.index(width) for width in stage.width]
    return lambda name: profile.field(name)[span, sizes, widths, list(stage.algorithm)]


def _spread(profile: Profile, first: int, values: FloatArray) -> FloatArray:
    whole = np.zeros(len(profile.ops))
    whole[first : first + len(values)] = values
    return whole


def plan_seconds(profile: Profile, plan: Plan) -> float:
    """Aceso's prediction of one iteration."""
    times, first, gpus, host = [], 0, 0, min(HOST_GPUS, plan.gpus)
    for stage in plan.stages:
        times.append(stage_seconds(profile, first, stage, plan.microbatch, gpus, host))
        first, gpus = first + len(stage.width), gpus + stage.gpus
    return max(times) * (plan.batch // plan.microbatch - 1) + sum(times)


def plan_mb(profile: Profile, plan: Plan) -> tuple[float, ...]:
    """Memory of a device of each stage."""
    sizes, first = [], 0
    for n, stage in enumerate(plan.stages):
        sizes.append(stage_mb(profile, first, stage, plan.microbatch, len(plan.stages) - 1 - n))
        first += len(stage.width)
    return tuple(sizes)
