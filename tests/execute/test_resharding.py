"""A transfer, carried out on numpy arrays, rebuilds the array exactly, and each target element arrives once."""

from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import PlanError
from meshwright.execute.resharding import (
    Box,
    Message,
    TensorLayout,
    Transfer,
    box_elements,
    layout_of,
    plan_transfer,
    plan_transfers,
)

Spec = tuple[tuple[str, ...], ...]


def region(box: Box, within: Box | None = None) -> tuple[slice, ...]:
    origins = [start for start, _ in within] if within is not None else [0] * len(box)
    return tuple(slice(start - o, stop - o) for (start, stop), o in zip(box, origins, strict=True))


def carry_out(transfer: Transfer, whole: np.ndarray) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """What each target device ends with, and how often each of its elements was written."""
    held = {device: whole[region(box)] for device, box in transfer.source.boxes}
    sizes = {device: [stop - start for start, stop in box] for device, box in transfer.target.boxes}
    received = {device: np.full(size, -1, whole.dtype) for device, size in sizes.items()}
    written = {device: np.zeros(size, int) for device, size in sizes.items()}
    for tile in transfer.tiles:
        to = region(tile.box, transfer.target.box_of(tile.target))
        received[tile.target][to] = held[tile.source][region(tile.box, transfer.source.box_of(tile.source))]
        written[tile.target][to] += 1
    return received, written


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...], first_device: int) -> TensorLayout:
    """A random mesh of 1 to 8 devices and a spec that divides ``shape``; devices may overlap with another mesh's."""
    sizes = draw(st.sampled_from([(1,), (2,), (3,), (4,), (8,), (2, 2), (1, 3), (3, 2), (2, 3), (2, 4), (2, 2, 2)]))
    axes = tuple((f"axis{i}", size) for i, size in enumerate(sizes))
    start = first_device + draw(st.integers(0, 3))
    devices = tuple(draw(st.permutations(range(start, start + prod(sizes)))))
    spec: list[tuple[str, ...]] = [() for _ in shape]
    left = list(shape)
    for name, size in draw(st.permutations(axes)):
        dims = [dim for dim in range(len(shape)) if left[dim] % size == 0]
        chosen = draw(st.sampled_from([None, *dims]))
        if chosen is not None:
            left[chosen] //= size
            spec[chosen] = (*spec[chosen], name)
    return layout_of(shape, "int32", tuple(spec), axes, devices)


