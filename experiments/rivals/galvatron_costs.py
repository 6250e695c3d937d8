"""Galvatron-2's cost terms: what it predicts for a plan, to the last digit of what it printed.

Terms (Wang et al., "Improving Automatic Parallel Training via Balanced Memory Workload Optimization", TKDE 2024,
section 4, and the released search engine whose profiles these are; times in ms, sizes in MB until the last line):

- forward: a line fitted over the batch size per device; backward twice that, once more if rematerialised.
- gradients: half of 2 (d-1)/d · parameters over the all-reduce bandwidth, overlapped with the backward; where both run,
  both are slowed by the overlap factor. ZeRO-3 adds half of that again, exposed.
- tensor parallelism: six all-gathers of the activations a layer (half a measured all-reduce each); Ulysses sequence
  parallelism: four all-to-alls; half as many again with rematerialisation.
- an iteration of p stages and B micro-batches: ``pipeline_seconds``.
- memory: 4 × parameters (scaled by ZeRO), activations of the micro-batches in flight, and for the embedding its own.
  A fifth of the limit is kept for the allocator's cache.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

CONTEXT_MB = 1024  # taken by the framework on every device
CACHE_SHARE = 0.2  # of the memory limit, kept for the allocator where the limit is above 20 GB
_ZERO_PADDING = 0.003  # relative to the whole state: what sharding leaves over
_Line = tuple[float, float]  # slope, intercept


@dataclass(frozen=True, slots=True)
class Strategy:
    """How a layer (or the embedding and head) runs on the devices of its stage."""

    data: int
    tensor: int = 1
    sequence: int = 1  # Ulysses: splits activations, not parameters
    zero3: bool = False  # else ZeRO-2; neither on one replica
    rematerialised: bool = False

    @property
    def split(self) -> int:
        """Devices among which one sample's activations are split."""
        return max(self.tensor, self.sequence)

    @property
    def sharing(self) -> int:
        """Devices that hold the same parameters, among which ZeRO shards states."""
        return self.data * self.sequence


@dataclass(frozen=True, slots=True)
class Profile:
    """Galvatron's measurements of one model on one host."""

    devices: int
    hidden: int
    sequence_length: int
    layers: int
    layer_line_ms: _Line
    embedding_line_ms: _Line
    parameter_mb: float
    activation_mb: dict[str, float]  # per sample, by split, and "checkpoint"
    embedding_mb: dict[str, dict[str, dict[str, float]]]  # whole/first/last → model_states/activation → by split
    allreduce_mb_per_ms: dict[str, float]
    p2p_mb_per_ms: dict[int, float]
    messages_ms: dict[tuple[str, int], dict[float, float]]  # (kind, devices) → by MB
    overlap: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Galvatron's answer: a strategy per layer, layers per stage, micro-batches, and the embedding's strategy."""

    batch: int
    microbatches: int
    stages: tuple[int, ...]
    layers: tuple[Strategy, ...]
    embedding: Strategy

    def samples(self, strategy: Strategy) -> int:
        """Samples of a micro-batch on one replica."""
        return self.batch // self.microbatches // strategy.data


class Summary(msgspec.Struct, frozen=True):
    """What Galvatron printed of a run: its prediction and its search time."""

    pred_iter_s: float
    search_s: float


def read_summary(path: Path) -> Summary:
    """Read the summary of one of Galvatron's runs."""
    return msgspec.json.decode(path.read_bytes(), type=Summary)


def read_profile(folder: Path, hidden: int = 4096, layers: int = 32, sequence_length: int = 2048) -> Profile:
    """Read the profile of Llama2-7B on one host of eight devices."""
    hardware = _json(folder / "hardware.json")
    model = _json(folder / "llama2_7b_model_profile.json")
    memory = model["memory_profiling_bf16_llama2-7b_all.json"]
    compute = model["computation_profiling_bf16_llama2-7b_all.json"]
    allreduce = hardware["allreduce_bandwidth_1nodes_8gpus_per_node.json"]
    at = str(sequence_length)
    messages: dict[tuple[str, int], dict[float, float]] = {}
    for key, ms in hardware["sp_time_1nodes_8gpus_per_node.json"].items():
        kind, _, devices, size, _ = key.split("_")
        # half an all-reduce stands for an all-gather
        messages.setdefault((kind, int(devices)), {})[float(size[:-2])] = ms / 2 if kind == "allreduce" else ms
    return Profile(
        devices=8,
        hidden=hidden,
        sequence_length=sequence_length,
        layers=layers,
        layer_line_ms=_batch_line(compute, "layertype_0", at),
        embedding_line_ms=_batch_line(compute, "layertype_other", at),
        parameter_mb=memory["layertype_0_sp"][at]["parameter_size"],
        activation_mb=memory["layertype_0_sp"][at]["tp_activation_per_bsz_dict"],
        embedding_mb={
            "whole": memory["other_memory_pp_off_sp"][at],
            "first": memory["other_memory_pp_on_first_sp"][at],
            "last": memory["other_memory_pp_on_last_sp"][at],
        },
        allreduce_mb_per_ms={key.removeprefix("allreduce_size_"): value for key, value in allreduce.items()},
        p2p_mb_per_ms={
            int(key.removeprefix("pp_size_")): value
            for key, value in hardware["p2p_bandwidth_1nodes_8gpus_per_node.json"].items()
        },
        messages_ms=messages,
        overlap=hardware["overlap_coefficient.json"]["overlap_coe"],
    )


