"""``meshwright simulate MODEL --cluster C --batch N --fix ...``: a grid given by hand, with no trace at all."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.resources import files
from typing import Any, get_type_hints

import msgspec

from meshwright.calibrate.hardware import Cluster, parse_cluster
from meshwright.calibrate.uncertainty import COVERAGE, Interval, find_interval
from meshwright.errors import ModelError, PlanError
from meshwright.plan.predict import judge, step_interval
from meshwright.simulate.memory import need_fit
from meshwright.simulate.metrics import explain
from meshwright.simulate.schedules.table import find_schedule
from meshwright.simulate.workload.grid import Grid, stage_layers
from meshwright.simulate.workload.predict import GridPrediction, predict_grid
from meshwright.simulate.workload.stack import Stack, find_stack, shipped_stacks
from meshwright.simulate.workload.transformer import Transformer, megatron_flops

FAMILIES = ("gpt", "transformer")
SHORT = {"seq": "sequence", "vocab": "vocabulary"}
COUNTS = ("tensor", "pipeline", "data", "context", "expert", "microbatch-size", "microbatches", "zero")
TRUTHS = {"true": True, "false": False}


def predict(args: argparse.Namespace) -> GridPrediction:
    """The prediction that the command line asks for.

    Raises:
        MeshwrightError: what is asked for cannot be; the message says what to change.
    """
    cluster = parse_cluster(args.cluster)
    model = parse_transformer(args.plan)
    prediction = predict_grid(model, cluster, parse_grid(args.fix, args.batch, cluster), parse_stack(args.stack))
    if not args.ignore_memory:
        devices = [cluster.device(devices[0]) for devices in prediction.timeline.mesh_devices]
        need_fit(prediction.timeline, [device.memory_bytes.value for device in devices])
    return prediction


def parse_stack(text: str) -> Stack:
    """``NAME``, or ``NAME@SYSTEM`` for the constants of a system that the stack was measured on.

    Raises:
        ModelError: the stack or the system is unknown; the message lists those that are known.
    """
    name, at, system = text.partition("@")
    stack = find_stack(name, system or None)
    if at and system not in (known := shipped_stacks()[name].systems):
        systems = "; ".join(known) or "none"
        raise ModelError(f"stack {name!r} was not measured on {system!r}; known are {systems}")
    return stack


def parse_transformer(spec: str) -> Transformer:
    """``gpt-2.6b``, ``gpt:layers=24,hidden=2048,heads=32`` or ``transformer:`` with any of ``Transformer``'s fields.

    Raises:
        ModelError: the name or a key is unknown, or a value cannot be.
    """
    named: Mapping[str, Mapping[str, Any]] = json.loads(
        files("meshwright").joinpath("models", "named.json").read_text("utf-8")
    )
    name, _, settings = spec.partition(":")
    if name in named:
        published = named[name]["spec"]
        name, settings = published.partition(":")[0], f"{published.partition(':')[2]},{settings}"
    if name not in FAMILIES:
        known = ", ".join(sorted(other for other in named if named[other]["spec"].startswith("gpt:")))
        raise ModelError(
            f"model {spec!r} is no plain transformer, which alone can be simulated without a trace; known are {known}, "
            "gpt:KEY=VALUE,... and transformer:KEY=VALUE,...; or plan it, and simulate the plan"
        )
    given = dict(_pair(part, spec) for part in settings.split(",") if part.strip())
    values: dict[str, Any] = {"vocabulary": 51200, "sequence": 1024, "dtype": "f32" if name == "gpt" else "bf16"}
    kinds = get_type_hints(Transformer)
    for key, text in given.items():
        field = SHORT.get(key, key)
        if name == "gpt" and key == "ffn":
            continue
        if field not in kinds:
            known = ", ".join(item.name for item in fields(Transformer))
            raise ModelError(f"model {spec!r}: there is no key {key!r}; known are {known}")
        values[field] = _value(key, text, kinds[field], spec)
    if name == "gpt":
        values |= {"layers": values.get("layers", 12), "hidden": values.get("hidden", 768)}
        values |= {"heads": values.get("heads", 12), "dropout": False}
        if "ffn" in given:
            values["ffn_hidden"] = _value("ffn", given["ffn"], int, spec) * values["hidden"]
    if missing := [need for need in ("layers", "hidden", "heads") if need not in values]:
        raise ModelError(f"model {spec!r} says no {', '.join(missing)}; give them, as in {name}:layers=24,hidden=2048")
    return Transformer(**values)


def _pair(part: str, spec: str) -> tuple[str, str]:
    key, equals, value = part.partition("=")
    if not (key.strip() and equals and value.strip()):
        raise ModelError(f"model {spec!r}: {part!r} is not key=value; write for example layers=12")
    return key.strip(), value.strip()


def _value(key: str, text: str, kind: Any, spec: str) -> Any:
    if kind is bool:
        if text.lower() not in TRUTHS:
            raise ModelError(f"model {spec!r}: {key}={text} is neither true nor false")
        return TRUTHS[text.lower()]
    if kind in (str, str | None):
        return text
    if not text.isdecimal():
        raise ModelError(f"model {spec!r}: {key}={text} is not a whole number")
    return int(text)


def parse_grid(given: Sequence[str], batch: int, cluster: Cluster) -> Grid:
    """``--fix key=value`` options as a ``Grid``; what data parallelism is not given takes the devices that are left.

    Raises:
        PlanError: an option is unknown or cannot be.
    """
    values: dict[str, Any] = {}
    seen: set[str] = set()
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise PlanError(f"--fix {text} has no value; write --fix KEY=VALUE")
        if key in seen:
            raise PlanError(f"--fix {key} is given twice; give it once")
        seen.add(key)
        match key:
            case "schedule":
                name, colon, chunks = value.partition(":")
                values["schedule"] = name
                values["chunks"] = _whole(f"schedule={name}:", chunks) if colon else find_schedule(name).chunks
            case "remat" if "," in value:
                values["recompute_per_stage"] = tuple(value.split(","))
            case "remat":
                values["recompute"] = value
            case "layers":
                values["layers_per_stage"] = _wholes("layers=", value)
            case "tensor" if "," in value:
                values["tensor_per_mesh"] = _wholes("tensor=", value)
            case "sequence-parallel":
                if value not in TRUTHS:
                    raise PlanError(f"--fix sequence-parallel={value}: use true or false")
                values["sequence_parallel"] = TRUTHS[value]
            case _ if key in COUNTS:
                values[key.replace("-", "_")] = _whole(f"{key}=", value)
            case _:
                known = (*COUNTS, "layers", "schedule", "remat", "sequence-parallel")
                raise PlanError(f"--fix {key} is unknown; known are {', '.join(known)}")
    meshes: tuple[int, ...] | None = values.get("tensor_per_mesh")
    if meshes is not None:
        values.setdefault("pipeline", len(meshes))
    taken = values.get("tensor", 1) * values.get("pipeline", 1) if meshes is None else sum(meshes)
    taken *= values.get("context", 1)
    product = "tensor × pipeline" if meshes is None else "tensor of all meshes"
    if taken < 1 or ("data" not in values and cluster.devices % taken):
        raise PlanError(
            f"{product} × context = {taken} does not divide the {cluster.devices} devices of {cluster.name}; "
            "use a divisor, or fix data too"
        )
    values.setdefault("data", cluster.devices // taken)
    if (microbatches := values.pop("microbatches", None)) is not None:
        parts = microbatches * values["data"]
        if microbatches < 1 or values["data"] < 1 or batch % parts:
            raise PlanError(
                f"a batch of {batch} does not split into {microbatches} micro-batches on {values['data']} "
                f"data-parallel ranks; use a multiple of {parts}"
            )
        if values.setdefault("microbatch_size", batch // parts) != batch // parts:
            raise PlanError(f"--fix microbatches={microbatches} means a microbatch-size of {batch // parts}; fix one")
    return Grid(batch=batch, **values)


def _wholes(key: str, value: str) -> tuple[int, ...]:
    """One number for each stage or mesh, between commas."""
    parts = value.split(",")
    if not all(part.isdecimal() for part in parts):
        raise PlanError(f"--fix {key}{value}: a whole number is needed for each stage, as in {key}4,2,2")
    return tuple(map(int, parts))


def _whole(key: str, value: str) -> int:
    if not value.isdecimal():
        raise PlanError(f"--fix {key}{value}: a whole number is needed")
    return int(value)


def to_json(prediction: GridPrediction, args: argparse.Namespace) -> dict[str, Any]:
    """The interface's object for ``simulate``."""
    model, grid, timeline = prediction.model, prediction.grid, prediction.timeline
    flops = model.step_flops(grid.batch)
    predicted = judge(
        timeline, prediction.cluster, grid.batch, model.sequence, flops, model.matmuls_in, _system_interval(args)
    )
    layers = stage_layers(model, grid)
    tensors = dict(zip(timeline.mesh_devices, grid.tensors, strict=True))
    answer: dict[str, Any] = {
        "model": args.plan,
        "cluster": args.cluster,
        "batch": grid.batch,
        "microbatches": grid.microbatches,
        "schedule": grid.schedule,
        "remat": grid.recompute if grid.recompute_per_stage is None else list(grid.recompute_per_stage),
        "stages": [
            {
                "layers": count,
                "devices": list(cost.devices),
                "mesh": {"data": grid.data, "context": grid.context, "tensor": tensors[cost.devices]},
                "forward_seconds": cost.forward_seconds,
                "backward_seconds": cost.backward_seconds,
                "peak_memory_bytes": timeline.peak_bytes[timeline.mesh_devices.index(cost.devices)],
            }
            for count, cost in zip(layers, prediction.costs.stages, strict=True)
        ],
        "predicted": msgspec.to_builtins(predicted)
        | {
            "exposed_communication_seconds": prediction.exposed_communication_seconds,
            "mfu": prediction.mfu,
            "hfu": prediction.hfu,
            "peak_memory_parts": dict(prediction.peak_parts),
        },
    }
    if args.flops == "megatron":
        rate = megatron_flops(model, grid.batch) / timeline.makespan_seconds / grid.devices
        answer["predicted"]["megatron_flops_per_second_per_device"] = rate
    return answer


