"""How much may be simulated: what does not fit this machine's memory is refused before it is tried."""

import os

from meshwright.errors import ScheduleError

BYTES_A_TASK = 400  # its arrays in the engine, the event queue's among them
SHARE = 0.8  # of the memory that is free; the rest is for everybody else


def need_room(tasks: int, what: str = "tasks") -> None:
    """Raise ``ScheduleError`` if so many tasks would not fit into the memory that this machine has free."""
    free = SHARE * free_bytes()
    if tasks * BYTES_A_TASK > free:
        raise ScheduleError(
            f"{tasks:,} {what} need about {tasks * BYTES_A_TASK / 1e9:,.0f} GB of memory, and {free / 1e9:,.0f} GB are "
            f"free for them; simulate at most {int(free / BYTES_A_TASK):,}"
        )


def free_bytes() -> float:
    """Memory that is free now, or all of it where the system does not say."""
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            available = next(line for line in lines if line.startswith("MemAvailable:"))
        return float(available.split()[1]) * 1024
    except (OSError, StopIteration):
        return float(os.sysconf(pages)) * os.sysconf("SC_PAGE_SIZE")
