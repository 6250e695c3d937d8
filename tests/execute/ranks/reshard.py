"""Run by every rank: an array goes between a mesh of one rank and one of three, and is summed on each of them."""

from math import prod

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshwright.execute.exchange import post_array, receive_array, send_array
from meshwright.execute.process_group import ProcessGroup, guard
from meshwright.execute.resharding import layout_of, plan_transfers
from meshwright.execute.transport.base import TagSpace
from meshwright.execute.transport.mpi import MpiTransport

SHAPE = (96, 6, 1024)  # each third is 0.75 MiB: beyond MPI's eager limit


def main() -> None:
    group = ProcessGroup.start()
    group.allgather_equal(str(SHAPE), "the shape")
    devices, mine = group.global_devices(), group.local_devices()
    assert [device.process_index for device in devices] == list(group.device_ranks) == [0, 1, 2, 3]
    one = NamedSharding(Mesh(np.array(devices[:1]), ["d"]), PartitionSpec())
    three = NamedSharding(Mesh(np.array(devices[1:]), ["d"]), PartitionSpec("d"))
    on_one = layout_of(SHAPE, "float32", (), (("d", 1),), (0,))
    on_three = layout_of(SHAPE, "float32", (("d",),), (("d", 3),), (1, 2, 3))
    there, back = plan_transfers([(on_one, on_three), (on_three, on_one)], group.device_ranks)
    transport = MpiTransport()
    tags = TagSpace(transfers=2, tiles=3, upper_bound=transport.tag_upper_bound)
    double_and_sum = jax.jit(lambda x: (2 * x, x.sum()))

    for microbatch in range(2):
        whole = np.arange(prod(SHAPE), dtype=np.float32).reshape(SHAPE) % 1021 + microbatch
        if group.rank == 0:
            returning = post_array(transport, back, tags.first_tag(1, microbatch), mine)
            send_array(transport, there, jax.device_put(whole, one), tags.first_tag(0, microbatch), mine)
            result = receive_array(transport, returning, one, mine)
            assert np.array_equal(np.asarray(result), 2 * whole)
        else:
            coming = post_array(transport, there, tags.first_tag(0, microbatch), mine)
            array = receive_array(transport, coming, three, mine)
            third = slice(32 * (group.rank - 1), 32 * group.rank)
            assert np.array_equal(np.asarray(array.addressable_shards[0].data), whole[third])
            doubled, total = double_and_sum(array)  # the sum is a gloo all-reduce over ranks 1, 2, 3
            np.testing.assert_allclose(np.asarray(total.addressable_shards[0].data), whole.sum(), rtol=1e-6)
            send_array(transport, back, doubled, tags.first_tag(1, microbatch), mine)
    transport.finish()
    print(f"rank {group.rank}: exact", flush=True)


with guard():
    main()
