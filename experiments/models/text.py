"""Text for a byte-level language model that every machine has: the source of Python's own standard library.

A batch is a pure function of the text, the seed and the step, so any rank can make any batch, and a run resumes at
step n by asking for step n.
"""

import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import ModelError

VOCAB = 256  # every byte is a token
DEFAULT_LIMIT_BYTES = 4_000_000


@cache
def stdlib_text(limit_bytes: int = DEFAULT_LIMIT_BYTES) -> NDArray[np.uint8]:
    """The first ``limit_bytes`` of the standard library's modules, in the order of their names; a read-only array.

    The text depends on the Python version alone. Packages (sub-folders) are left out: other software installs there.

    Errors:
        ModelError: this Python has no source files, or ``limit_bytes`` is not positive.
    """
    if limit_bytes < 1:
        raise ModelError(f"a text of {limit_bytes} bytes is no text; ask for at least 1")
    folder = Path(sysconfig.get_paths()["stdlib"])
    parts: list[bytes] = []
    missing = limit_bytes
    for path in sorted(folder.glob("*.py"), key=lambda path: path.name):
        if missing <= 0:
            break
        parts.append(path.read_bytes()[:missing])
        missing -= len(parts[-1])
    if not parts:
        raise ModelError(f"this Python keeps no source files in {folder}; give a text file of your own")
    return np.frombuffer(b"".join(parts), np.uint8)


def read_text(path: Path | str) -> NDArray[np.uint8]:
    """A file's bytes as tokens, memory-mapped: only what a batch touches is read."""
    if not Path(path).is_file() or Path(path).stat().st_size == 0:
        raise ModelError(f"{path} is not a file with text in it; give the path of a non-empty file")
    return np.memmap(path, np.uint8, mode="r")


def batch_at(
    step: int, *, seq: int, batch: int, seed: int, text: NDArray[np.uint8] | None = None
) -> dict[str, NDArray[np.int32]]:
    """Batch number ``step``: ``batch`` windows of the text at random places; ``targets`` are ``tokens`` one byte on.

    ``text`` is any array of bytes, the standard library's source if not given.

    Errors:
        ModelError: the text is shorter than one window, which is ``seq + 1`` bytes.
    """
    text = stdlib_text() if text is None else text
    if len(text) <= seq:
        raise ModelError(f"a text of {len(text)} bytes has no window of seq={seq} + 1; use seq={len(text) - 1} or less")
    starts = np.random.default_rng((seed, step)).integers(0, len(text) - seq, size=batch)
    windows = text[starts[:, None] + np.arange(seq + 1)].astype(np.int32)
    return {"tokens": windows[:, :-1], "targets": windows[:, 1:]}


def byte_batches(
    seq: int, batch: int, seed: int, *, first_step: int = 0, text: NDArray[np.uint8] | None = None
) -> Iterator[dict[str, NDArray[np.int32]]]:
    """All batches from ``first_step`` on, without end."""
    step = first_step
    while True:
        yield batch_at(step, seq=seq, batch=batch, seed=seed, text=text)
        step += 1
