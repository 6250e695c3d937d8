"""The process that measures: ``python -m meshwright.calibrate.worker compute|network DEADLINE``.

DEADLINE is in seconds since 1970. It speaks JSON lines on stdout: ``{"done": 0.4, "next": "matmul f32 1×64×64×64"}``
as it goes on, ``{"keep": ...}`` for each timing of the device, ``{"result": ...}`` last. On stdin it reads the timings
that an interrupted run kept, as one JSON array, or nothing. A process of its own, because XLA reads its
flags once, when JAX starts.
"""

import os
import sys
import time
from collections.abc import Callable
from typing import TextIO

import msgspec

from meshwright.calibrate.timing import Measured


def main(arguments: list[str]) -> int:
    """Measure one part and print its result; for ``network`` only rank 0 speaks."""
    part, deadline = arguments[0], float(arguments[1])
    lines = _own_stdout()

    def say(data: object) -> None:
        print(msgspec.json.encode(data).decode(), file=lines, flush=True)

    def progress(done: float, text: str) -> None:
        say({"done": done, "next": text})

    if part == "compute":
        _compute(deadline, progress, say)
    else:
        _network(deadline, progress, lambda result: say({"result": result}))
    return 0


def _own_stdout() -> TextIO:
    """Keep stdout for our lines: gloo prints there from C++, which now goes to stderr."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return lines


def _compute(deadline: float, progress: Callable[[float, str], None], say: Callable[[object], None]) -> None:
    from meshwright.calibrate.compute import measure_compute

    known = msgspec.json.decode(sys.stdin.buffer.read() or b"[]", type=tuple[Measured, ...])
    budget_seconds = max(1.0, deadline - time.time())
    say({"result": measure_compute(budget_seconds, progress, known, lambda measured: say({"keep": measured}))})


def _network(deadline: float, progress: Callable[[float, str], None], finish: Callable[[object], None]) -> None:
    import jax
    from mpi4py import MPI

    from meshwright.calibrate.network import measure_network, start_jax

    comm = MPI.COMM_WORLD
    start_jax(comm)
    quiet = comm.rank != 0
    result = measure_network(comm, max(1.0, deadline - time.time()), (lambda done, text: None) if quiet else progress)
    if not quiet:
        finish(result)
    jax.distributed.shutdown()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
