"""A row → what the simulator is asked: model, cluster, grid and software stack, and what had to be assumed."""

import json
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from experiments.validation.machines import cluster_of
from experiments.validation.rows import Refused, Row, batch_size, measured_seconds
from meshwright.calibrate.hardware import Cluster
from meshwright.errors import MeshwrightError
from meshwright.simulate.schedules.table import SCHEDULES
from meshwright.simulate.workload.grid import Grid, Recompute, spread_layers, stage_layers
from meshwright.simulate.workload.predict import predict_grid
from meshwright.simulate.workload.stack import Stack, find_stack
from meshwright.simulate.workload.transformer import Transformer

KNOWN_MODELS = Path(__file__).with_name("known_models.json")


class Framework(NamedTuple):
    """What is taken of a framework where a row does not say it; ``pattern`` matches its name and the model's."""

    pattern: str
    stack: str
    fused_attention: bool
    sequence_parallel: bool  # with tensor parallelism
    precision: str | None  # None: such tables mix 16 and 8 bits, so that nothing can be assumed


FRAMEWORKS = (
    Framework(r".*(Core|NeMo|Bridge).*", "megatron-core", True, True, None),
    Framework(r"InternEvo.*", "megatron-core", True, False, "bf16"),
    Framework(r"Megatron-LM \(zero-bubble.*", "megatron-core", False, False, "fp16"),
    Framework(r"(Megatron-)?DeepSpeed.*(OPT|Neo)-.*", "huggingface-deepspeed", False, False, "tf32"),
    Framework(r"(Megatron-)?DeepSpeed.*", "megatron-deepspeed", False, False, "fp16"),
    Framework(r"Megatron-LM.*", "megatron-2021", False, False, "fp16"),
    Framework(r".*(FSDP|torchtitan|fms).*", "fsdp", True, False, "bf16"),
    Framework(r".*(JAX|XLA|MaxText|Alpa).*", "compiled", False, False, "bf16"),
)


class Family(NamedTuple):
    """What the name of a model tells about its layers."""

    pattern: str
    traits: dict[str, bool]


LLAMA = {"gated": True, "biases": False, "rotary": True, "dropout": False, "tied": False}
FAMILIES = (
    Family(r".*(llama|qwen|intern|mixtral|mistral).*", LLAMA),
    Family(r".*nemotron.*", {**LLAMA, "gated": False}),
    Family(r".*mpt.*", {"biases": False, "dropout": False}),
    Family(r"(gpt-neo|opt)-.*", {"dropout": False}),  # as Sailor trains them: one copy of the scores is kept
    Family(r".*(gpt|opt|bloom|turing).*", {}),
)

PRECISIONS = {
    "fp16": ("f16", None),
    "bf16": ("bf16", None),
    "fp32": ("f32", None),
    "tf32": ("tf32", None),
    "fp8": ("bf16", "f8"),
}
SHARDINGS = ((r"none", 0), (r"ZeRO-?([0123]).*", None), (r"dist-opt.*", 1), (r"FSDP.*", 3))
SCHEDULE_NAMES = {"interleaved-1f1b": "interleaved", "1f1b-interleaved": "interleaved"}


@dataclass(frozen=True, slots=True)
class Case:
    """A row that can be predicted."""

    row: Row
    model: Transformer
    cluster: Cluster
    grid: Grid
    stack: Stack
    measured_seconds: float
    assumed: tuple[str, ...]

    @property
    def group(self) -> tuple[object, ...]:
        """What plans have in common that one chooses among: model, GPUs and batch."""
        return (self.row.text("hardware"), self.cluster.devices, self.model, self.grid.batch)

    @property
    def system(self) -> str:
        """What constants are fitted to."""
        return system_of(self.row)


def read_case(row: Row) -> Case:
    """What a row asks for.

    Raises:
        Refused: something is missing or cannot be expressed.
    """
    seconds, source = measured_seconds(row)
    assumed = [] if source == "iter_time_s" else [f"time from {source}"]
    cluster, nearest = cluster_of(row)
    assumed += nearest
    framework = _framework(row)
    try:
        model = _model(row, cluster, framework, assumed)
        grid = _grid(row, model, framework, assumed)
        stage_layers(model, grid)
    except MeshwrightError as error:
        raise Refused("the model does not divide over the grid", f"line {row.line}: {error}") from None
    stack = find_stack(framework.stack, system_of(row))
    if "compile" in row.text("notes") and not stack.fused_pointwise:
        stack = replace(stack, fused_pointwise=True)
    if not row.text("mbs"):
        assumed.append("micro-batches of the size predicted quickest")
        grid = _quickest(model, cluster, grid, stack)
    return Case(row, model, cluster, grid, stack, seconds, tuple(assumed))


