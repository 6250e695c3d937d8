"""A step of GPT-175B from its sizes alone, on 512 A100: which schedule, and what ZeRO would save.

No JAX, no trace, no search: a grid is given and its step predicted.
"""

from meshwright.calibrate.hardware import parse_cluster
from meshwright.errors import MeshwrightError
from meshwright.simulate.workload.grid import Grid
from meshwright.simulate.workload.predict import predict_grid
from meshwright.simulate.workload.stack import find_stack
from meshwright.simulate.workload.transformer import Transformer

model = Transformer(layers=96, hidden=12288, heads=96, vocabulary=51200, sequence=2048)
cluster = parse_cluster("dgx-a100:64")
print(f"{model.parameters / 1e9:.1f} billion parameters on {cluster.devices} devices")

for schedule, chunks in (("1f1b", 1), ("interleaved", 3), ("zb-h1", 1)):
    for zero in (0, 1):
        grid = Grid(
            batch=768,
            tensor=8,
            pipeline=8,
            data=8,
            chunks=chunks,
            schedule=schedule,
            zero=zero,
            sequence_parallel=True,
            recompute="selective",
        )
        step = predict_grid(model, cluster, grid, find_stack("megatron-core"))
        held = max(step.timeline.peak_bytes) / 1e9
        print(
            f"{schedule:12} ZeRO {zero}: {step.iteration_seconds:5.1f} s, bubble {step.timeline.bubble_fraction:5.1%}, "
            f"MFU {step.mfu:.0%}, {held:.0f} GB on the fullest device"
        )

try:
    predict_grid(model, cluster, Grid(batch=768, tensor=8, pipeline=10, data=6), find_stack("megatron-core"))
except MeshwrightError as error:
    print(f"refused: {error}")