def _system_interval(args: argparse.Namespace) -> Interval:
    name, _, system = args.stack.partition("@")
    return find_interval(name, system or None)


def describe(prediction: GridPrediction, args: argparse.Namespace) -> str:
    """The same for a person."""
    grid, timeline = prediction.grid, prediction.timeline
    axes: dict[str, int | str] = {
        name: getattr(grid, name) for name in ("data", "context", "tensor", "pipeline", "expert", "chunks")
    }
    if grid.tensor_per_mesh is not None:
        axes["tensor"] = ",".join(map(str, grid.tensor_per_mesh))
    shape = " × ".join(f"{name} {size}" for name, size in axes.items() if size != 1) or "one device"
    what = f"{args.plan} on {args.cluster}: {shape}, {grid.schedule}"
    speed = f"step time    {prediction.iteration_seconds:.4g} s   {prediction.tokens_per_second:,.0f} tokens/s"
    around = step_interval(prediction.cluster, _system_interval(args))
    low, high = (prediction.iteration_seconds * end for end in (around.low, around.high))
    exposed = f"communication exposed for {prediction.exposed_communication_seconds:.3g} s"
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in prediction.peak_parts)
    lines = [
        f"{what}, {grid.microbatches} micro-batches of {grid.microbatch_size}",
        f"{speed}   MFU {prediction.mfu:.1%}   HFU {prediction.hfu:.1%}",
        f"{COVERAGE:.0%} range    {low:.4g} to {high:.4g} s ({around.source})",
        f"bubble       {timeline.bubble_fraction:.1%} of all device time; {exposed}",
        f"peak memory  {prediction.peak_bytes / 1e9:.1f} GB on the fullest device: {parts}",
    ]
    if args.flops == "megatron":
        rate = megatron_flops(prediction.model, grid.batch) / timeline.makespan_seconds / grid.devices
        lines.append(f"FLOP/s       {rate / 1e12:.1f} T a device, by the formula of Narayanan et al., 2021")
    return "\n".join([*lines, "", explain(timeline, most=6)])
