"""Names, specs and the user's own functions; published parameter counts; errors that say what to change."""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from meshwright.errors import ModelError
from meshwright.models.parameters import Weight, count, initialize
from meshwright.models.zoo import NAMED, NAMES, get_model

PUBLISHED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "alpa" / "model_specs.json"


def parameters(spec: str) -> Any:
    return jax.eval_shape(get_model(spec).init_fn, jax.random.key(0))


@pytest.mark.parametrize("name", [name for name in NAMES if NAMED[name]["parameters"]])
def test_a_named_model_has_the_published_number_of_parameters(name: str) -> None:
    """To 0.7 %: published counts leave out positions, final norms or gates, and count a bias of the vocabulary."""
    assert count(parameters(name)) == pytest.approx(NAMED[name]["parameters"], rel=7e-3)


def test_named_models_are_those_of_alpas_suite() -> None:
    if not PUBLISHED.is_file():
        pytest.skip(f"the published table is not at {PUBLISHED}")
    suite = json.loads(PUBLISHED.read_text("utf-8"))
    for family in ("gpt", "moe", "wresnet"):
        for size, published in suite[family]["models"].items():
            named = NAMED[f"{family}-{size.lower()}"]
            assert named["parameters"] == pytest.approx(published["params_b"] * 1e9)
            settings = dict(pair.split("=") for pair in named["spec"].partition(":")[2].split(","))
            keys = {"base_channels": "channels", "width_factor": "width"}
            for key, value in published.items():
                if not key.startswith(("params", "pflop")):
                    assert settings[keys.get(key, key)] == str(value)


def test_names_of_the_contract_exist() -> None:
    gpt = "125m 350m 760m 1.3b 2.6b 6.7b 15b 39b 175b 1t"
    moe = "380m 690m 1.3b 2.4b 10b 27b 70b"
    wresnet = "250m 500m 1b 2b 4b 6.8b 13b"
    promised = [f"{family}-{size}" for family, sizes in (("gpt", gpt), ("moe", moe), ("wresnet", wresnet))
                for size in sizes.split()]  # fmt: skip
    assert {*promised, "two-tower-small", "llama-7b", "llama-13b", "llama-70b"} <= set(NAMES)


@pytest.mark.parametrize(
    "name", ["gpt-350m", "moe-380m", "wresnet-250m", "two-tower-small", "llama-7b", "multi-branch"]
)
def test_the_loss_of_every_family_traces_to_a_scalar(name: str) -> None:
    model = get_model(name)
    assert jax.eval_shape(model.loss_fn, parameters(name), model.batch_fn(4)).shape == ()
    assert model.microbatchable
    assert model.name == name


def test_a_spec_sets_what_it_says_and_leaves_the_rest() -> None:
    model = get_model("gpt:layers=3,hidden=48,heads=6,seq=20,vocab=99,dtype=bf16")
    tree = parameters(model.name)
    assert len(tree["layers"]) == 3
    assert tree["embedding"]["tokens"].shape == (99, 48)
    assert tree["layers"][0]["attention"]["qkv"]["kernel"].shape == (48, 3, 6, 8)
    assert model.tokens_per_sample == 20
    assert model.batch_fn(5)["tokens"].shape == (5, 20)


def test_a_named_model_may_be_varied() -> None:
    untied, tied = parameters("gpt-350m:tied=false"), parameters("gpt-350m")
    assert count(untied) - count(tied) == 51200 * 1024


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("gpt-350", "did you mean gpt-350m"),
        ("bert-large", "known are gpt-125m, "),
        ("", "known are gpt-125m, "),
        ("gpt:layer=3", "gpt has no key 'layer'; did you mean layers"),
        ("gpt:layers=three", "layers=three is not a whole number"),
        ("gpt:layers=2.5", "layers=2.5 is not a whole number"),
        ("gpt:layers=0", "layers=0 is not a size"),
        ("gpt:layers", "'layers' is not key=value"),
        ("gpt:layers=", "'layers=' is not key=value"),
        ("gpt:layers=2,layers=3", "gives layers 2 times"),
        ("gpt:hidden=100,heads=12", "use heads=10 or heads=20"),
        ("gpt:dtype=fp8", "use one of f32, bf16, f16"),
        ("gpt:tied=maybe", "tied=maybe is neither true nor false"),
        ("multi-branch:branches=0", "branches=0 is not a size"),
        ("multi-branch:after=-1", "after=-1 is not a number of layers"),
        ("moe:balance=nan", "not a finite number"),
        ("moe:balance=-1", "use 0 or more"),
        ("moe:experts=1", "needs at least 2"),
        ("moe:group=700", "use group=1024"),
        ("wresnet:layers=51", "use one of 14, 26, 50, 101, 152"),
        ("wresnet:norm=layer", "use one of batch, microbatch, group"),
        ("wresnet:norm=group,channels=40", "channels=64"),
        ("no_such_package:build", "there is no module 'no_such_package'"),
        ("json:no_such_function", "module json has no function 'no_such_function'"),
        ("os:getcwd", "returned str, not a meshwright.Model"),
    ],
)
def test_a_wrong_spec_gets_one_line_with_what_to_change(spec: str, says: str) -> None:
    with pytest.raises(ModelError) as caught:
        get_model(spec)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_function_of_the_users_own_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_zoo_module.py").write_text(
        "from meshwright.models.zoo import get_model\n"
        "def build():\n    return get_model('gpt:layers=1,hidden=8,heads=2')\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    assert get_model("my_zoo_module:build").tokens_per_sample == 1024


def test_a_module_that_fails_to_import_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_broken_module.py").write_text("import no_such_dependency\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="importing my_broken_module failed: No module named 'no_such_dependency'"):
        get_model("my_broken_module:build")


def test_parameters_start_as_their_weights_say_and_depend_on_the_key_alone() -> None:
    weights = {"a": Weight((400, 50), std=0.5, mean=2.0), "b": Weight((400, 50), std=0.5, mean=2.0), "c": Weight((3,))}
    first, again, other = (initialize(weights, jax.random.key(seed)) for seed in (7, 7, 8))
    assert float(first["a"].mean()) == pytest.approx(2.0, abs=0.02)
    assert float(first["a"].std()) == pytest.approx(0.5, abs=0.02)
    assert first["c"].tolist() == [0, 0, 0]
    assert (first["a"] == again["a"]).all()
    assert not (first["a"] == first["b"]).any()
    assert not (first["a"] == other["a"]).any()
