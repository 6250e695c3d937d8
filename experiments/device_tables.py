"""Readers of the measured tables of devices: matmuls, attention, streams of memory, and kernels side by side."""

import csv
import gzip
import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from meshwright.calibrate.device import ACTIVITIES
from meshwright.calibrate.kernels import Forwards, Matmuls
from meshwright.simulate.compute import SCORE_PASSES

LEAST_ATTENTION = 2**18  # queries × heads from which a forward fills the device
MEBI = 2**20
LAYER_PASSES = 18  # over the activations of an unfused layer: 2 norms, 2 dropouts with sums, gelu of 4 widths, biases
OPT_350M = (1024, 16, 2048)  # hidden, heads, tokens of a sequence


def read_matmuls(data: Path, name: str) -> Matmuls:
    """The matmuls of a device."""
    table = read(data / "kernels" / f"gemm_{name}_sxm_bf16.csv.gz")
    m, n, k, milliseconds = (
        np.array([float(row[column]) for row in table]) for column in ("m", "n", "k", "latency_ms")
    )
    return Matmuls(m, n, k, milliseconds / 1e3)


def read_attention(data: Path, name: str) -> Forwards:
    """Causal fused forwards that fill the device, with heads of 128, in 16-bit floats."""
    table = [
        row
        for row in read(data / "kernels" / f"attention_fwd_{name}_sxm.csv.gz")
        if row["head_dim"] == "128"
        and row["kernel_source"] in ("flash_attention", "fa3")
        and int(row["batch_size"]) * int(row["isl"]) * int(row["num_heads"]) >= LEAST_ATTENTION
    ]
    keys, batch, heads, kv_heads, milliseconds, teraflops = (
        np.array([float(row[column]) for row in table])
        for column in ("isl", "batch_size", "num_heads", "num_key_value_heads", "latency_ms", "causal_tflops")
    )
    queries_bytes, keys_bytes = (2 * 128 * batch * keys * count for count in (heads, kv_heads))
    seconds = milliseconds / 1e3
    moved = 2 * (queries_bytes + keys_bytes)
    return Forwards(keys, teraflops * 1e12 * seconds, moved, 2 * keys_bytes, seconds)


def read_overlap(data: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """What matmuls, collectives and copies take alone, and together, for each run of several at once.

    What one takes alone is the median of its runs with nothing beside it, in the same setting and of the same size.
    """
    table = read(data / "overlap" / f"overlap_interference_{name}.csv.gz")
    columns = ("n", "g2g_MB", "g2c_MB", "c2g_MB")  # in the order of ACTIVITIES
    alone: dict[tuple[str, int, float], list[float]] = defaultdict(list)
    for row in table:
        sizes = [float(row[column]) for column in columns]
        if sum(size > 0 for size in sizes) == 1:
            which = next(i for i, size in enumerate(sizes) if size > 0)
            alone[row["file"], which, sizes[which]].append(float(row["latency_ms"]) / 1e3)
    found, together = [], []
    for row in table:
        sizes = [float(row[column]) for column in columns]
        keys = [(row["file"], i, size) for i, size in enumerate(sizes) if size > 0]
        if len(keys) > 1 and all(key in alone for key in keys):
            seconds = np.zeros(len(ACTIVITIES))
            for _, which, size in keys:
                seconds[which] = np.median(alone[row["file"], which, size])
            found.append(seconds)
            together.append(float(row["latency_ms"]) / 1e3)
    return np.array(found), np.array(together)


def read(path: Path) -> list[dict[str, str]]:
    """A table; lines of remarks begin with #."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        return list(csv.DictReader(line for line in lines if not line.startswith("#")))


class Profile(NamedTuple):
    """What an operator profile of GPT layers says of a device: its matmuls, and its streams of memory."""

    matmuls: Matmuls
    stream_bytes: np.ndarray
    stream_seconds: np.ndarray


def read_profile(data: Path, folder: str) -> Profile:
    """Forwards of Mist's or Aceso's operators that wait for no other device, in 16-bit floats.

    The MLP's first matmul is split by columns and needs no collective; the other three are taken where one device has
    the whole layer, and so are the streams: layer norm and GELU read and write their activations once, softmax its
    scores.
    """
    rows = read(data / folder / "op_profile_gpt.csv")
    layers: dict[tuple[str, str, str, str], dict[str, dict[str, str]]] = defaultdict(dict)
    for row in rows:
        layers[row["model_size"], row["mbs"], row["tp"], row["algo"]][row["op"]] = row
    matmuls, streams = [], []
    for (_, _, ranks_text, _), ops in layers.items():
        ranks = int(ranks_text)
        width = np.sqrt(float(ops["enc-attention-qkv"]["weights_MB"]) * MEBI * ranks / 6)  # 3 h² / ranks of 2 bytes
        hidden = 64 * round(width / 64)
        tokens = float(ops["encoder-embedding"]["output_MB"]) * MEBI / 2 / hidden
        shapes = {"enc-MLP-GEMM-1": (4 * hidden / ranks, hidden)}
        if ranks == 1:
            shapes |= {"enc-attention-qkv": (3 * hidden, hidden), "enc-attention-dense": (hidden, hidden)}
            shapes |= {"enc-MLP-GEMM-2": (hidden, 4 * hidden)}
            scores = float(ops["enc-attention-softmax"]["activations_MB"]) * MEBI
            moved = {"enc-1st-layernorm": 4 * tokens * hidden, "enc-MLP-gelu": 16 * tokens * hidden}
            moved |= {"enc-attention-softmax": 2 * scores}
            streams += [(each, float(ops[op]["fwd_us"]) / 1e6) for op, each in moved.items()]
        matmuls += [(tokens, n, k, float(ops[op]["fwd_us"]) / 1e6) for op, (n, k) in shapes.items()]
    stream_bytes, stream_seconds = np.array(sorted(streams)).T
    return Profile(Matmuls(*np.array(sorted(matmuls)).T), stream_bytes, stream_seconds)


class Layers(NamedTuple):
    """Forwards of a whole OPT-350M layer on one device in float32, for several batches."""

    flops: np.ndarray
    bytes: np.ndarray
    seconds: np.ndarray


def read_layers(data: Path, system: str) -> Layers:
    """Sailor's profile of a device, with what an unfused layer computes and moves."""
    profiles = json.loads((data / "sailor" / "layer_profiles.json").read_text(encoding="utf-8"))
    hidden, heads, tokens = OPT_350M
    flops = 2 * 12 * hidden**2 * tokens + 4 * tokens**2 * hidden
    moved = 4 * (SCORE_PASSES * heads * tokens**2 + LAYER_PASSES * tokens * hidden)
    batches, seconds = [], []
    for batch, by_ranks in profiles["OPT-350"][system].items():
        if "1" in by_ranks:
            batches.append(float(batch))
            seconds.append(float(np.median([by_ranks["1"][str(layer)][0] for layer in range(2, 21)])))
    sizes = np.array(batches)
    return Layers(sizes * flops, sizes * moved, np.array(seconds))


def read_streams(data: Path, op: str) -> tuple[np.ndarray, np.ndarray]:
    """Bytes read and written (16-bit floats) and seconds of LLMCompass's memory-bound operators on A100."""
    rows = [row for row in read(data / "kernels" / "membound_a100_llmcompass.csv") if row["op"] == op]
    moved = np.array([4 * float(row["rows"]) * float(row["cols"]) for row in rows])
    return moved, np.array([float(row["time_us"]) for row in rows]) / 1e6
