"""How a rank computes on a CPU, measured or training, so that both agree: on one thread, keeping its memory.

XLA's CPU client allocates each program's results anew. Left alone, glibc gives large arrays back to the system and asks
for them again, which then zeroes page after page: 10 ms for the 20 MB that the forward pass of a 24 ms stage keeps
(measured: Linux 6.18 in a virtual machine, JAX 0.10.2). With these settings freed memory is used again.
"""

from collections.abc import Mapping

# NPROC is what XLA's CPU client sizes its thread pool by; its own flag alone leaves matmuls on all cores (JAX 0.10.2).
_THREADS = {"NPROC": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_MEMORY = {
    "MALLOC_ARENA_MAX": "1",  # one heap for all threads; those of other arenas are at most 64 MiB
    "MALLOC_MMAP_MAX_": "0",  # large arrays come from the heap too
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),  # whose end is never given back
    "MALLOC_TOP_PAD_": str(64 << 20),
}
_XLA_FLAG = "--xla_cpu_multi_thread_eigen=false"


def single_threaded(base: Mapping[str, str]) -> dict[str, str]:
    """``base`` with the settings that keep XLA, OpenMP and BLAS to one thread, and freed memory in the process.

    What the user has set stays.
    """
    flags = base.get("XLA_FLAGS", "")
    if _XLA_FLAG.partition("=")[0] not in flags:
        flags = f"{flags} {_XLA_FLAG}".strip()
    return {**_THREADS, **_MEMORY, **base, "XLA_FLAGS": flags}
