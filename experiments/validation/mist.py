"""Plans of unlike stages that Aceso found and Mist's authors measured → cases.

A plan cuts GPT between operators: 13 of each layer, in the order of our pieces, one before the first, two after the
last (these stay on the last stage, wherever the plan has them), and says of each whether it is recomputed.

Source: Zhu et al., Mist, EuroSys 2025, artifact, which runs Aceso (Liu et al., EuroSys 2024) on its own runtime.
"""

import json
from pathlib import Path
from typing import Any

import msgspec

from experiments.validation.cases import Case, system_of
from experiments.validation.rows import DataError, Refused, Row
from meshwright.calibrate.hardware import Cluster, parse_cluster
from meshwright.simulate.workload.grid import Grid
from meshwright.simulate.workload.stack import find_stack
from meshwright.simulate.workload.transformer import Transformer

LAYER_OPERATORS, FIRST_OPERATOR = 13, 1
MACHINES = {"l4": "g6.48xlarge", "a100-sxm4-40gb": "p4d.24xlarge", "a100-sxm4-40gb-larger-model": "p4d.24xlarge"}
STACK = "megatron-2021"  # whose code the runtime derives from
SOURCE, PLANS_FILE = "mist", "measured_plans_full.json"


def read_plans(path: Path) -> list[dict[str, Any]]:
    """All plans of the file.

    Raises:
        DataError: it cannot be read or holds no plans.
    """
    try:
        plans: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["configs"]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); give the path of a JSON file") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: is not a JSON file with a list of plans under 'configs'") from None
    return plans


def plan_case(plan: dict[str, Any], number: int = 1) -> Case:
    """What a plan asks for.

    Raises:
        Refused: it runs on a machine that is not shipped, or splits within a stage in a way that cannot be expressed.
    """
    config = plan["config_json_rle"]
    if plan["gpu"] not in MACHINES:
        raise Refused(f"no machine for {plan['gpu']}")
    recomputed = [_unpacked(packed) for packed in config["recompute_ops__rle"]]
    model = Transformer(
        layers=plan["num_layers"],
        hidden=plan["hidden_size"],
        heads=plan["num_attention_heads"],
        vocabulary=51200,
        sequence=plan["seq_length"],
        dtype="f16",
    )
    grid = Grid(
        batch=plan["global_batch_size"],
        microbatch_size=plan["micro_batch_size"],
        pipeline=plan["num_stages"],
        operators_per_stage=layer_operators(recomputed, plan["num_layers"]),
        tensor_per_mesh=_tensors(config),
        fused_attention=False,
    )
    hardware = plan["gpu"].removesuffix("-larger-model")  # as one folder of the artifact is named
    cells = {"source_id": SOURCE, "hardware": hardware, "framework": "Aceso's runtime", "model": plan["config"]}
    if plan.get("max_allocated_MB"):
        cells["mem_gib"] = str(plan["max_allocated_MB"] / 1024)
    assumed = ("vocabulary of 51,200", "unfused attention", "recomputed operators one by one")
    row = Row(number, cells)
    stack = find_stack(STACK, system_of(row))
    return Case(row, model, _cluster(plan), grid, stack, plan["measured_iter_ms"] / 1e3, assumed)


def layer_operators(recomputed: list[list[int]], layers: int) -> tuple[tuple[bool, ...], ...]:
    """Of each stage's operators those of layers: not the embedding's, nor final norm and logits.

    Raises:
        Refused: there are too few.
    """
    flags = [[bool(flag) for flag in stage] for stage in recomputed]
    flags[0] = flags[0][FIRST_OPERATOR:]
    spare = sum(map(len, flags)) - LAYER_OPERATORS * layers
    if not 0 <= spare <= len(flags[-1]):
        raise Refused("operators are not those of the layers", f"{spare} more or fewer")
    flags[-1] = flags[-1][: len(flags[-1]) - spare]
    return tuple(tuple(stage) for stage in flags)


def _tensors(config: dict[str, Any]) -> tuple[int, ...]:
    sizes = []
    for packed, copies in zip(
        config["model_parallel_size_of_each_op__rle"], config["data_parallel_size_of_each_op__rle"], strict=True
    ):
        tensor = {size for size, _ in packed}
        if len(tensor) > 1 or {size for size, _ in copies} != {1}:
            raise Refused("operators of a stage are split differently, or over data")
        sizes.append(int(tensor.pop()))
    return tuple(sizes)


def _unpacked(packed: list[list[int]]) -> list[int]:
    return [value for value, count in packed for _ in range(count)]


def _cluster(plan: dict[str, Any]) -> Cluster:
    """Hosts of 8 devices, or one of as many as the plan takes."""
    shipped = parse_cluster(MACHINES[plan["gpu"]])
    gpus, each = int(plan["num_gpus_total"]), shipped.hosts[0].devices
    host = msgspec.structs.replace(shipped.hosts[0], devices=min(gpus, each))
    if gpus % host.devices:
        raise Refused("gpus do not fill the hosts", f"{gpus} on hosts of {each}")
    return msgspec.structs.replace(shipped, hosts=(host,) * (gpus // host.devices))
