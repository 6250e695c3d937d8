"""Messages within one process: what a rank sends to itself, and all ranks at once when devices are fake."""

from collections import defaultdict, deque
from typing import Any

import numpy as np

from meshwright.errors import ExecutionError
from meshwright.execute.transport.base import Array, Receipt


class LocalTransport:
    """One queue per tag; nothing is copied, so the receiver gets the sender's own array."""

    tag_upper_bound = 2**31 - 1

    def __init__(self) -> None:
        self._arrived: dict[int, deque[Array]] = defaultdict(deque)

    def send(self, tag: int, array: Array, target_rank: int) -> None:
        del target_rank  # one process is all ranks
        self._arrived[tag].append(array)

    def post_receive(self, tag: int, shape: tuple[int, ...], dtype: np.dtype[Any], source_rank: int) -> Receipt:
        return Receipt(tag, shape, dtype, source_rank)

    def wait(self, receipt: Receipt) -> Array:
        queue = self._arrived.get(receipt.tag)
        if not queue:
            raise ExecutionError(
                f"a receive with tag {receipt.tag} waits for a message that its own process has not sent; "
                f"the program's order deadlocks"
            )
        array = queue.popleft()
        if not queue:
            del self._arrived[receipt.tag]
        if array.shape != receipt.shape or array.dtype != receipt.dtype:
            raise ExecutionError(
                f"the message with tag {receipt.tag} is {array.dtype}{list(array.shape)}, "
                f"its receiver waits for {receipt.dtype}{list(receipt.shape)}"
            )
        return array

    def poll(self) -> None:
        """Nothing is ever under way."""

    def finish(self) -> None:
        if self._arrived:
            raise ExecutionError(f"messages were sent and never received; their tags are {sorted(self._arrived)}")
