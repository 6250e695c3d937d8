"""What an interrupted calibration leaves: timings so far, one JSON line each, for the next run to go on from.

The first line says what they were measured with. A later run reuses them within a day, on the same machine, with the
same JAX and the same settings; else they are noticed and dropped. A line is appended in one write, so that an
interruption leaves at most a last line without its end, which is left out.
"""

import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from meshwright.calibrate.timing import ComputeTimings, Measured

FORMAT, VERSION = "meshwright-calibration-partial", 1
LONGEST_AGE_SECONDS = 86400.0
SETTINGS = ("XLA_FLAGS", "NPROC", "OMP_NUM_THREADS", "JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "JAX_ENABLE_X64")


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A later line: one timing of the device, or all of them once it is done."""

    measured: Measured | None = None
    compute: ComputeTimings | None = None


class Partial:
    """The file beside ``out``; open it, add what is measured, and remove it when the machine file is written.

    ``notice`` is a line for the user where a file was there: that it is reused, or why not.
    """

    def __init__(self, out: Path, environment: Mapping[str, str], fresh: bool = False) -> None:
        self.path = out.with_name(f"{out.name}.partial")
        self.measured: list[Measured] = []
        self.compute: ComputeTimings | None = None
        self.notice = ""
        key = settings_key(environment)
        if not self.path.exists():
            self._begin(key)
            return
        why = "--fresh was given" if fresh else self._read(key)
        if why:
            self.measured, self.compute = [], None
            self.notice = f"{self.path}: not reused ({why}); starting anew"
            self._begin(key)
        elif self.measured or self.compute:
            done = "all of the device" if self.compute else f"{len(self.measured)} timings"
            self.notice = f"{self.path}: going on from {done}; --fresh would start anew"

    def add(self, measured: Measured) -> None:
        """Keep one timing."""
        self.measured.append(measured)
        self._append(msgspec.json.encode(_Line(measured=measured)))

    def finish(self, compute: ComputeTimings) -> None:
        """Keep that the device is done."""
        self.compute = compute
        self._append(msgspec.json.encode(_Line(compute=compute)))

    def remove(self) -> None:
        """The machine file is there: nothing is left to go on from."""
        self.path.unlink(missing_ok=True)

    def _begin(self, key: str) -> None:
        head = {"format": FORMAT, "version": VERSION, "key": key, "started": time.time()}
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(head) + "\n", "utf-8")
        os.replace(temporary, self.path)

    def _read(self, key: str) -> str:
        """Take in the file; in a few words, why it cannot be used, or nothing."""
        try:
            head_text, *lines = self.path.read_bytes().split(b"\n")
            head: dict[str, Any] = json.loads(head_text)
            if (head["format"], head["version"]) != (FORMAT, VERSION):
                return "it is no partial calibration of this version"
            if head["key"] != key:
                return "another machine, JAX or settings"
            if not 0 <= time.time() - head["started"] < LONGEST_AGE_SECONDS:
                return "older than a day"
            for text in lines[:-1]:  # what stands after the last end of a line was torn off
                line = msgspec.json.decode(text, type=_Line)
                if line.measured is not None:
                    self.measured.append(line.measured)
                self.compute = line.compute or self.compute
        except (OSError, ValueError, KeyError, TypeError, msgspec.MsgspecError):
            return "it is damaged"
        if lines and lines[-1]:
            os.truncate(self.path, self.path.stat().st_size - len(lines[-1]))
        return ""

    def _append(self, line: bytes) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line + b"\n")
        finally:
            os.close(descriptor)


def settings_key(environment: Mapping[str, str]) -> str:
    """A digest of what timings depend on: the machine, JAX, and the settings of the processes that measure."""
    told = [platform.node(), platform.machine(), version("jax"), version("jaxlib"), str(os.cpu_count())]
    told += [str(sorted(os.sched_getaffinity(0)))]
    told += [f"{name}={environment.get(name, '')}" for name in SETTINGS]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]
