"""Arrays go from mesh to mesh exactly, whatever their shardings; eight fake devices stand for eight ranks."""

from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshwright.errors import ExecutionError
from meshwright.execute.exchange import post_array, receive_array, send_array
from meshwright.execute.resharding import TensorLayout, layout_of, plan_transfer
from meshwright.execute.transport.local import LocalTransport

Axes = tuple[tuple[str, int], ...]
Spec = tuple[tuple[str, ...], ...]


def sharding_and_layout(
    shape: tuple[int, ...], dtype: str, spec: Spec, axes: Axes, first: int
) -> tuple[NamedSharding, TensorLayout]:
    """The same placement as JAX says it and as we say it, on the devices from ``first`` on."""
    sizes = [size for _, size in axes]
    devices = tuple(range(first, first + prod(sizes)))
    mesh = Mesh(np.array([jax.devices()[d] for d in devices]).reshape(sizes), [name for name, _ in axes])
    return NamedSharding(mesh, PartitionSpec(*spec)), layout_of(shape, dtype, spec, axes, devices)


CASES = {
    "1 to 3": ((), (("d", 1),), (("d",),), (("d", 3),)),
    "3 to 1": (((), ("d",)), (("d", 3),), (), (("d", 1),)),
    "2 to 4, other dim": ((("d",),), (("d", 2),), ((), ("d",)), (("d", 4),)),
    "4 to 2, replicas": ((("x",),), (("x", 2), ("y", 2)), (), (("d", 2),)),
    "2 x 2 transposed": ((("x",), ("y",)), (("x", 2), ("y", 2)), (("y",), ("x",)), (("x", 2), ("y", 2))),
    "2 x 2, both axes on a dim": ((("x", "y"),), (("x", 2), ("y", 2)), ((), ("y", "x")), (("x", 2), ("y", 2))),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_array_arrives_as_it_left(name: str, dtype: str) -> None:
    source_spec, source_axes, target_spec, target_axes = CASES[name]
    shape = (12, 24)
    from_sharding, source = sharding_and_layout(shape, dtype, source_spec, source_axes, 0)
    to_sharding, target = sharding_and_layout(shape, dtype, target_spec, target_axes, 4)
    whole = jnp.arange(prod(shape)).reshape(shape).astype(dtype)
    devices = dict(enumerate(jax.devices()))
    transfer = plan_transfer(source, target, ranks=range(8))
    transport = LocalTransport()
    incoming = post_array(transport, transfer, 0, devices)
    send_array(transport, transfer, jax.device_put(whole, from_sharding), 0, devices)
    received = receive_array(transport, incoming, to_sharding, devices)
    transport.finish()
    assert received.sharding == to_sharding
    assert received.dtype == whole.dtype
    assert np.array_equal(np.asarray(received), np.asarray(whole))


@pytest.mark.parametrize(
    ("spec", "axes"),
    [
        ((("x",), ("y",)), (("x", 4), ("y", 2))),
        ((("y", "x"), ()), (("x", 4), ("y", 2))),
        ((("x", "y"),), (("x", 4), ("y", 2))),
        (((), ("z", "x")), (("x", 2), ("y", 2), ("z", 2))),
    ],
)
def test_a_layout_is_that_of_named_sharding(spec: Spec, axes: Axes) -> None:
    sharding, layout = sharding_and_layout((8, 16), "float32", spec, axes, 0)
    jax_boxes = {
        device: tuple(s.indices(size)[:2] for s, size in zip(index, (8, 16), strict=True))
        for device, index in sharding.devices_indices_map((8, 16)).items()
    }
    assert jax_boxes == {jax.devices()[device]: box for device, box in layout.boxes}


def test_an_array_may_be_donated_while_it_is_sent() -> None:
    """XLA sees the message's view of the buffer and leaves the buffer alone."""
    sharding, source = sharding_and_layout((4096,), "float32", (), (("d", 1),), 0)
    to_sharding, target = sharding_and_layout((4096,), "float32", (("d",),), (("d", 2),), 1)
    devices = dict(enumerate(jax.devices()))
    transfer, transport = plan_transfer(source, target, ranks=range(8)), LocalTransport()
    array = jax.device_put(jnp.arange(4096, dtype=jnp.float32), sharding)
    send_array(transport, transfer, array, 0, devices)
    jax.jit(lambda x: x * 0 - 1, donate_argnums=0)(array).block_until_ready()
    received = receive_array(transport, post_array(transport, transfer, 0, devices), to_sharding, devices)
    received = jax.jit(lambda x: x + 0, donate_argnums=0)(received)
    assert np.array_equal(np.asarray(received), np.arange(4096, dtype=np.float32))


def test_an_array_that_does_not_lie_as_planned_is_refused() -> None:
    _, source = sharding_and_layout((8,), "float32", (("d",),), (("d", 2),), 0)
    _, target = sharding_and_layout((8,), "float32", (), (("d", 1),), 2)
    transfer = plan_transfer(source, target, ranks=range(8))
    array = jax.device_put(jnp.zeros(8), jax.devices()[0])
    with pytest.raises(ExecutionError, match=r"device 0 should hold float32\[4\]"):
        send_array(LocalTransport(), transfer, array, 0, dict(enumerate(jax.devices())))


def test_a_process_outside_the_target_receives_nothing() -> None:
    _, source = sharding_and_layout((8,), "float32", (), (("d", 1),), 0)
    to_sharding, target = sharding_and_layout((8,), "float32", (), (("d", 1),), 2)
    mine = {1: jax.devices()[1]}
    incoming = post_array(LocalTransport(), plan_transfer(source, target, range(8)), 0, mine)
    assert incoming.receipts == ()
    with pytest.raises(ExecutionError, match=r"\(2,\) are not among this process's \[1\]"):
        receive_array(LocalTransport(), incoming, to_sharding, mine)
