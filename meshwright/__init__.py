"""Meshwright: plan, predict and run distributed JAX training."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meshwright.api import build as build
    from meshwright.api import cluster as cluster
    from meshwright.api import find_plan as find_plan
    from meshwright.models.base import Model as Model
    from meshwright.plan.planfile import Plan as Plan
    from meshwright.plan.planfile import load_plan as load_plan
    from meshwright.plan.planfile import save_plan as save_plan
    from meshwright.plan.predict import predict as predict
    from meshwright.plan.search import Fix as Fix
    from meshwright.plan.trace.markers import mark_layer as mark_layer

__version__ = "0.1.0"

# Looked up when first used: importing the package brings in neither JAX nor MPI.
_HOMES = {
    "build": "meshwright.api",
    "cluster": "meshwright.api",
    "find_plan": "meshwright.api",
    "Model": "meshwright.models.base",
    "Plan": "meshwright.plan.planfile",
    "load_plan": "meshwright.plan.planfile",
    "save_plan": "meshwright.plan.planfile",
    "predict": "meshwright.plan.predict",
    "Fix": "meshwright.plan.search",
    "mark_layer": "meshwright.plan.trace.markers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