@st.composite
def cases(draw: st.DrawFn) -> tuple[TensorLayout, TensorLayout, list[int]]:
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 6, 8, 12]), max_size=3)))
    source = draw(layouts(shape, 0))
    target = draw(layouts(shape, draw(st.integers(0, 8))))
    devices = max(source.devices + target.devices) + 1
    return source, target, [device // draw(st.integers(1, 4)) for device in range(devices)]


@settings(max_examples=300, deadline=None)
@given(cases())
def test_messages_rebuild_the_array_and_each_element_arrives_exactly_once(
    case: tuple[TensorLayout, TensorLayout, list[int]],
) -> None:
    source, target, ranks = case
    whole = np.arange(prod(source.shape), dtype=np.int32).reshape(source.shape)
    transfer = plan_transfer(source, target, ranks)
    received, written = carry_out(transfer, whole)
    for device, box in target.boxes:
        assert np.array_equal(received[device], whole[region(box)])
        assert np.all(written[device] == 1)
    assert transfer == plan_transfer(source, target, ranks)


@settings(max_examples=200, deadline=None)
@given(cases())
def test_a_device_is_never_sent_what_it_holds(case: tuple[TensorLayout, TensorLayout, list[int]]) -> None:
    source, target, ranks = case
    held = dict(source.boxes)
    transfer = plan_transfer(source, target, ranks)
    assert all(copy.source == copy.target for copy in transfer.copies)
    for message in transfer.messages:
        assert message.source != message.target
        own = held.get(message.target)
        apart = own is None or any(
            stop <= low or high <= start for (start, stop), (low, high) in zip(message.box, own, strict=True)
        )
        assert apart


@settings(max_examples=200, deadline=None)
@given(cases())
def test_bytes_between_ranks_count_each_message_once(case: tuple[TensorLayout, TensorLayout, list[int]]) -> None:
    transfer = plan_transfer(*case)
    wanted = sum(box_elements(box) for _, box in transfer.target.boxes)
    within = sum(
        box_elements(tile.box) for tile in transfer.tiles if transfer.ranks[tile.source] == transfer.ranks[tile.target]
    )
    assert sum(transfer.bytes_between_ranks.values()) == 4 * (wanted - within)
    assert 0 <= transfer.repeated_bytes <= 4 * wanted


def test_one_device_feeds_three_and_three_feed_two() -> None:
    one = layout_of((6,), "float32", (), (("d", 1),), (0,))
    three = layout_of((6,), "float32", (("d",),), (("d", 3),), (1, 2, 3))
    two = layout_of((6,), "float32", (("d",),), (("d", 2),), (4, 5))
    assert plan_transfer(one, three, range(4)).messages == (
        Message(0, 1, ((0, 2),)),
        Message(0, 2, ((2, 4),)),
        Message(0, 3, ((4, 6),)),
    )
    assert plan_transfer(three, two, range(6)).messages == (
        Message(1, 4, ((0, 2),)),
        Message(2, 4, ((2, 3),)),
        Message(2, 5, ((3, 4),)),
        Message(3, 5, ((4, 6),)),
    )


def test_replicas_share_the_load_over_a_step() -> None:
    """Two replicas and four transfers to one device: each replica sends two."""
    pair = (
        layout_of((4,), "float32", (), (("d", 2),), (0, 1)),
        layout_of((4,), "float32", (), (("d", 1),), (2,)),
    )
    transfers = plan_transfers([pair] * 4, ranks=(0, 1, 2))
    assert [transfer.messages[0].source for transfer in transfers] == [0, 1, 0, 1]


def test_a_device_of_the_same_rank_is_asked_first() -> None:
    source = layout_of((4,), "float32", (), (("d", 2),), (0, 1))
    target = layout_of((4,), "float32", (), (("d", 1),), (2,))
    transfer = plan_transfer(source, target, ranks=(0, 1, 1), sent_bytes={1: 1 << 30})
    assert transfer.messages == (Message(1, 2, ((0, 4),)),)
    assert transfer.bytes_between_ranks == {}


HOST, DEV, BOTH = ("host",), ("dev",), ("host", "dev")


@pytest.mark.parametrize(
    ("source_hosts", "source_spec", "target_hosts", "target_spec", "total", "busiest", "needed"),
    [
        (2, (HOST,), 2, (HOST,), 4, 2, 1),
        (2, (), 2, (HOST,), 4, 2, 1),
        (2, ((), HOST), 2, (HOST,), 4, 2, 1),
        (2, ((), BOTH), 2, (BOTH,), 1, 0.5, 1),
        (2, (DEV,), 2, (HOST,), 4, 2, 1),
        (2, (HOST,), 3, (HOST,), 4, 2, 1),
        (1, (DEV,), 2, (), 8, 8, 2),
        (2, ((), HOST), 2, ((), (), HOST), 4, 2, 1),
    ],
)
def test_the_bytes_are_those_of_alpas_resharding_suite(
    source_hosts: int,
    source_spec: Spec,
    target_hosts: int,
    target_spec: Spec,
    total: float,
    busiest: float,
    needed: int,
) -> None:
    """Cases 1-7 and 9 of Alpa's n-to-m suite, four devices a host, in multiples of the tensor.

    ``total`` crosses the network, ``busiest`` leaves the busiest host, ``needed`` would cross if each host were sent
    each box once (the bytes of Zhuang et al., MLSys 2023, "On optimizing the communication of model parallelism").
    """
    shape = (24, 8, 4)
    hosts = source_hosts + target_hosts
    source_devices = tuple(range(4 * source_hosts))
    target_devices = tuple(range(4 * source_hosts, 4 * hosts))
    source = layout_of(shape, "int32", source_spec, (("host", source_hosts), ("dev", 4)), source_devices)
    target = layout_of(shape, "int32", target_spec, (("host", target_hosts), ("dev", 4)), target_devices)
    transfer = plan_transfer(source, target, ranks=[device // 4 for device in range(4 * hosts)])
    whole = 4 * prod(shape)
    crossing = transfer.bytes_between_ranks
    assert sum(crossing.values()) == total * whole
    leaving = [sum(b for (sender, _), b in crossing.items() if sender == host) for host in range(source_hosts)]
    assert max(leaving) == busiest * whole
    assert sum(crossing.values()) - transfer.repeated_bytes == needed * whole


def test_a_bfloat16_takes_two_bytes() -> None:
    source = layout_of((8,), "bfloat16", (), (("d", 1),), (0,))
    target = layout_of((8,), "bfloat16", (("d",),), (("d", 2),), (1, 2))
    assert plan_transfer(source, target, range(3)).bytes_between_ranks == {(0, 1): 8, (0, 2): 8}


def test_a_spec_that_does_not_divide_says_what_would() -> None:
    with pytest.raises(PlanError, match="multiple of 3"):
        layout_of((8,), "float32", (("d",),), (("d", 3),), (0, 1, 2))


def test_an_unknown_axis_is_named() -> None:
    with pytest.raises(PlanError, match=r"\['tensor'\]"):
        layout_of((8,), "float32", (("tensor",),), (("data", 2),), (0, 1))


@pytest.mark.parametrize(
    "boxes",
    [
        ((0, ((0, 2),)), (1, ((1, 4),))),
        ((0, ((0, 2),)), (1, ((3, 4),))),
        ((0, ((0, 4),)), (0, ((0, 4),))),
        ((0, ((0, 5),)),),
    ],
    ids=["overlap", "hole", "device twice", "outside"],
)
def test_boxes_that_do_not_tile_the_array_are_refused(boxes: tuple[tuple[int, Box], ...]) -> None:
    with pytest.raises(PlanError):
        TensorLayout((4,), "float32", boxes)


def test_a_transfer_keeps_shape_and_dtype() -> None:
    source = layout_of((4,), "float32", (), (("d", 1),), (0,))
    target = layout_of((4,), "int32", (), (("d", 1),), (1,))
    with pytest.raises(PlanError, match=r"float32\[4\].*int32\[4\]"):
        plan_transfer(source, target, range(2))
