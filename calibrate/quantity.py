"""A number with its source and range: what every hardware figure is made of."""

import math
from datetime import date

import msgspec

from meshwright.errors import ClusterError

OVER_SHEET = 1.2  # times the data sheet's rate: more than clocks, caches and rounded sheets explain is impossible


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of all parts of a cluster: immutable, compared by value, no unknown field in its text form."""


class Quantity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A finite number with its source and, where it was measured, a range that holds it."""

    value: float
    source: str
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        for name, number in (("value", self.value), ("low", self.low), ("high", self.high)):
            if number is not None and not math.isfinite(number):
                raise ClusterError(f"{name} is {number}; a finite number is needed")
        if not self.source.strip():
            raise ClusterError("source is empty; say where the number comes from")
        if self.low is not None and self.low > self.value:
            raise ClusterError(f"low is {self.low:g}, above the value {self.value:g}; low <= value <= high is needed")
        if self.high is not None and self.high < self.value:
            raise ClusterError(f"high is {self.high:g}, below the value {self.value:g}; low <= value <= high is needed")

    def scaled(self, factor: float) -> "Quantity":
        """The same quantity times a positive factor, range included."""
        low = None if self.low is None else self.low * factor
        high = None if self.high is None else self.high * factor
        return Quantity(self.value * factor, self.source, low, high)


class Price(Record, frozen=True, kw_only=True):
    """What renting one host for an hour costs, on the day (``2026-11-09``) that its source was read."""

    usd: float
    date: str
    source: str

    def __post_init__(self) -> None:
        if not (math.isfinite(self.usd) and self.usd > 0):
            raise ClusterError(f"usd is {self.usd:g}; a positive number of US dollars an hour is needed")
        try:
            date.fromisoformat(self.date)
        except ValueError:
            raise ClusterError(f"date is {self.date!r}; write it as 2026-11-09") from None
        if not self.source.strip():
            raise ClusterError("source is empty; say where the price was read")


def need_positive(name: str, quantity: Quantity) -> None:
    """Raise ``ClusterError`` unless the value (and so, with its low end, the range) is above zero."""
    if quantity.value <= 0 or (quantity.low is not None and quantity.low < 0):
        wrong = "value" if quantity.value <= 0 else "low"
        raise ClusterError(f"{name}.{wrong} is {getattr(quantity, wrong):g}; a positive number is needed")


def need_not_negative(name: str, quantity: Quantity) -> None:
    """Raise ``ClusterError`` for a negative value or low end."""
    for end in ("value", "low"):
        number = getattr(quantity, end)
        if number is not None and number < 0:
            raise ClusterError(f"{name}.{end} is {number:g}; zero or a positive number is needed")


def need_within_sheet(name: str, per_second: float, sheet: Quantity | None) -> None:
    """Raise ``ClusterError`` for a rate that is above what the data sheet allows, with room for its rounding."""
    if sheet is not None and per_second > sheet.value * OVER_SHEET:
        raise ClusterError(
            f"{name} is {per_second:.4g}, {per_second / sheet.value - 1:.0%} above the {sheet.value:.4g} "
            "of the data sheet; check the unit and the measurement"
        )


def short_dtype(dtype: str) -> str:
    """``bfloat16`` → ``bf16``, ``float32`` → ``f32``, ``int8`` → ``s8``; short names stay."""
    name = str(dtype)
    for long, short in (("bfloat", "bf"), ("float", "f"), ("uint", "u"), ("int", "s")):
        if name.startswith(long):
            return short + name.removeprefix(long)
    return name
