"""Run by every rank: they fail in the way that the first argument names; of "differ" all notice."""

import os
import signal
import sys
import time

from mpi4py import MPI

from meshwright.errors import ExecutionError
from meshwright.execute.process_group import ProcessGroup, guard

with guard():
    rank = MPI.COMM_WORLD.Get_rank()
    match sys.argv[1]:
        case "one" if rank == 2:
            raise ExecutionError("the wheel came off")
        case "bug" if rank == 1:
            raise KeyError("the wheel came off")
        case "killed" if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        case "differ":
            ProcessGroup.start(distributed=False).allgather_equal("odd" if rank == 1 else "even", "the plan")
        case "hang":
            print(f"pid {os.getpid()}", flush=True)
            time.sleep(60)
    MPI.COMM_WORLD.Barrier()
