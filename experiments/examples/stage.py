"""One stage from its kernels: what dispatch costs small layers, and what a backward hides of its gradients' sum.

Eight transformer layers of two sizes on one A100, run by a framework that dispatches each operation for 60 µs, and as
one compiled program; then the backward with its gradients summed over eight devices, in one bucket and in many.
"""

from meshwright.calibrate.hardware import parse_cluster
from meshwright.simulate.operations import Attention, Matmul, Operation, Pointwise
from meshwright.simulate.stage import Dispatch, run_stage, with_gradient_sync

HOST = parse_cluster("dgx-a100").hosts[0]
LAYERS = 8


def layer(hidden: int, tokens: int, scale: int = 1) -> list[Operation]:
    """The products of a layer, its attention and three passes over its activations; backward: twice the products."""

    def product(name: str, columns: int, inner: int) -> list[Operation]:
        return [Operation(name, Matmul(m=tokens, n=columns, k=inner, dtype="bf16"))] * scale

    sizes = {
        "batch": 1,
        "heads": hidden // 64,
        "kv_heads": hidden // 64,
        "queries": tokens,
        "keys": tokens,
        "head_dim": 64,
    }
    attention = Attention(**sizes, dtype="bf16", backward=scale == 2)
    touched = Pointwise(bytes=4.0 * tokens * hidden)
    return [
        Operation("norm", touched),
        *product("qkv", 3 * hidden, hidden),
        Operation("attention", attention),
        *product("projection", hidden, hidden),
        Operation("norm", touched),
        *product("up", 4 * hidden, hidden),
        Operation("gelu", touched),
        *product("down", hidden, 4 * hidden),
    ]


for hidden in (512, 4096):
    for name, dispatch in (("eager", Dispatch(operation_seconds=60e-6)), ("compiled", Dispatch(program_seconds=1e-4))):
        ran = run_stage(layer(hidden, tokens=1024), HOST.device, dispatch=dispatch, repeat=LAYERS)
        idle = ran.dispatch_bound_seconds / ran.seconds
        print(f"hidden {hidden:4}, {name:8}: {ran.seconds * 1e3:6.2f} ms, the device waits for its host {idle:4.0%}")

hidden = 4096
backward = layer(hidden, tokens=4096, scale=2) * LAYERS
alone = run_stage(backward, HOST.device)
made = dict.fromkeys(range(len(backward) // LAYERS - 1, len(backward), len(backward) // LAYERS), 2.0 * 12 * hidden**2)
for bucket_bytes in (1e12, 2e8):
    synced = with_gradient_sync(backward, made, ranks=8, axis="data", bucket_bytes=bucket_bytes)
    ran = run_stage(synced, HOST.device, {"data": HOST.link})
    buckets = len(synced) - len(backward)
    print(f"{buckets} buckets: backward {alone.seconds * 1e3:.1f} ms, with its sum {ran.seconds * 1e3:.1f} ms")
