"""Every schedule as a picture of text: 4 devices, 8 micro-batches, a second each for F, I and W of a whole stage.

A cell is as wide as the quickest computation: its kind and micro-batch, then ``=`` as long as it runs; ``.`` is a
device that waits. B is a backward in one piece. Of two stages on a device the one that runs second is in lower case.
"""

from meshwright.simulate.bare import play
from meshwright.simulate.program import LETTERS, Compute
from meshwright.simulate.schedules.base import Options
from meshwright.simulate.schedules.table import SCHEDULES
from meshwright.simulate.timeline import Timeline

DEVICES, MICROBATCHES = 4, 8
TWO_BRANCHES = Options(edges=((0, 1), (1, 3), (2, 3)))


def picture(timeline: Timeline, cell_seconds: float) -> list[str]:
    """One line a device."""
    cells = [["."] * round(2 * timeline.makespan_seconds / cell_seconds) for _ in timeline.mesh_devices]
    first_stage: dict[int, int] = {}
    for event in timeline.events:
        step = event.instruction
        if not isinstance(step, Compute):
            continue
        letter = LETTERS[type(step)]
        if first_stage.setdefault(event.mesh, step.stage) != step.stage:
            letter = letter.lower()
        start, end = (round(2 * seconds / cell_seconds) for seconds in (event.start_seconds, event.end_seconds))
        cells[event.mesh][start:end] = [letter, str(step.microbatch), *"=" * (end - start - 2)]
    return ["".join(line) for line in cells]


for name, rule in SCHEDULES.items():
    timeline = play(name, DEVICES, MICROBATCHES, options=TWO_BRANCHES if name == "graph-1f1b" else Options())
    held = " ".join(f"{peak:.0f}" for peak in timeline.peak_bytes)
    print(
        f"{name}: {timeline.makespan_seconds:g} s, the busiest device {timeline.span_seconds:g} s; "
        f"activations held {held}{' (of half stages)' if rule.chunks == 2 else ''}"
    )
    print("\n".join(picture(timeline, 1 / rule.chunks)), end="\n\n")
