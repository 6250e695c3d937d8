"""How the columns of a row become a grid, a model and a network."""

import pytest

from experiments.validation.cases import Case, read_case
from experiments.validation.rows import Row

GPT = {
    "id": "mine-0",
    "source_id": "mine",
    "hardware": "A100-SXM",
    "gpus": "8",
    "gpus_per_node": "8",
    "framework": "Megatron-LM",
    "model": "GPT-1B",
    "layers": "8",
    "hidden": "1024",
    "heads": "16",
    "vocab": "51200",
    "seq": "1024",
    "precision": "fp16",
    "gbs": "16",
    "mbs": "2",
    "tp": "2",
    "pp": "2",
    "dp": "2",
    "recompute": "full",
    "schedule": "1f1b",
    "iter_time_s": "0.5",
    "status": "ok",
}


def row(**changes: str) -> Row:
    return Row(2, {**GPT, **changes})


def case(**changes: str) -> Case:
    return read_case(row(**changes))


@pytest.mark.parametrize(
    ("changes", "attribute", "value"),
    [
        ({"sharding": "FSDP2"}, "zero", 3),
        ({"sharding": "ZeRO-2"}, "zero", 2),
        ({"sharding": "dist-opt"}, "zero", 1),
        ({"schedule": "interleaved-1f1b", "vp": "2"}, "chunks", 2),
        ({"schedule": "interleaved-1f1b", "vp": "2"}, "schedule", "interleaved"),
        ({"schedule": "1f1b (DeepSpeed)"}, "schedule", "1f1b"),
        ({"schedule": "zb-h1"}, "schedule", "zb-h1"),
        ({"attn_impl": "flash"}, "fused_attention", True),
        ({"seq_parallel": "True"}, "sequence_parallel", True),
        ({"notes": "layers_per_stage=[4, 6]"}, "layers_per_stage", (3, 5)),
        ({"layers": "9"}, "layers_per_stage", (5, 4)),
    ],
)
def test_how_columns_become_a_grid(changes: dict[str, str], attribute: str, value: object) -> None:
    assert getattr(case(**changes).grid, attribute) == value


def test_llamas_are_gated_and_8_bits_are_those_of_the_products() -> None:
    model = case(model="Llama3-8B", hardware="H100-SXM", precision="FP8-CS", kv_heads="4", ffn_hidden="3584").model
    assert (model.gated, model.biases, model.tied, model.key_heads, model.ffn) == (True, False, False, 4, 3584)
    assert (model.dtype, model.matmul_dtype) == ("bf16", "f8")


@pytest.mark.parametrize(
    ("interconnect", "share", "cards"),
    [
        ("", 1.0, 8),
        ("NVLink + 800 Gbps IB/node", 0.5, 8),  # of 8 cards of 200 Gbit/s
        ("NVLink3 + 8xHDR200 IB/node (Selene)", 1.0, 8),
        ("NVLink3 + 4x Omni-Path 100Gb/s per node (somewhere)", 0.25, 4),
        ("400Gb/s RDMA per GPU", 2.0, 8),
    ],
)
def test_the_network_of_a_row_scales_the_machines(interconnect: str, share: float, cards: int) -> None:
    plain = case(gpus="16", dp="4").cluster
    found = case(gpus="16", dp="4", interconnect=interconnect).cluster
    whole, cap = plain.inter_host.host_bytes_per_second, found.inter_host.host_bytes_per_second
    assert whole is not None
    assert cap is not None
    assert cap.value == pytest.approx(share * whole.value)
    assert found.hosts[0].nics == cards
    assert found.inter_host.bytes_per_second.value * cards == pytest.approx(
        plain.inter_host.bytes_per_second.value * 8 * share
    )


def test_hosts_of_several_kinds_stand_as_the_row_names_them() -> None:
    found = case(hardware="RTX-2080+RTX-3090+Titan-RTX", gpus="32", gpus_per_node="8", tp="8", pp="4", dp="1", gbs="8")
    names = [host.device.name for host in found.cluster.hosts]
    assert [name.split("-")[1] for name in names] == ["2080", "2080", "3090", "RTX"]
    assert "hosts as rtx-2080ti:2+rtx-3090:1+titan-rtx:1" in found.assumed


def test_sailor_s_models_multiply_in_tf32_and_drop_nothing() -> None:
    found = case(framework="Megatron-DeepSpeed", model="OPT-350M", precision="")
    assert (found.model.dtype, found.model.dtype_bytes, found.model.dropout) == ("tf32", 4, False)
    assert found.stack.name == "huggingface-deepspeed"
