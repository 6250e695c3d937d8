"""The cut and the meshes of a plan as a picture: which layers lie on which devices of which host."""

import os

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from meshwright.plan.planfile import Plan, PlannedStage

MOST_HOSTS = 32  # drawn; of more, the first
# Okabe and Ito's colours, which the colour-blind can tell apart; they repeat after seven stages.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
DARK = (0, 2, 5)  # of them, on which white is read more easily


def plot_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write the picture: above the layers as a line, cut into stages; below each host as a row of devices."""
    cluster = plan.hardware
    hosts = min(len(cluster.hosts), MOST_HOSTS)
    figure = Figure(figsize=(10, 2.8 + 0.42 * hosts), layout="constrained")
    cut, machines = figure.subplots(2, 1, height_ratios=(1.2, 0.5 + 0.42 * hosts))
    _draw_cut(cut, plan)
    _draw_hosts(machines, plan, hosts)
    figure.savefig(path, dpi=120)


def _draw_cut(axes: Axes, plan: Plan) -> None:
    layers = plan.stages[-1].layers[1]
    for number, stage in enumerate(plan.stages):
        first, last = stage.layers
        axes.add_patch(Rectangle((first, 0), last - first, 1, facecolor=_colour(number), edgecolor="white"))
        if (last - first) / layers > 0.03:
            axes.text(
                (first + last) / 2,
                0.5,
                str(number),
                ha="center",
                va="center",
                color="white" if number % len(COLOURS) in DARK else "black",
                fontsize=9,
            )
    axes.set(xlim=(0, layers), ylim=(0, 1), yticks=[], xlabel="layer")
    axes.set_title(
        f"{plan.model} on {plan.cluster.get('name', '?')}: {len(plan.stages)} stages, {plan.schedule}, "
        f"{plan.microbatches} micro-batches",
        fontsize=10,
    )


def _draw_hosts(axes: Axes, plan: Plan, hosts: int) -> None:
    cluster = plan.hardware
    stage_of = {device: number for number, stage in reversed(list(enumerate(plan.stages))) for device in stage.devices}
    widest = max(host.devices for host in cluster.hosts)
    device = 0
    for host in range(hosts):
        for place in range(cluster.hosts[host].devices):
            stage = stage_of.get(device)
            colour = "white" if stage is None else _colour(stage)
            axes.add_patch(Rectangle((place, host), 0.94, 0.86, facecolor=colour, edgecolor="grey", linewidth=0.8))
            if widest <= 16:
                text = "idle" if stage is None else f"{device}"
                ink = "white" if stage is not None and stage % len(COLOURS) in DARK else "black"
                axes.text(place + 0.47, host + 0.43, text, ha="center", va="center", fontsize=7, color=ink)
            device += 1
    axes.set(xlim=(0, widest), ylim=(hosts, 0), xticks=[], yticks=[h + 0.43 for h in range(hosts)])
    left_out = len(cluster.hosts) - hosts
    axes.set_yticklabels([f"host {h}" for h in range(hosts)], fontsize=7)
    axes.set_title("devices by number" + (f"; {left_out} more hosts" if left_out else ""), fontsize=9)
    for side in axes.spines.values():
        side.set_visible(False)
    handles = [Rectangle((0, 0), 1, 1, facecolor=_colour(n)) for n in range(len(plan.stages))][: len(COLOURS)]
    labels = [_legend(number, stage) for number, stage in enumerate(plan.stages)][: len(COLOURS)]
    axes.legend(handles, labels, fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 0.0), frameon=False)


def _legend(number: int, stage: PlannedStage) -> str:
    mesh = " × ".join(f"{name} {size}" for name, size in stage.mesh.items() if size > 1) or "one device"
    return f"stage {number}: layers {stage.layers[0]} to {stage.layers[1] - 1}, {mesh}"


def _colour(stage: int) -> str:
    return COLOURS[stage % len(COLOURS)]
