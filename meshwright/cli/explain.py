"""``meshwright explain``: why a plan takes as long and holds as much, and where another differs."""

import argparse
import json
import sys

from meshwright.errors import ModelError
from meshwright.plan.explain import Explanation, differences, explain
from meshwright.plan.explain_layers import LayerGroup, layer_groups
from meshwright.plan.explain_text import differences_text, explanation_text
from meshwright.plan.planfile import Plan, load_plan, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``explain``."""
    parser.add_argument("plan", metavar="PLAN", help="a plan file")
    parser.add_argument("--against", metavar="PLAN2", help="another plan: where the two differ")
    parser.add_argument("--plot", metavar="FILE", help="write a picture of the cut and of the meshes")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Explain one plan, or hold two against each other."""
    plan = load_plan(args.plan)
    other = load_plan(args.against) if args.against else None
    found = explain(plan)
    groups = groups_of(plan)
    against = explain(other) if other is not None else None
    if args.plot:
        from meshwright.plan.picture import plot_plan

        plot_plan(plan, args.plot)
    if args.json:
        print(json.dumps(data(found, groups, against), allow_nan=False))
        return 0
    print(table(plan))
    print()
    print(explanation_text(found, groups))
    if against is not None:
        print()
        print(differences_text(found, against, (args.plan, args.against)))
    return 0


def data(found: Explanation, groups: tuple[LayerGroup, ...], against: Explanation | None) -> dict[str, object]:
    """All of it as plain data."""
    told: dict[str, object] = found.to_json()
    told["layers"] = [
        {"stage": g.stage, "layers": list(g.layers), "entry": g.entry, "weights": dict(g.weights)} for g in groups
    ]
    if against is not None:
        told["against"] = against.to_json()
        told["differences"] = [
            {"cause": cause, "seconds": mine, "against_seconds": theirs}
            for cause, mine, theirs in differences(found, against)
        ]
    return told


def groups_of(plan: Plan) -> tuple[LayerGroup, ...]:
    """The layers in words; none, and a note, where the model cannot be traced as it was planned."""
    from meshwright.models.zoo import get_model
    from meshwright.plan.trace.model import trace

    try:
        graph = trace(get_model(plan.model), plan.batch, plan.microbatches).graph
    except ModelError as error:
        print(f"note: layers are not told, since the model is unknown here ({error})", file=sys.stderr)
        return ()
    if graph.fingerprint != plan.fingerprint:
        print("note: layers are not told, since the plan was made for another version of the model", file=sys.stderr)
        return ()
    return layer_groups(plan, graph)
