"""Unequal stages with memory, transfers that take time, and where a step's time goes.

Three stages of a model on three groups of four devices: the first holds a large embedding, the last a large output
projection. Sending an activation keeps a link busy for 30 ms; gradients are summed at the end.
"""

from meshwright.simulate.build import build_program
from meshwright.simulate.pipeline import PipelineCosts, StageCosts, TransferCost, simulate

GB = 1e9
FORWARD_SECONDS = (0.10, 0.12, 0.16)
STATIC_BYTES = (30 * GB, 22 * GB, 28 * GB)

stages = tuple(
    StageCosts(
        devices=tuple(range(4 * s, 4 * s + 4)),
        forward_seconds=seconds,
        backward_seconds=2 * seconds,
        reduce_seconds=0.08,
        update_seconds=0.02,
        static_bytes=static,
        static_parts=(("parameters", static / 8), ("gradients", static / 8), ("optimizer", 6 * static / 8)),
        saved_bytes=4 * GB,
        transient_bytes=1 * GB,
    )
    for s, (seconds, static) in enumerate(zip(FORWARD_SECONDS, STATIC_BYTES, strict=True))
)
hop = TransferCost(wire_seconds=0.03, latency_seconds=0.0001, buffer_bytes=0.1 * GB)
costs = PipelineCosts(
    stages,
    {
        (0, 1, "activation"): hop,
        (1, 2, "activation"): hop,
        (1, 0, "cotangent"): hop,
        (2, 1, "cotangent"): hop,
    },
)

for schedule in ("gpipe", "1f1b"):
    timeline = simulate(build_program(schedule, meshes=3, microbatches=8), costs)
    print(f"{schedule}: {timeline.makespan_seconds:.4f} s, bubble {timeline.bubble_fraction:.1%}")
    causes = timeline.critical_seconds
    print("  critical path: " + ", ".join(f"{cause} {seconds:.4f} s" for cause, seconds in causes.items()))
    for mesh, (peak, parts) in enumerate(zip(timeline.peak_bytes, timeline.peak_parts, strict=True)):
        print(f"  mesh {mesh}: {peak / GB:.1f} GB = " + " + ".join(f"{name} {held / GB:.1f}" for name, held in parts))
