"""Tags fit, buffers are aligned, messages in one process keep their order and refuse what does not match."""

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mpi4py import MPI

from meshwright.errors import ExecutionError, PlanError
from meshwright.execute.transport.base import ALIGNMENT_BYTES, TagSpace, Transport, aligned_empty
from meshwright.execute.transport.local import LocalTransport
from meshwright.execute.transport.mpi import MpiTransport

FLOAT = np.dtype(np.float32)


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 12))
def test_tags_differ_within_a_window_and_fit(transfers: int, tiles: int, spare: int) -> None:
    space = TagSpace(transfers, tiles, upper_bound=2 * transfers * tiles + spare)
    tags = [
        space.first_tag(transfer, microbatch) + tile
        for microbatch in range(-1, space.window - 1)
        for transfer in range(transfers)
        for tile in range(tiles)
    ]
    assert len(set(tags)) == len(tags)
    assert min(tags) == 0
    assert max(tags) <= space.upper_bound
    assert space.first_tag(0, space.window - 1) == space.first_tag(0, -1)


def test_too_few_tags_say_how_many_are_needed() -> None:
    with pytest.raises(PlanError, match=r"need 40000 tags; this MPI has 32768"):
        TagSpace(transfers=400, tiles=100, upper_bound=32767)


@pytest.mark.parametrize("dtype", [np.float32, np.int8, ml_dtypes.bfloat16])
def test_an_aligned_buffer_is_adopted_by_jax_without_a_copy(dtype: type) -> None:
    buffer = aligned_empty((3, 1000), np.dtype(dtype))
    buffer[...] = 1
    assert buffer.ctypes.data % ALIGNMENT_BYTES == 0
    array = jax.device_put(buffer, jax.devices("cpu")[0])
    assert array.unsafe_buffer_pointer() == buffer.ctypes.data


@pytest.mark.parametrize("make", [LocalTransport, MpiTransport])
def test_messages_to_oneself_keep_their_order_and_are_not_copied(make: type) -> None:
    """One rank alone: MPI's transport hands its own messages to the local one."""
    transport: Transport = make()
    first, second = np.arange(6, dtype=FLOAT).reshape(2, 3), np.ones((2, 3), FLOAT)
    early = transport.post_receive(7, (2, 3), FLOAT, source_rank=0)
    transport.send(7, first, target_rank=0)
    transport.send(7, second, target_rank=0)
    late = transport.post_receive(7, (2, 3), FLOAT, source_rank=0)
    assert np.shares_memory(transport.wait(early), first)
    assert np.shares_memory(transport.wait(late), second)
    transport.poll()
    transport.finish()


def test_waiting_for_what_was_not_sent_is_a_deadlock() -> None:
    transport = LocalTransport()
    with pytest.raises(ExecutionError, match="deadlock"):
        transport.wait(transport.post_receive(3, (1,), FLOAT, source_rank=0))


def test_a_message_of_another_shape_is_refused() -> None:
    transport = LocalTransport()
    transport.send(3, np.ones((2, 2), FLOAT), target_rank=0)
    with pytest.raises(ExecutionError, match=r"float32\[2, 2\].*float32\[4\]"):
        transport.wait(transport.post_receive(3, (4,), FLOAT, source_rank=0))


def test_what_nobody_received_is_reported_at_the_end() -> None:
    transport = LocalTransport()
    transport.send(5, np.ones(1, FLOAT), target_rank=0)
    with pytest.raises(ExecutionError, match=r"tags are \[5\]"):
        transport.finish()


def test_the_tag_bound_is_that_of_mpi() -> None:
    bound = MPI.COMM_WORLD.Get_attr(MPI.TAG_UB)
    assert MpiTransport().tag_upper_bound == bound
    assert bound is not None
    assert bound >= 32767
