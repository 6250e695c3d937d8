"""What the kernels of a planned stage spend on matmuls, on memory and on launches: the plan priced again.

A plan holds seconds of a phase, not what they are made of. So its stages are priced once more, as they are cut and
sharded, on devices of which one number is a little worse: how much longer they then take is the share of that number.
"""

from collections.abc import Callable, Mapping
from math import isclose

import msgspec

from meshwright.calibrate.device import Device
from meshwright.calibrate.drift import Group
from meshwright.calibrate.hardware import Cluster
from meshwright.errors import ScheduleError
from meshwright.plan.assemble import axes_text
from meshwright.plan.graph import ModelGraph
from meshwright.plan.planfile import Plan
from meshwright.plan.space import Memory
from meshwright.plan.stages import MeshKind, Setting, StageCost, StagePricer, logical_mesh

STEP = 1e-3  # by which a number is made worse
SAME = 1e-6  # relative: a plan that is not priced as it was is another plan
LEAST_SHARE = 1e-4
WORSE: Mapping[str, Callable[[Device], Device]] = {
    "matmul": lambda d: msgspec.structs.replace(d, matmul_efficiency=d.matmul_efficiency.scaled(1 / (1 + STEP))),
    "memory": lambda d: msgspec.structs.replace(
        d, memory_bytes_per_second=d.memory_bytes_per_second.scaled(1 / (1 + STEP))
    ),
    "launch": lambda d: msgspec.structs.replace(d, launch_seconds=d.launch_seconds.scaled(1 + STEP)),
}


def kernel_shares(plan: Plan, graph: ModelGraph) -> dict[Group, dict[str, float]] | None:
    """Shares of each stage's kernels by phase; None where the plan cannot be priced as it was (a file by hand).

    What is in no share is ``arithmetic`` of kernels that are no matmuls, which runs at the plain peak.
    """
    roles = [_roles(plan, graph, index) for index in range(len(plan.stages))]
    if any(role is None for role in roles):
        return None
    shares = {}
    for index, role in enumerate(roles):
        before = _kernels(plan, graph, plan.hardware, index, role or ())
        worse = {
            name: _kernels(plan, graph, _with_devices(plan.hardware, f), index, role or ()) for name, f in WORSE.items()
        }
        for what, seconds in before.items():
            found = {name: (after[what] / seconds - 1.0) / STEP if seconds else 0.0 for name, after in worse.items()}
            shares[Group(index, what)] = _normal({name: share for name, share in found.items() if share > LEAST_SHARE})
    return shares


def _normal(shares: dict[str, float]) -> dict[str, float]:
    """Shares that add up to 1, with a name for what is missing."""
    total = sum(shares.values())
    if total < 1.0 - LEAST_SHARE:
        return {**shares, "arithmetic": 1.0 - total}
    return {name: share / total for name, share in shares.items()}


def _with_devices(cluster: Cluster, change: Callable[[Device], Device]) -> Cluster:
    hosts = tuple(msgspec.structs.replace(host, device=change(host.device)) for host in cluster.hosts)
    return msgspec.structs.replace(cluster, hosts=hosts)


def _roles(plan: Plan, graph: ModelGraph, index: int) -> tuple[str, ...] | None:
    """What the axes of a stage's mesh were allowed to split, so that its price is the plan's; None if nothing is."""
    stage = plan.stages[index]
    for roles in ((), ("data", "tensor")) if len(stage.mesh) > 1 else ((),):
        cost = _cost(plan, graph, plan.hardware, index, roles)
        if cost is not None and all(
            isclose(priced, planned, rel_tol=SAME)
            for priced, planned in (
                (cost.forward_compute_seconds, stage.forward_compute_seconds),
                (cost.backward_compute_seconds, stage.backward_compute_seconds),
                (cost.once_compute_seconds, stage.update_seconds),
            )
        ):
            return roles
    return None


def _kernels(plan: Plan, graph: ModelGraph, cluster: Cluster, index: int, roles: tuple[str, ...]) -> dict[str, float]:
    """Seconds of the kernels of a stage by phase, without what programs cost beside them."""
    cost = _cost(plan, graph, cluster, index, roles)
    if cost is None:
        raise ScheduleError(f"stage {index} has no price on a changed device; please report this with the plan file")
    device = cluster.device(plan.stages[index].devices[0])
    return {
        "forward": cost.forward_compute_seconds - device.program_seconds("forward"),
        "backward": cost.backward_compute_seconds - device.program_seconds("backward"),
        "update": cost.once_compute_seconds - device.program_seconds("once"),
    }


def _cost(plan: Plan, graph: ModelGraph, cluster: Cluster, index: int, roles: tuple[str, ...]) -> StageCost | None:
    """The price of a stage between the boundaries that the plan gives it; None if these are not among its kind's."""
    stage = plan.stages[index]
    kind = MeshKind(logical_mesh(cluster, tuple(stage.mesh.values()), min(stage.devices)), roles)
    names = tuple(stage.mesh)
    layouts = [axes_text(layout, names) for layout in kind.layouts]
    if stage.boundaries[0] not in layouts or stage.boundaries[-1] not in layouts:
        return None
    slowdown = cluster.hosts[0].slowdown(cluster.hosts[0].devices)  # as the search weighs compute
    setting = Setting(graph, plan.microbatches, plan.recomputes(index), Memory(), slowdown)
    entry, leave = layouts.index(stage.boundaries[0]), layouts.index(stage.boundaries[-1])
    return StagePricer(setting, (kind,)).cost(*stage.layers, 0, entry, leave)
