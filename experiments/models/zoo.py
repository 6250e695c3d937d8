"""Models by name: ``get_model("gpt-2.6b")``, ``"gpt:layers=4,hidden=256"``, ``"my_package.models:build"``.

``named.json`` holds the named models with their published parameter counts and sources. As their papers ran them, the
language models compute in float16 and Wide-ResNets in float32; a spec computes in float32 unless it says otherwise.
A named model may be varied: ``gpt-2.6b:tied=false`` has an output projection of its own, as in Alpa's measured runs
(its published counts, ours too, are those with one table).
"""

import difflib
import importlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from meshwright.errors import ModelError
from meshwright.models import gpt, llama, moe, multi_branch, two_tower, wide_resnet
from meshwright.models.base import Model
from meshwright.models.transformer import DTYPES

FAMILIES: dict[str, tuple[type, Callable[[Any, str], Model]]] = {
    "gpt": (gpt.GPTConfig, gpt.build),
    "llama": (llama.LlamaConfig, llama.build),
    "moe": (moe.MoEConfig, moe.build),
    "wresnet": (wide_resnet.WideResNetConfig, wide_resnet.build),
    "multi-branch": (multi_branch.MultiBranchConfig, multi_branch.build),
    "two-tower": (two_tower.TwoTowerConfig, two_tower.build),
}
NAMED: Mapping[str, Mapping[str, Any]] = json.loads(Path(__file__).with_name("named.json").read_text("utf-8"))
NAMES: tuple[str, ...] = tuple(NAMED)
_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_BOOLS = {"true": True, "false": False}


def get_model(spec: str) -> Model:
    """The model that ``spec`` names; ``get_model(model.name)`` gives it again.

    Errors:
        ModelError: unknown name, key or value, sizes that do not fit, or a function that gives no ``Model``.
    """
    name, _, settings = spec.strip().partition(":")
    if name in NAMED:
        family, _, published = NAMED[name]["spec"].partition(":")
        return _build(family, {**_settings(published, spec), **_settings(settings, spec)}, spec)
    if name in FAMILIES:
        return _build(name, _settings(settings, spec), spec)
    if _FUNCTION.fullmatch(spec.strip()):
        return _imported(spec.strip())
    raise ModelError(f"unknown model {spec!r}: {_closest(name, (*NAMES, *FAMILIES))}")


def _settings(text: str, spec: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    for key, equals, value in pairs:
        if not (key.strip() and equals and value.strip()):
            raise ModelError(f"model {spec!r}: {key + equals + value!r} is not key=value; write for example layers=12")
    keys = [key.strip() for key, _, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ModelError(f"model {spec!r} gives {key} {keys.count(key)} times; give it once")
    return {key.strip(): value.strip() for key, _, value in pairs}


def _build(family: str, settings: Mapping[str, str], spec: str) -> Model:
    config, build = FAMILIES[family]
    types = {field.name: field.type for field in fields(config)}
    values = {}
    for key, text in settings.items():
        if key not in types:
            raise ModelError(f"model {spec!r}: {family} has no key {key!r}; {_closest(key, tuple(types))}")
        values[key] = _value(key, text, types[key], spec)
    try:
        return build(config(**values), spec.strip())
    except ModelError as error:
        raise ModelError(f"model {spec!r}: {error}") from None


def _value(key: str, text: str, kind: Any, spec: str) -> int | float | bool | str:
    if key == "dtype" and text not in DTYPES:
        raise ModelError(f"model {spec!r}: dtype={text} is not known; use one of {', '.join(DTYPES)}")
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in _BOOLS:
            raise ModelError(f"model {spec!r}: {key}={text} is neither true nor false")
        return _BOOLS[text.lower()]
    try:
        number: float = kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise ModelError(f"model {spec!r}: {key}={text} is not {what}") from None
    if number != number or number in (float("inf"), float("-inf")):
        raise ModelError(f"model {spec!r}: {key}={text} is not a finite number")
    return number


def _closest(word: str, words: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(word, words, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(words)}"


def _imported(spec: str) -> Model:
    """Call the user's own function; the current folder is searched for its module, as ``python -m`` does."""
    path, _, function = spec.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        build = getattr(importlib.import_module(path), function, None)
    except ModuleNotFoundError as error:
        if error.name is None or not (path + ".").startswith(error.name + "."):
            raise ModelError(f"model {spec!r}: importing {path} failed: {error}") from error
        raise ModelError(
            f"model {spec!r}: there is no module {error.name!r} here or on PYTHONPATH; "
            f"{_closest(path, (*NAMES, *FAMILIES))}"
        ) from None
    if not callable(build):
        raise ModelError(f"model {spec!r}: module {path} has no function {function!r}")
    model = build()
    if not isinstance(model, Model):
        raise ModelError(f"model {spec!r}: {function}() returned {type(model).__name__}, not a meshwright.Model")
    return model
