"""Readers of the measured tables of links: collectives, point-to-point transfers, and what layers tell of them."""

import csv
import gzip
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from meshwright.calibrate.collectives import spread

KINDS = {"alltoall": "all_to_all"}
SYSTEMS = {"a100_sxm": "A100", "h100_sxm": "H100", "h200_sxm": "H200"}  # and what they are called in sources
FAILED_SECONDS = 100.0  # Aceso and Mist write 10^6 seconds where memory did not suffice
SAILOR_HIDDEN = {"OPT-350": 1024, "GPT-Neo-2.7": 2560}
SAILOR_TOKENS = 2048  # of one sequence
SAILOR_LAYERS = range(2, 21)  # inner layers, equal among themselves
HOST_BOUND_SECONDS = 2e-3  # about 30 operators of a layer at 60 us each: what is quicker waits for the host
FORWARD_ALL_REDUCES = 2  # of a layer that is split over tensor ranks: Shoeybi et al., Megatron-LM, 2019, section 3


class Curve(NamedTuple):
    """Times of one kind of collective over sizes of the whole array."""

    system: str
    version: str
    kind: str
    dtype: str
    ranks: int
    message_bytes: np.ndarray
    seconds: np.ndarray

    @property
    def name(self) -> str:
        return f"{self.system} {self.version} {self.kind} {self.dtype} ×{self.ranks}"


def aiconfigurator_curves(data: Path) -> list[Curve]:
    """NCCL tables of A100, H100 and H200. An all-to-all's size there is one rank's, here the whole array's."""
    found: dict[tuple[str, str, str, str, int], list[tuple[float, float]]] = defaultdict(list)
    for row in _table(data / "collectives" / "nccl_aiconfigurator.csv.gz"):
        if row["system"] in SYSTEMS:
            kind, ranks = KINDS.get(row["op_name"], row["op_name"]), int(row["num_gpus"])
            size = float(row["bytes"]) * (ranks if kind == "all_to_all" else 1)
            key = (row["system"], row["nccl_dir"], kind, row["nccl_dtype"], ranks)
            found[key].append((size, float(row["latency_us"]) * 1e-6))
    return [_curve(key, points) for key, points in sorted(found.items())]


def vtrain_curves(data: Path) -> list[Curve]:
    """All-reduces of 1 MiB to 1 GiB in steps of 1 MiB: large sizes, which gradients have, weigh most.

    On 8 V100 the time drops at 14 MiB, where NCCL leaves the tree for the ring; no least of lines does, so the small
    sizes give way.
    """
    found: dict[tuple[str, str, str, str, int], list[tuple[float, float]]] = defaultdict(list)
    for row in _table(data / "collectives" / "nccl_other.csv.gz"):
        if row["hardware"] in ("A100", "V100"):
            key = (row["hardware"], "vTrain", row["op"], "f32", int(row["gpus"]))
            found[key].append((float(row["bytes"]), float(row["time_us"]) * 1e-6))
    return [_curve(key, points) for key, points in sorted(found.items())]


def profile_curves(data: Path) -> list[Curve]:
    """Aceso's and Mist's profiles, whose sizes are those that their programs pass."""
    curves = []
    for folder in (
        "aceso/v100",
        "mist/profile_v100-sxm2-32gb-seq2048",
        "mist/profile_a100-sxm4-40gb",
        "mist/profile_a10g",
        "mist/profile_l4",
    ):
        found: dict[tuple[str, str, str, str, int], list[tuple[float, float]]] = defaultdict(list)
        for row in _table(data / folder / "collectives.csv"):
            size, seconds = float(row["data_MB"]) * 2**20, float(row["time_ms_mean"]) * 1e-3
            if size > 0 and seconds < FAILED_SECONDS:
                key = (folder.removeprefix("mist/profile_"), "", row["collective"], "f16", int(row["num_gpus"]))
                found[key].append((size, seconds))
        curves += [_curve(key, _thinned(points)) for key, points in sorted(found.items())]
    return curves


def alpa_curves(data: Path) -> list[Curve]:
    """Alpa's profile of V100s over PCIe; its sizes count elements."""
    found: dict[tuple[str, str, str, str, int], list[tuple[float, float]]] = defaultdict(list)
    for row in _table(data / "alpa" / "prof_database.csv"):
        one_group = {"((0, 1),)": 2, "((0, 1, 2, 3),)": 4}
        group, _, dtype = row["key"][1:-1].rpartition(", ")
        if row["table"].endswith("_cost_dict") and group in one_group and int(row["size"]) > 0:
            kind, dtype = row["table"].removesuffix("_cost_dict"), dtype.strip("'")
            size = int(row["size"]) * (2 if dtype == "f16" else 4)
            found["v100-pcie", "alpa", kind, dtype, one_group[group]].append((size, float(row["time_s"])))
    return [_curve(key, points) for key, points in sorted(found.items())]


def sailor_curves(data: Path) -> list[Curve]:
    """All-reduces inside hosts of GH200 and RTX cards, from forwards of layers with and without tensor parallelism.

    Sailor times whole layers in float32. What t ranks take beyond a t-th of one rank's time goes to two all-reduces of
    the activations: an upper bound, since the parts of a layer are not quite t times as quick. Where the difference is
    below a tenth of the time, or the host launches kernels no quicker, the row says nothing.
    """
    found: dict[tuple[str, str, str, str, int], list[tuple[float, float]]] = defaultdict(list)
    layers = json.loads((data / "sailor" / "layer_profiles.json").read_text(encoding="utf-8"))
    for model, hidden in SAILOR_HIDDEN.items():
        for system, by_batch in layers[model].items():
            forwards = {
                (int(batch), int(ranks)): float(np.median([by_layer[str(layer)][0] for layer in SAILOR_LAYERS]))
                for batch, by_ranks in by_batch.items()
                for ranks, by_layer in by_ranks.items()
            }
            alone = np.median([seconds / batch for (batch, ranks), seconds in forwards.items() if ranks == 1])
            for (batch, ranks), seconds in forwards.items():
                beyond = seconds - batch * alone / ranks
                if ranks > 1 and beyond > seconds / 10 and seconds > HOST_BOUND_SECONDS:
                    size = 4.0 * hidden * SAILOR_TOKENS * batch
                    found[system, "sailor", "all_reduce", "f32", ranks].append((size, beyond / FORWARD_ALL_REDUCES))
    return [_curve(key, points) for key, points in sorted(found.items()) if len({x for x, _ in points}) > 2]


def transfers(data: Path, folder: str) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and seconds of point-to-point transfers inside a host."""
    rows = [row for row in _table(data / folder / "p2p_bandwidth.csv") if row["link"] == "intra_node"]
    size = np.array([float(row["data_MB"]) for row in rows]) * 2**20
    return size, size / np.array([float(row["bandwidth_GBps"]) for row in rows]) / 1e9


def multi_host_rows(data: Path) -> list[dict[str, str]]:
    """Rows of tables that are not aiconfigurator's, with a size."""
    return [row for row in _table(data / "collectives" / "nccl_other.csv.gz") if row["bytes"]]


def _table(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as stream:
        yield from csv.DictReader(line for line in stream if not line.startswith("#"))


def _curve(key: tuple[str, str, str, str, int], points: list[tuple[float, float]]) -> Curve:
    size, seconds = np.array(sorted(points)).T
    return Curve(*key, size, seconds)


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [points[index] for index in spread([size for size, _ in points])]
