"""Alpa's logged searches: what it predicted, what its plans took, and what the stock planner and simulator say of them.

Each logged run names its micro-batches, its stages' devices and their logical meshes. Our search is given exactly these
(and 1F1B and full rematerialisation, as all of these runs were); its simulator then predicts the step. The cut between
layers, which the log gives in Alpa's own clusters of equal FLOPs, is left to the search. So is nothing else, and no
constant is fitted to these runs. The runs fitted into 32 GB with Alpa's sharded optimizer state; what is asked here is
time, so memory is not limited.
"""

import ast
import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from meshwright.calibrate.hardware import Cluster, parse_cluster
from meshwright.plan.search import Fix, Request, search

_HOST_GPUS = 8
_VOCABULARY, _SEQUENCE, _HEADS = 51200, 1024, 32  # the runs' model family (Zheng et al., OSDI 2022, table 2)
_UNLIMITED_BYTES = 1e15


@dataclass(frozen=True, slots=True)
class Run:
    """One row of the log: the model, Alpa's plan, what Alpa predicted and what was measured."""

    gpus: int
    hidden: int
    layers: int
    batch: int
    microbatches: int
    meshes: tuple[tuple[int, int], ...]  # (data, tensor) of each stage
    alpa_seconds: float
    measured_seconds: float


def read_runs(path: Path, gpus: int) -> list[Run]:
    """The logged searches on so many GPUs; where layers were clustered in two ways, the first."""
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if int(row["gpus"]) == gpus]
    first = {int(row["num_micro_batches"]): row for row in reversed(rows)}
    return [
        Run(
            gpus,
            int(row["hidden"]),
            int(row["layers"]),
            int(row["global_batch"]),
            int(row["num_micro_batches"]),
            tuple((int(data), int(tensor)) for data, tensor in ast.literal_eval(row["logical_meshes"])),
            float(row["predicted_iter_s"]),
            float(row["measured_iter_s"]),
        )
        for _, row in sorted(first.items())
    ]


def our_seconds(run: Run) -> float:
    """Our prediction of one step of the run, on the shipped description of V100-32GB hosts."""
    from meshwright.models.zoo import get_model
    from meshwright.plan.trace.model import trace

    name = f"gpt:layers={run.layers},hidden={run.hidden},heads={_HEADS},seq={_SEQUENCE},vocab={_VOCABULARY},dtype=f16"
    model = get_model(name)
    cluster = _cluster(run.gpus)
    request = Request(cluster, run.batch, _fixed(run, cluster.devices))
    plan = search(lambda microbatches: trace(model, run.batch, microbatches).graph, request)
    return float(plan.predicted.iteration_seconds)


def _fixed(run: Run, devices: int) -> Fix:
    """Alpa's choices; equal meshes that fill the cluster as a number of them, which the search handles as one kind."""
    fix = Fix(microbatches=run.microbatches, schedule="1f1b", remat="full")
    data, tensor = run.meshes[0]
    if len(set(run.meshes)) == 1 and len(run.meshes) * data * tensor == devices:
        return replace(fix, pipeline=len(run.meshes), data=data, tensor=tensor)
    return replace(fix, stages=run.meshes)


def _cluster(gpus: int) -> Cluster:
    """Hosts of V100-32GB whose memory is no matter."""
    cluster = parse_cluster(f"v100-32gb:{-(-gpus // _HOST_GPUS)}")
    hosts = []
    for host in cluster.hosts:
        memory = msgspec.structs.replace(host.device.memory_bytes, value=_UNLIMITED_BYTES)
        hosts.append(msgspec.structs.replace(host, device=msgspec.structs.replace(host.device, memory_bytes=memory)))
    return msgspec.structs.replace(cluster, hosts=tuple(hosts))


def order(runs: Sequence[Run], seconds: Sequence[float]) -> list[int]:
    """Micro-batch counts of the runs, fastest first."""
    return [run.microbatches for _, run in sorted(zip(seconds, runs, strict=True), key=lambda pair: pair[0])]
