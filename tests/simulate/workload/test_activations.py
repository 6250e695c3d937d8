"""What a layer keeps for its backward, against Korthikanti et al., 2022 (arXiv:2205.05198)."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.simulate.workload.activations import head_bytes, layer_bytes
from meshwright.simulate.workload.grid import Grid
from meshwright.simulate.workload.pieces import Local
from meshwright.simulate.workload.stack import find_stack
from meshwright.simulate.workload.transformer import Transformer

SIZES = st.fixed_dictionaries(
    {"a": st.sampled_from([8, 16, 96]), "width": st.sampled_from([64, 80, 128]), "s": st.sampled_from([512, 2048])}
)


def local(a: int, width: int, s: int, t: int = 1, b: int = 1, **grid: object) -> Local:
    model = Transformer(layers=4, hidden=a * width, heads=a, vocabulary=51200, sequence=s, dtype="f16")
    plan = Grid(batch=b, microbatch_size=b, tensor=t, fused_attention=False, **grid)  # type: ignore[arg-type]
    return Local(model, plan, find_stack("megatron-2021"))


@given(sizes=SIZES, b=st.integers(1, 8))
def test_equation_1_without_parallelism(sizes: dict[str, int], b: int) -> None:
    """s b h (34 + 5 a s / h)"""
    s, a, h = sizes["s"], sizes["a"], sizes["a"] * sizes["width"]
    assert layer_bytes(local(**sizes, b=b)) == s * b * h * 34 + 5 * a * s * s * b


@given(sizes=SIZES, b=st.integers(1, 8), t=st.sampled_from([2, 4, 8]))
def test_equation_2_with_tensor_parallelism(sizes: dict[str, int], b: int, t: int) -> None:
    """s b h (10 + 24 / t + 5 a s / (h t))"""
    s, a, h = sizes["s"], sizes["a"], sizes["a"] * sizes["width"]
    assert layer_bytes(local(**sizes, b=b, t=t)) == pytest.approx(s * b * (h * (10 + 24 / t) + 5 * a * s / t))


@given(sizes=SIZES, b=st.integers(1, 8), t=st.sampled_from([2, 4, 8]))
def test_equation_4_with_sequence_parallelism(sizes: dict[str, int], b: int, t: int) -> None:
    """s b h / t (34 + 5 a s / h)"""
    s, a, h = sizes["s"], sizes["a"], sizes["a"] * sizes["width"]
    kept = layer_bytes(local(**sizes, b=b, t=t, sequence_parallel=True))
    assert kept == pytest.approx(s * b / t * (34 * h + 5 * a * s))


@given(sizes=SIZES, b=st.integers(1, 8), t=st.sampled_from([1, 2, 8]))
def test_selective_recomputation_drops_the_core_of_attention(sizes: dict[str, int], b: int, t: int) -> None:
    """Table 2: s b h (34 / t) with sequence parallelism, and full recomputation keeps 2 s b h."""
    s, h = sizes["s"], sizes["a"] * sizes["width"]
    selective = local(**sizes, b=b, t=t, sequence_parallel=t > 1, recompute="selective")
    assert layer_bytes(selective) == pytest.approx(34 * s * b * h / t)
    assert layer_bytes(local(**sizes, b=b, t=t, recompute="full")) == 2 * s * b * h


def test_flash_attention_keeps_no_scores() -> None:
    plain = local(16, 64, 2048)
    fused = replace(plain, grid=replace(plain.grid, fused_attention=True))
    rows = 16 * 2048  # heads × queries, one f32 each
    assert layer_bytes(fused) == 34 * 2048 * 1024 + 4 * rows


def test_the_head_keeps_its_inputs_and_the_logits_in_f32() -> None:
    """Section 4.3: 4 s b h / t (1 + v / h) of the last stage; the inputs of its norm and of its product are split."""
    here = local(16, 64, 2048, t=8, b=4, sequence_parallel=True)
    assert head_bytes(here) == pytest.approx(4 * 2048 * 4 * 1024 / 8 * (1 + 51200 / 1024))