def read_plan(path: Path) -> Plan:
    """Read a plan in Galvatron's form."""
    raw = _json(path)
    stages = raw["pp_deg"]

    def numbers(key: str) -> list[int]:
        return [int(x) for x in raw[key].split(",")]

    def strategy(split: int, sequence: bool, zero3: bool, rematerialised: bool) -> Strategy:
        data = raw["world_size"] // stages // split
        return Strategy(data, 1 if sequence else split, split if sequence else 1, zero3, rematerialised)

    columns = zip(
        *(numbers(key) for key in ("tp_sizes_enc", "use_sp", "dp_types_enc", "checkpoint")),
        strict=True,
    )
    return Plan(
        batch=raw["global_bsz"],
        microbatches=raw["chunks"],
        stages=tuple(numbers("pp_division")),
        layers=tuple(strategy(split, bool(sp), bool(zero), bool(again)) for split, sp, zero, again in columns),
        embedding=strategy(raw["vtp"], bool(raw["vsp"]), bool(raw["embed_sdp"]), False),
    )


def _json(path: Path) -> Any:
    return msgspec.json.decode(path.read_bytes())


def _batch_line(compute: dict[str, float], name: str, sequence_length: str) -> _Line:
    """Line through the forward time of a whole batch, over batch sizes."""
    head, tail = f"{name}_bsz", f"_seq{sequence_length}"
    points = {int(k[len(head) : -len(tail)]): v for k, v in compute.items() if k.startswith(head) and k.endswith(tail)}
    sizes = sorted(points)
    slope, intercept = np.polyfit(sizes, [size * points[size] for size in sizes], 1)
    return float(slope), float(intercept)


def _ms_per_mb(profile: Profile, strategy: Strategy) -> float:
    """Of an all-reduce among the devices that share parameters; neighbours if no tensor parallelism lies inside."""
    if strategy.sharing == 1:
        return 0.0
    near = strategy.tensor == 1 or strategy.sharing == profile.devices
    return 1 / profile.allreduce_mb_per_ms[f"{strategy.sharing}_consec_{int(near)}"]


def _message_ms(profile: Profile, kind: str, devices: int, size_mb: float) -> float:
    """A measured message, or the line through all measured ones."""
    known = profile.messages_ms[kind, devices]
    if size_mb in known:
        return known[size_mb]
    slope, intercept = np.polyfit(list(known), list(known.values()), 1)
    return float(slope * size_mb + intercept)


def _activation_message_mb(profile: Profile, samples: int) -> float:
    return samples * profile.sequence_length * profile.hidden * 2 / 2**20


def layer_seconds(profile: Profile, strategy: Strategy, samples: int, stages: int) -> tuple[float, float]:
    """One layer and micro-batch, forward and backward: without and with the sum of gradients.

    Gradients and overlap are those of ``profile.layers`` such layers in a row, shared out among them.
    """
    slope, intercept = profile.layer_line_ms
    forward = (slope * samples / strategy.split + intercept) * profile.layers
    backward = forward * (3 if strategy.rematerialised else 2)
    gradients = (strategy.sharing - 1) / strategy.sharing * profile.parameter_mb / strategy.tensor * profile.layers
    per_mb = _ms_per_mb(profile, strategy)
    extra = gradients / 2 * per_mb if strategy.zero3 else 0.0
    if strategy.split > 1:
        tensor = strategy.tensor > 1
        count = (6 if tensor else 4) * profile.layers * (1.5 if strategy.rematerialised else 1)
        size = _activation_message_mb(profile, samples)
        extra += count * _message_ms(profile, "allreduce" if tensor else "all2all", strategy.split, size)
    if stages > 1:
        extra += stages * 2 * _activation_message_mb(profile, samples) / profile.p2p_mb_per_ms[stages]
    alone = forward + backward + extra
    synced = alone - backward + _overlapped_ms(profile, gradients * per_mb, backward) if strategy.data > 1 else alone
    return alone / profile.layers / 1000, synced / profile.layers / 1000


def _overlapped_ms(profile: Profile, traffic_ms: float, backward_ms: float) -> float:
    """The backward with gradients summed beside it: each slows the other while both run."""
    slowed_traffic, slowed_backward = traffic_ms * profile.overlap, backward_ms * profile.overlap
    if slowed_traffic > slowed_backward:
        return slowed_backward + traffic_ms - slowed_backward / profile.overlap
    return slowed_traffic + backward_ms - slowed_traffic / profile.overlap


