"""One accelerator: its data sheet, and what was fitted to kernels measured on it."""

from math import isfinite

import msgspec

from meshwright.calibrate.quantity import (
    Quantity,
    Record,
    need_not_negative,
    need_positive,
    need_within_sheet,
    short_dtype,
)
from meshwright.errors import ClusterError

FALLBACK_DTYPE = "f32"
PHASES = ("forward", "backward", "once")  # of a micro-batch, of a micro-batch, and what ends the iteration
ACTIVITIES = ("compute", "collective", "to_host", "from_host")


class MatmulFit(Record, frozen=True, kw_only=True):
    """Matmuls by tiles and waves, with a roofline of memory; ``calibrate.kernels`` fits it.

    ``efficiency`` is the share of the peak that a tile of so many rows and columns reaches (``"256x128"``, either way
    round); each tile also pays ``overhead_k`` steps of its inner loop. A last wave of tiles that does not fill all
    ``compute_units`` takes at least ``last_wave`` of a whole one. Where few tiles have a long inner loop, that loop may
    be cut into one of ``splits`` parts (split-K), whose partial sums move ``split_bytes`` for each part and element of
    the result. Arithmetic that lasts long draws so much power that clocks fall: it takes up to ``throttle`` more, half
    of that at ``throttle_seconds``. ``sharpness`` is the power p of ``(arithmetic^p + memory^p)^(1/p)``, so that near
    the ridge both count.
    """

    source: str
    compute_units: int
    efficiency: dict[str, float]
    overhead_k: float
    last_wave: float
    memory_bytes_per_second: float
    launch_seconds: float
    sharpness: float
    splits: tuple[int, ...] = (1,)
    split_bytes: float = 0.0
    throttle: float = 0.0
    throttle_seconds: float = 1e-3

    def __post_init__(self) -> None:
        if self.compute_units < 1 or not self.efficiency:
            tiles = len(self.efficiency)
            raise ClusterError(f"compute_units is {self.compute_units}, with {tiles} tiles in efficiency; each needs 1")
        for tile, share in self.efficiency.items():
            sides = tile.split("x")
            if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
                raise ClusterError(f"efficiency.{tile} is no tile; write rows x columns, as in 256x128")
            if not 0 < share <= 1:
                raise ClusterError(f"efficiency.{tile} is {share:g}; a fraction of the peak is needed")
        need_finite("overhead_k", self.overhead_k, 0)
        need_finite("last_wave", self.last_wave, 0, 1)
        need_finite("memory_bytes_per_second", self.memory_bytes_per_second, 1)
        need_finite("launch_seconds", self.launch_seconds, 0)
        need_finite("sharpness", self.sharpness, 1)
        need_finite("split_bytes", self.split_bytes, 0)
        need_finite("throttle", self.throttle, 0)
        need_finite("throttle_seconds", self.throttle_seconds, 1e-9)
        if 1 not in self.splits or min(self.splits) < 1:
            raise ClusterError(f"splits are {self.splits}; numbers of parts are needed, and 1 among them")

    @property
    def tiles(self) -> tuple[tuple[int, int, float], ...]:
        """(Rows, columns, efficiency) of each tile, both ways round."""
        found = []
        for tile, share in self.efficiency.items():
            rows, columns = map(int, tile.split("x"))
            found += [(rows, columns, share)] if rows == columns else [(rows, columns, share), (columns, rows, share)]
        return tuple(found)


class AttentionFit(Record, frozen=True, kw_only=True):
    """Fused attention: ``efficiency`` of the peak for long sequences, half of it at ``half_length`` keys.

    The backward reaches ``backward_share`` of the forward's rate.
    """

    source: str
    efficiency: float
    half_length: float
    launch_seconds: float
    backward_share: float = 1.0

    def __post_init__(self) -> None:
        need_finite("efficiency", self.efficiency, 1e-6, 1)
        need_finite("half_length", self.half_length, 0)
        need_finite("launch_seconds", self.launch_seconds, 0)
        need_finite("backward_share", self.backward_share, 1e-6, 1)


class Interference(Record, frozen=True, kw_only=True):
    """How activities on a device slow each other: ``rates[mask][activity]`` while those of the mask go on.

    Activities are, by their bit, compute, collectives, copies to the host and copies from it.
    """

    source: str
    rates: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        count = len(ACTIVITIES)
        if len(self.rates) != 1 << count or any(len(row) != count for row in self.rates):
            raise ClusterError(f"rates is no table of {1 << count} masks by {count} activities")
        if not all(0 < rate <= 1 for row in self.rates for rate in row):
            raise ClusterError("rates holds a number that is not above 0 and at most 1")


class ProgramFit(Record, frozen=True, kw_only=True):
    """What compiled programs of a stage take, beside the sum of their kernels as priced one by one.

    ``seconds = dispatch_seconds + fixed_seconds + slowdown * priced``: the executor's work for one instruction, and
    what kernels lose in a program (inputs that the last kernel left elsewhere in memory, layouts that the compiler
    changes between them). ``temporaries`` is how many times as many bytes a program needs while it runs as live at once
    by the planner's count, one operation after the other: compilers run several at once and reuse memory less.
    """

    fixed_seconds: Quantity
    slowdown: Quantity
    temporaries: Quantity | None = None

    def __post_init__(self) -> None:
        need_not_negative("fixed_seconds", self.fixed_seconds)
        need_positive("slowdown", self.slowdown)
        if self.temporaries is not None:
            need_positive("temporaries", self.temporaries)


