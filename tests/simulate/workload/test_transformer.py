"""Sizes, weights and arithmetic of transformers, against published formulas and counts."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import ModelError
from meshwright.simulate.workload.transformer import Transformer, megatron_flops

LLAMA: dict[str, Any] = {"gated": True, "biases": False, "rotary": True, "dropout": False, "tied": False}


def gpt(**sizes: Any) -> Transformer:
    return Transformer(**{"layers": 24, "hidden": 1024, "heads": 16, "vocabulary": 51200, "sequence": 2048, **sizes})


@given(
    layers=st.integers(1, 200),
    width=st.integers(1, 64),
    heads=st.integers(1, 64),
    vocabulary=st.integers(1, 300_000),
    sequence=st.integers(1, 8192),
)
def test_weights_of_a_gpt_are_those_of_the_paper(
    layers: int, width: int, heads: int, vocabulary: int, sequence: int
) -> None:
    """Narayanan et al., SC 2021, equation 2: P = 12 l h² (1 + 13 / 12h + (V + s) / 12lh), without the final norm."""
    h = width * heads
    model = gpt(layers=layers, hidden=h, heads=heads, vocabulary=vocabulary, sequence=sequence)
    assert model.parameters - 2 * h == 12 * layers * h**2 + 13 * layers * h + (vocabulary + sequence) * h


@pytest.mark.parametrize(
    ("model", "published"),
    [
        pytest.param(gpt(layers=96, hidden=12288, heads=96), 174.6e9, id="GPT-3 (SC 2021, table 1)"),
        pytest.param(gpt(layers=128, hidden=25600, heads=160), 1008.0e9, id="GPT 1T (SC 2021, table 1)"),
        pytest.param(
            Transformer(
                layers=32,
                hidden=4096,
                heads=32,
                kv_heads=8,
                ffn_hidden=14336,
                vocabulary=128256,
                sequence=8192,
                **LLAMA,
            ),
            8_030_261_248,
            id="Llama 3 8B (model card)",
        ),
        pytest.param(
            Transformer(
                layers=32,
                hidden=4096,
                heads=32,
                kv_heads=8,
                ffn_hidden=14336,
                vocabulary=32000,
                sequence=4096,
                experts=8,
                experts_per_token=2,
                **LLAMA,
            ),
            46_702_792_704,
            id="Mixtral 8x7B (model card)",
        ),
    ],
)
def test_weights_of_known_models(model: Transformer, published: float) -> None:
    assert model.parameters == pytest.approx(published, rel=5e-4 if published > 1e11 else 1e-12)


@given(layers=st.integers(1, 128), width=st.integers(1, 128), batch=st.integers(1, 4096))
def test_the_step_is_megatrons_without_its_fourth_pass(layers: int, width: int, batch: int) -> None:
    """Equation 3 counts four forwards' worth of the layers and three of the head; a step without recomputation, 3."""
    model = gpt(layers=layers, hidden=16 * width)
    head = 2.0 * batch * model.sequence * model.hidden * model.vocabulary
    layers_alone = model.forward_flops(batch) - head
    assert megatron_flops(model, batch) == pytest.approx(4 * layers_alone + 3 * head)
    assert model.step_flops(batch) == pytest.approx(3 * (layers_alone + head))


def test_a_causal_mask_halves_attention_alone() -> None:
    model = gpt()
    scores = 4.0 * model.layers * model.sequence**2 * model.hidden
    assert model.forward_flops(1) - model.forward_flops(1, causal=True) == pytest.approx(scores / 2)


def test_a_token_uses_only_the_experts_that_it_takes() -> None:
    dense, mixed = gpt(), gpt(experts=8, experts_per_token=2)
    tokens = dense.sequence
    mlp = 2.0 * tokens * 2 * dense.hidden * dense.ffn * dense.layers
    router = 2.0 * tokens * dense.hidden * 8 * dense.layers
    assert mixed.forward_flops(1) == pytest.approx(dense.forward_flops(1) + mlp + router)
    assert mixed.parameters > 3 * dense.parameters


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"layers": 0}, "layers of a transformer is 0"),
        ({"hidden": 1000}, "hidden 1000 does not split over 16 heads"),
        ({"kv_heads": 3}, "16 heads do not share 3 kv_heads"),
        ({"experts": 4, "experts_per_token": 5}, "cannot take 5 of 4 experts"),
        ({"dtype": "bf17"}, "dtype 'bf17' is unknown"),
        ({"matmul_dtype": "int3"}, "dtype 'int3' is unknown"),
    ],
)
def test_impossible_sizes_are_one_line(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        gpt(**sizes)
    assert "\n" not in str(error.value)