def embedding_seconds(profile: Profile, strategy: Strategy, samples: int, stages: int) -> tuple[float, ...]:
    """Embedding and head of one micro-batch, by stage, without the sum of gradients (which the total leaves out)."""
    slope, intercept = profile.embedding_line_ms
    forward = slope * samples / strategy.split + intercept
    per_mb = _ms_per_mb(profile, strategy) * (strategy.sharing - 1) / strategy.sharing
    messages = (
        _message_ms(profile, "allreduce", strategy.tensor, _activation_message_mb(profile, samples))
        if strategy.tensor > 1
        else 0.0
    )

    def half(where: str, part: float, times: int) -> float:
        states = profile.embedding_mb[where]["model_states"][str(strategy.tensor)] / 8
        gather = states * per_mb / 2 if strategy.zero3 else 0.0  # parameters, before forward and before backward
        one, two = forward * part * profile.overlap, forward * 2 * part * profile.overlap
        ms = sum(gather + (step - gather) / profile.overlap if step > gather else gather for step in (one, two))
        return (ms + messages * times) / 1000

    if stages == 1:
        return (half("whole", 1.0, 2),)
    return (half("first", 0.5, 1), *(0.0,) * (stages - 2), half("last", 0.5, 1))


def pipeline_seconds(alone: list[float], synced: list[float], microbatches: int) -> float:
    """An iteration from each stage's time for a micro-batch, without and with the sum of gradients."""
    stages = len(alone)
    by_last = sum(alone) + alone[-1] * (microbatches - 1)
    warm, rest = min(stages - 1, microbatches - 1) * alone[0], sum(alone[1:])
    by_first = max(warm, rest) / 3 + max(warm, rest) * 2 / 3 + alone[0] * max(0, microbatches + 1 - stages)
    late = max(end - sum(alone[: n + 1]) for n, end in enumerate(synced))
    return max(by_last, by_first) + max(late, 0.0)


def plan_seconds(profile: Profile, plan: Plan) -> float:
    """Galvatron's prediction of one iteration."""
    stages = len(plan.stages)
    embedding = embedding_seconds(profile, plan.embedding, plan.samples(plan.embedding), stages)
    alone, synced, first = [], [], 0
    for n, count in enumerate(plan.stages):
        times = [layer_seconds(profile, s, plan.samples(s), stages) for s in plan.layers[first : first + count]]
        alone.append(sum(time for time, _ in times) + embedding[n])
        synced.append(sum(time for _, time in times))
        first += count
    return pipeline_seconds(alone, synced, plan.microbatches)


def _kept_share(strategy: Strategy, microbatches: int) -> float:
    """Share of parameters, gradients and optimizer state that stays on a device."""
    if strategy.data == 1:  # Galvatron leaves states whole there, sequence parallelism or not
        return 1.0
    shard = 1 / strategy.sharing + _ZERO_PADDING
    whole = (0 if strategy.zero3 else 1) + (1 if microbatches > 1 else 0)  # eighths of the state that are not sharded
    return (8 - whole) / 8 * shard + whole / 8


def layer_mb(profile: Profile, strategy: Strategy, samples: int, microbatches: int, in_flight: int) -> int:
    """Memory of one layer, rounded up as Galvatron does."""
    states = 4 * profile.parameter_mb / strategy.tensor * _kept_share(strategy, microbatches)
    if strategy.rematerialised:
        saved = profile.activation_mb["checkpoint"] / strategy.split
    else:
        saved = profile.activation_mb[str(strategy.split)]
    return math.ceil(states + saved * samples * in_flight)


def embedding_mb(profile: Profile, strategy: Strategy, samples: int, microbatches: int, stages: int) -> tuple[int, ...]:
    """Memory of embedding, head and the framework itself, by stage."""
    kept = _kept_share(strategy, microbatches)

    def part(where: str, in_flight: int) -> int:
        sizes = profile.embedding_mb[where]
        states = sizes["model_states"][str(strategy.tensor)] * kept
        return math.ceil(states + sizes["activation"][str(strategy.split)] * samples * in_flight + CONTEXT_MB)

    if stages == 1:
        return (part("whole", 1),)
    return (part("first", stages), *(CONTEXT_MB,) * (stages - 2), part("last", 1))


def usable_mb(limit_gb: int) -> int:
    """What a plan may fill under a memory limit."""
    limit = limit_gb * 1024
    return limit - int(limit * CACHE_SHARE) if limit_gb > 20 else limit


def plan_mb(profile: Profile, plan: Plan) -> tuple[int, ...]:
    """Memory of each stage, gathered activations of tensor parallelism aside (``buffer_mb``)."""
    stages = len(plan.stages)
    total = list(embedding_mb(profile, plan.embedding, plan.samples(plan.embedding), plan.microbatches, stages))
    first = 0
    for n, count in enumerate(plan.stages):
        for strategy in plan.layers[first : first + count]:
            total[n] += layer_mb(profile, strategy, plan.samples(strategy), plan.microbatches, stages - n)
        first += count
    return tuple(total)


def buffer_mb(profile: Profile, plan_batch: int, microbatches: int, stages: int, widest: int) -> int:
    """Buffer for activations gathered over the widest tensor parallelism that a plan may use."""
    samples = plan_batch / microbatches / (profile.devices // stages // widest)
    return int(samples * profile.hidden * profile.sequence_length * 2 / 2**20)