def system_of(row: Row) -> str:
    """What constants are fitted to: the devices and the place of a row, as one source has them."""
    return f"{row.text('source_id')}: {row.text('hardware')}"


def _framework(row: Row) -> Framework:
    name = row.text("framework")
    for framework in FRAMEWORKS:
        if name and re.fullmatch(framework.pattern, f"{name} {row.text('model')}"):
            return framework
    raise Refused(f"no software stack for framework {name or '(empty)'}")


def _model(row: Row, cluster: Cluster, framework: Framework, assumed: list[str]) -> Transformer:
    name = row.text("model")
    dtype, products = _precision(row, cluster, framework, assumed)
    known = _known_models().get(name.partition(" (")[0].lower())
    if known is not None:
        return Transformer(**known["sizes"], sequence=row.count("seq"), dtype=dtype, matmul_dtype=products, **LLAMA)
    family = next((family for family in FAMILIES if re.fullmatch(family.pattern, name, re.IGNORECASE)), None)
    if family is None or "moe" in name.lower() or "hybrid" in name.lower():
        raise Refused(f"model {name or '(empty)'} is not one that the sizes of the file describe")
    if not row.text("vocab"):
        assumed.append("vocabulary of 51,200")
    hidden, heads = row.count("hidden"), row.count("heads")
    return Transformer(
        layers=row.count("layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=row.count("kv_heads", heads),
        ffn_hidden=row.count("ffn_hidden", 4 * hidden),
        vocabulary=row.count("vocab", 51200),
        sequence=row.count("seq"),
        dtype=dtype,
        matmul_dtype=products,
        **family.traits,
    )


def _precision(row: Row, cluster: Cluster, framework: Framework, assumed: list[str]) -> tuple[str, str | None]:
    """Type of activations and of the layers' products; all kinds of 8-bit scaling are priced alike."""
    text = row.text("precision")
    if not text:
        if framework.precision is None:
            raise Refused("no precision")
        text = framework.precision
        assumed.append(f"precision {text}")
    name = re.split(r"[^a-z0-9]", text.lower())[0]
    if name not in PRECISIONS:
        raise Refused(f"precision {text}")
    dtype, products = PRECISIONS[name]
    if products and products not in cluster.device(0).flops_per_second:
        raise Refused(f"precision {text} on {row.text('hardware')}")
    return dtype, products


def _grid(row: Row, model: Transformer, framework: Framework, assumed: list[str]) -> Grid:
    gpus = row.count("gpus")
    tensor, pipeline, context = row.count("tp"), row.count("pp"), row.count("cp", 1)
    data, left = divmod(gpus, tensor * pipeline * context)
    if left or (row.text("dp") and row.count("dp") != data):
        raise Refused(
            "tp × pp × cp × dp is not gpus",
            f"line {row.line}: {tensor} × {pipeline} × {context} × {row.text('dp')} and {gpus}",
        )
    if not row.text("gbs"):
        assumed.append("one micro-batch a step")
    if not row.text("recompute"):
        assumed.append("no recomputation")
    chunks, schedule = _schedule(row, model, pipeline, assumed)
    zero, microbatch_size = _zero(row), row.count("mbs", 1)
    if pipeline > 1 and re.match("torchtitan", row.text("framework")):
        assumed.append("mbs as the batch of a rank, cut into micro-batches of 1; weights gathered once a step")
        zero, microbatch_size = min(zero, 2), 1
    grid = Grid(
        batch=batch_size(row),
        microbatch_size=microbatch_size,
        tensor=tensor,
        pipeline=pipeline,
        data=data,
        context=context,
        expert=row.count("ep", 1),
        chunks=chunks,
        zero=zero,
        sequence_parallel=tensor > 1 and _truth(row, "seq_parallel", framework.sequence_parallel, assumed),
        recompute=_recompute(row),
        schedule=schedule,
        fused_attention=_fused(row, framework, assumed),
    )
    return replace(grid, layers_per_stage=_layers(row, model, grid, assumed))


def _quickest(model: Transformer, cluster: Cluster, grid: Grid, stack: Stack) -> Grid:
    """The grid with the micro-batches of a power of two that are predicted quickest of those that fit into memory."""
    best, least = grid, float("inf")
    size = 1
    while grid.batch % (grid.data * size) == 0:
        tried = replace(grid, microbatch_size=size)
        try:
            step = predict_grid(model, cluster, tried, stack)
        except MeshwrightError:
            break  # the schedule has no rule for so few micro-batches
        if step.peak_bytes > cluster.device(0).memory_bytes.value:
            break
        if step.iteration_seconds < least:
            best, least = tried, step.iteration_seconds
        size *= 2
    return best


def _schedule(row: Row, model: Transformer, pipeline: int, assumed: list[str]) -> tuple[int, str]:
    """Chunks and schedule."""
    name = re.split(r"[ (]", row.text("schedule").lower())[0] or "1f1b"
    name = SCHEDULE_NAMES.get(name, name)
    chunks = row.count("vp", 1)
    if pipeline == 1:
        return 1, "1f1b"
    if name == "interleaved" and not row.text("vp"):
        each = model.layers // pipeline
        chunks = next((size for size in range(2, each + 1) if model.layers % (size * pipeline) == 0), min(2, each))
        assumed.append(f"{chunks} chunks")
    if chunks > 1 and name == "1f1b":
        name = "interleaved"
    if chunks == 1 and name == "interleaved":
        name = "1f1b"
    if name not in SCHEDULES:
        raise Refused(f"schedule {name}")
    return max(chunks, SCHEDULES[name].chunks), name


def _layers(row: Row, model: Transformer, grid: Grid, assumed: list[str]) -> tuple[int, ...] | None:
    """Layers of each stage where the row lists them (embedding and head count as one each) or they are unequal."""
    listed = re.search(r"layers_per_stage=\[([\d, ]+)\]", row.text("notes"))
    if listed is not None:
        counts = [int(count) for count in listed.group(1).split(",")]
        counts[0] -= 1
        counts[-1] -= 1
        if len(counts) == grid.stages and sum(counts) == model.layers and min(counts) >= 0:
            return tuple(counts)
        raise Refused("layers_per_stage is not the model's", f"line {row.line}: {row.text('notes')}")
    if model.layers % grid.stages and (model.layers + 2) % grid.stages:
        if grid.stages > model.layers:
            raise Refused("more stages than layers", f"line {row.line}: {grid.stages} and {model.layers}")
        assumed.append("layers spread as evenly as may be")
        return spread_layers(model.layers, grid.stages)
    return None


def _zero(row: Row) -> int:
    text = row.text("sharding")
    for pattern, level in SHARDINGS:
        found = re.fullmatch(pattern, text or "none", re.IGNORECASE)
        if found is not None:
            return int(found.group(1)) if level is None else level
    raise Refused(f"sharding {text}")


def _recompute(row: Row) -> Recompute:
    match row.text("recompute").lower():
        case "" | "none" | "no" | "false":
            return "none"
        case "full" | "true":
            return "full"
        case "selective":
            return "selective"
        case other:
            raise Refused(f"recompute {other}")


def _fused(row: Row, framework: Framework, assumed: list[str]) -> bool:
    text = row.text("attn_impl").lower()
    if not text:
        assumed.append("fused attention" if framework.fused_attention else "unfused attention")
        return framework.fused_attention
    return "flash" in text or "fused" in text or "triton" in text


def _truth(row: Row, column: str, default: bool, assumed: list[str]) -> bool:
    match row.text(column).lower():
        case "":
            assumed.append(f"{column} {'on' if default else 'off'}")
            return default
        case "true" | "1" | "yes":
            return True
        case "false" | "0" | "no":
            return False
        case other:
            raise Refused(f"impossible {column}", f"line {row.line} has {other!r}; true or false is needed")


@cache
def _known_models() -> dict[str, Any]:
    models: dict[str, Any] = json.loads(KNOWN_MODELS.read_text(encoding="utf-8"))
    return models
