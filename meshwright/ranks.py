"""How a rank computes on a CPU: on one thread, whether it is measured or trains, so that both agree."""

from collections.abc import Mapping

# NPROC is what XLA's CPU client sizes its thread pool by; its own flag alone leaves matmuls on all cores (JAX 0.10.2).
_THREADS = {"NPROC": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_XLA_FLAG = "--xla_cpu_multi_thread_eigen=false"


def single_threaded(base: Mapping[str, str]) -> dict[str, str]:
    """``base`` with the settings that keep XLA, OpenMP and BLAS to one thread; what the user has set stays."""
    flags = base.get("XLA_FLAGS", "")
    if _XLA_FLAG.partition("=")[0] not in flags:
        flags = f"{flags} {_XLA_FLAG}".strip()
    return {**_THREADS, **base, "XLA_FLAGS": flags}
