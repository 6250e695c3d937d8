"""Layers solved by earlier searches, kept on disk by content: what a search that was done before need not do again.

A file holds what the stage DP reads of one layer on all kinds of mesh at one set of weights. Its name is a hash of
everything these figures follow from: the layer's graph, the meshes with their devices and links, the memory model, the
weights and the source code of the package. So nothing is ever out of date, only unused: the least recently used files
go when the folder grows too large. Strategies are not kept; those of the few layers that a plan uses are found again.
"""

import io
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cache
from hashlib import sha256
from pathlib import Path

import numpy as np

import meshwright
from meshwright.errors import PlanError
from meshwright.plan.intra import LayerTable
from meshwright.plan.sharding import boundary_spec, shards
from meshwright.plan.space import FloatArray

CACHE_VARIABLE = "MESHWRIGHT_CACHE"  # of the environment: a folder, or "off"
MOST_BYTES = 256 * 2**20

_MAGIC = b"meshwright layers 1\n"
_SUFFIX = ".layers"
_PACKAGES = ("calibrate", "simulate", "plan")
_log = logging.getLogger("meshwright")


@dataclass(frozen=True, slots=True, eq=False)
class LayerFigures:
    """What a chain of layers needs to know of one: (A, A) by entry and exit layout; ``costs`` (components, A, A).

    entry_bytes: (A,) of the layer's entries on one device.
    """

    objective: FloatArray
    costs: FloatArray
    transient_bytes: FloatArray
    entry_bytes: FloatArray

    @staticmethod
    def of(table: LayerTable) -> "LayerFigures":
        """The figures of a solved layer."""
        space = table.space
        tensors = [space.graph.tensors[v] for v in space.graph.entries]
        entry_bytes = [
            sum(t.bytes / shards(boundary_spec(t, layout, space.mesh.size(layout)), space.mesh) for t in tensors)
            for layout in space.layouts
        ]
        return LayerFigures(table.objective, table.costs, table.transient_bytes, np.array(entry_bytes, dtype=float))


@dataclass(frozen=True, slots=True)
class LayerCache:
    """A folder of solved layers; it is made when the first is stored.

    Two searches may share it: files appear whole or not at all. A folder that cannot be read or written, and a file
    that is not what it should be, cost a line on the log and the time to solve again, never the search.
    """

    folder: Path
    most_bytes: int = MOST_BYTES

    def __post_init__(self) -> None:
        if self.most_bytes < 1:
            raise PlanError(f"a cache of at most {self.most_bytes} bytes holds nothing; give at least 1, or none")

    def get(self, parts: Sequence[object], solve: Callable[[], list[LayerFigures]]) -> list[LayerFigures]:
        """The figures that ``parts`` stand for, of each kind of mesh: from the folder, or solved and stored."""
        path = self.folder / f"{_name(parts)}{_SUFFIX}"
        found = self._read(path)
        if found is None:
            found = solve()
            self._write(path, found)
        return found

    def _read(self, path: Path) -> list[LayerFigures] | None:
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("cache: %s cannot be read (%s); solving its layer again", path, error.strerror)
            return None
        found = _decoded(data)
        if found is None:
            _log.warning("cache: %s is damaged or not ours; solving its layer again", path)
            return None
        with suppress(OSError):  # read-only folders serve too; their files only look unused
            os.utime(path)
        return found

    def _write(self, path: Path, figures: Sequence[LayerFigures]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix="new-", delete=False) as file:
                try:
                    file.write(_encoded(figures))
                    file.close()
                    Path(file.name).replace(path)
                except BaseException:
                    Path(file.name).unlink(missing_ok=True)
                    raise
            self._shrink()
        except OSError as error:
            _log.warning("cache: nothing can be stored in %s (%s)", self.folder, error.strerror)

    def _shrink(self) -> None:
        """Remove the files that were not used for longest until the rest is no more than ``most_bytes``."""
        files = []
        for path in self.folder.glob(f"*{_SUFFIX}"):
            with suppress(FileNotFoundError):  # another search was quicker
                facts = path.stat()
                files.append((facts.st_mtime_ns, path.name, facts.st_size))
        total = sum(size for *_, size in files)
        for _, name, size in sorted(files):
            if total <= self.most_bytes:
                return
            (self.folder / name).unlink(missing_ok=True)
            total -= size


def layer_cache(folder: str | os.PathLike[str] | None = None, use: bool = True) -> LayerCache | None:
    """The cache that a command uses; None: no cache.

    Args:
        folder: where; default: what ``MESHWRIGHT_CACHE`` says, and no cache if it is not set or says "off".
        use: False for ``--no-cache``, which goes before everything else.
    """
    said = os.environ.get(CACHE_VARIABLE, "")
    if not use or said.lower() == "off":
        return None
    where = folder or said
    return LayerCache(Path(where).expanduser()) if where else None


def _name(parts: Sequence[object]) -> str:
    """A hash of plain data (frozen dataclasses, tuples, numbers, text) and of the code that reads it."""
    return sha256("\n".join([code_version(), *map(repr, parts)]).encode()).hexdigest()[:32]


@cache
def code_version() -> str:
    """A hash of the version, of NumPy's, and of every source file that a layer's figures may follow from."""
    digest = sha256(f"{meshwright.__version__} {np.__version__}".encode())
    root = Path(meshwright.__file__).parent
    for package in _PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _encoded(figures: Sequence[LayerFigures]) -> bytes:
    file = io.BytesIO()
    arrays = {f"{f.name}{kind}": getattr(x, f.name) for kind, x in enumerate(figures) for f in fields(x)}
    np.savez(file, allow_pickle=False, **arrays)
    payload = file.getvalue()
    return _MAGIC + sha256(payload).hexdigest().encode() + b"\n" + payload


def _decoded(data: bytes) -> list[LayerFigures] | None:
    """None if the data is not whole, or was written by something else."""
    start = len(_MAGIC) + 65
    payload = data[start:]
    if data[:start] != _MAGIC + sha256(payload).hexdigest().encode() + b"\n":
        return None
    names = [f.name for f in fields(LayerFigures)]
    with np.load(io.BytesIO(payload), allow_pickle=False) as arrays:
        return [LayerFigures(*(arrays[f"{name}{kind}"] for name in names)) for kind in range(len(arrays) // len(names))]