def need_finite(name: str, number: float, least: float, most: float = float("inf")) -> None:
    """Raise ``ClusterError`` unless the number is finite and in range."""
    if not (isfinite(number) and least <= number <= most):
        raise ClusterError(f"{name} is {number:g}; a number from {least:g} to {most:g} is needed")


class Device(Record, frozen=True, kw_only=True):
    """One accelerator, or one single-threaded CPU rank.

    ``flops_per_second`` holds the peak for each dtype (``bf16``, ``f16``, ``f32``, ...); ``matmul_efficiency`` is what
    large matmuls achieve of it. ``memory_bytes_per_second`` is what memory-bound kernels achieve, reads and writes
    together. ``launch_seconds`` is paid by each kernel, ``dispatch_seconds`` by each call of a compiled program.
    ``sheet_memory_bytes_per_second`` is the data sheet's bandwidth of memory, which no fit may exceed by a fifth;
    ``programs`` says by phase of a step (``PHASES``) what whole programs take beside their kernels. ``pace_seconds`` is
    the mean time of one fixed matmul (f32, 256 cubed) through the calibration of a CPU: whoever times it again knows
    how fast the core runs now against then.
    """

    name: str
    memory_bytes: Quantity
    flops_per_second: dict[str, Quantity]
    matmul_efficiency: Quantity
    memory_bytes_per_second: Quantity
    launch_seconds: Quantity
    dispatch_seconds: Quantity
    matmul: dict[str, MatmulFit] = msgspec.field(default_factory=dict)
    attention: AttentionFit | None = None
    interference: Interference | None = None
    programs: dict[str, ProgramFit] = msgspec.field(default_factory=dict)
    sheet_memory_bytes_per_second: Quantity | None = None
    pace_seconds: Quantity | None = None

    def __post_init__(self) -> None:
        if self.pace_seconds is not None:
            need_positive("pace_seconds", self.pace_seconds)
        for phase in self.programs:
            if phase not in PHASES:
                raise ClusterError(f"programs.{phase} is no phase of a step; known are {', '.join(PHASES)}")
        need_positive("memory_bytes", self.memory_bytes)
        if FALLBACK_DTYPE not in self.flops_per_second:
            raise ClusterError(
                f"flops_per_second has no {FALLBACK_DTYPE!r}; it stands in for dtypes that are not listed"
            )
        for dtype, flops in self.flops_per_second.items():
            need_positive(f"flops_per_second.{dtype}", flops)
        need_positive("matmul_efficiency", self.matmul_efficiency)
        if self.matmul_efficiency.value > 1:
            raise ClusterError(
                f"matmul_efficiency.value is {self.matmul_efficiency.value:g}; "
                "a fraction of the peak, at most 1, is needed"
            )
        need_positive("memory_bytes_per_second", self.memory_bytes_per_second)
        sheet = self.sheet_memory_bytes_per_second
        if sheet is not None:
            need_positive("sheet_memory_bytes_per_second", sheet)
        need_within_sheet("memory_bytes_per_second.value", self.memory_bytes_per_second.value, sheet)
        need_not_negative("launch_seconds", self.launch_seconds)
        need_not_negative("dispatch_seconds", self.dispatch_seconds)
        for dtype, fit in self.matmul.items():
            need_within_sheet(f"matmul.{dtype}.memory_bytes_per_second", fit.memory_bytes_per_second, sheet)
            if dtype not in self.flops_per_second:
                raise ClusterError(f"matmul.{dtype} is a fit to a dtype that flops_per_second does not list")

    def matmul_fit(self, dtype: str) -> MatmulFit | None:
        """The fit of matmuls in a dtype; the two of 16 bits stand in for each other."""
        key = short_dtype(dtype)
        return self.matmul.get(key) or self.matmul.get({"f16": "bf16", "bf16": "f16"}.get(key, key))

    def program_slowdown(self, phase: str) -> float:
        """How many times as long as its kernels alone a program of this phase takes; 1 where it was not measured."""
        return self.programs[phase].slowdown.value if phase in self.programs else 1.0

    def program_seconds(self, phase: str) -> float:
        """What an instruction of this phase costs beside its kernels and its dispatch; 0 where it was not measured."""
        return self.programs[phase].fixed_seconds.value if phase in self.programs else 0.0

    def program_temporaries(self, phase: str) -> float:
        """What a program of this phase needs while it runs, over what the planner counts; 1 where not measured."""
        found = self.programs[phase].temporaries if phase in self.programs else None
        return 1.0 if found is None else found.value

    def peak_flops(self, dtype: str) -> float:
        """Peak FLOP/s for a dtype, ``bf16`` or NumPy's ``bfloat16`` alike; an unlisted dtype runs at the f32 rate."""
        key = short_dtype(dtype)
        return self.flops_per_second.get(key, self.flops_per_second[FALLBACK_DTYPE]).value
