"""``meshwright export``: a plan without our executor, as plain JAX or in the words of another framework."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from meshwright.errors import PlanError
from meshwright.models.base import Model
from meshwright.plan.export.base import Export
from meshwright.plan.export.jax import export_jax
from meshwright.plan.export.maxtext import export_maxtext
from meshwright.plan.export.megatron import export_megatron
from meshwright.plan.graph import ModelGraph
from meshwright.plan.planfile import Plan, load_plan


def _as_jax(plan: Plan, graph: ModelGraph, model: Model) -> Export:
    return export_jax(plan, graph, loss_is_mean=model.loss_reduction == "mean")


TARGETS: dict[str, Callable[[Plan, ModelGraph, Model], Export]] = {
    "jax": _as_jax,
    "megatron": lambda plan, graph, model: export_megatron(plan, graph),
    "maxtext": lambda plan, graph, model: export_maxtext(plan, graph),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``export``."""
    parser.add_argument("plan", metavar="PLAN", help="a plan file")
    parser.add_argument(
        "--to",
        required=True,
        choices=sorted(TARGETS),
        help="jax: a Python file of meshes and PartitionSpecs; megatron: flags of Megatron-LM; maxtext: its YAML",
    )
    parser.add_argument("--out", "-o", metavar="FILE", help="write to this file; by default to stdout")
    parser.add_argument("--json", action="store_true", help="print one JSON object: the text, and what it cannot say")


def run(args: argparse.Namespace) -> int:
    """Export; what cannot be expressed goes to stderr, so that stdout is the text alone."""
    plan = load_plan(args.plan)
    graph, model = _traced(plan)
    export = TARGETS[args.to](plan, graph, model)
    if args.out:
        target = Path(args.out)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(export.text, encoding="utf-8")
    if args.json:
        print(json.dumps({"to": args.to, "text": export.text, "cannot": list(export.cannot)}))
        return 0
    if not args.out:
        print(export.text, end="")
    for said in export.cannot:
        print(f"{'it does not' if args.to == 'jax' else 'cannot be said'}: {said}", file=sys.stderr)
    if args.out:
        print(f"wrote {args.out}")
    return 0


def _traced(plan: Plan) -> tuple[ModelGraph, Model]:
    """The model of the plan, which names parameters and layers.

    Errors: PlanError if it is not what the plan was made for.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")  # tracing needs no accelerator
    from meshwright.models.zoo import get_model
    from meshwright.plan.trace.model import trace

    model = get_model(plan.model)
    graph = trace(model, plan.batch, plan.microbatches).graph
    if graph.fingerprint != plan.fingerprint:
        raise PlanError(f"the plan was made for another version of {plan.model}; plan again before you export it")
    return graph, model
