"""``meshwright export``: a plan without our executor, as plain JAX or in the words of another framework."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from meshwright.errors import PlanError
from meshwright.plan.export.base import Export
from meshwright.plan.export.jax import export_jax
from meshwright.plan.export.maxtext import export_maxtext
from meshwright.plan.export.megatron import export_megatron
from meshwright.plan.planfile import Plan, load_plan

if TYPE_CHECKING:
    from meshwright.plan.trace.model import Trace


def _as_jax(plan: Plan, traced: "Trace") -> Export:
    rows = {traced.user_parameters[part.leaf].name: part.dim for part in traced.parts if part.row is not None}
    return export_jax(plan, traced.graph, loss_is_mean=traced.model.loss_reduction == "mean", stacked=rows)


TARGETS: dict[str, Callable[[Plan, "Trace"], Export]] = {
    "jax": _as_jax,
    "megatron": lambda plan, traced: export_megatron(plan, traced.graph),
    "maxtext": lambda plan, traced: export_maxtext(plan, traced.graph),
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
    export = TARGETS[args.to](plan, _traced(plan))
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


def _traced(plan: Plan) -> "Trace":
    """The model of the plan, which names parameters and layers.

    Errors: PlanError if it is not what the plan was made for.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")  # tracing needs no accelerator
    from meshwright.models.zoo import get_model
    from meshwright.plan.trace.model import trace

    traced = trace(get_model(plan.model), plan.batch, plan.microbatches)
    if traced.graph.fingerprint != plan.fingerprint:
        raise PlanError(f"the plan was made for another version of {plan.model}; plan again before you export it")
    return traced
