"""Programs written by hand: two devices, three micro-batches, whole backwards (B) and split ones (I, W).

While a device waits for a message it can do weight gradients, which nobody waits for: the split program is as quick as
GPipe and holds fewer activations on the second device. An order that cannot run is refused, and why.
"""

from meshwright.errors import ScheduleError
from meshwright.simulate.bare import StageTimes, play_program
from meshwright.simulate.program import parse

PROGRAMS = {
    "GPipe": """
        0F0 0F1 0F2 0B0 0B1 0B2
        1F0 1F1 1F2 1B0 1B1 1B2""",
    "1F1B": """
        0F0 0F1 0B0 0F2 0B1 0B2
        1F0 1B0 1F1 1B1 1F2 1B2""",
    "split": """
        0F0 0F1 0I0 0F2 0I1 0W0 0I2 0W1 0W2
        1F0 1I0 1F1 1W0 1I1 1F2 1W1 1I2 1W2""",
}

for name, text in PROGRAMS.items():
    timeline = play_program(
        parse(text), StageTimes(forward_seconds=1, input_seconds=1, weight_seconds=1), hop_seconds=0.25
    )
    held = ", ".join(f"{peak:.0f}" for peak in timeline.peak_bytes)
    print(
        f"{name:6} {timeline.makespan_seconds:5.2f} s, bubble {timeline.bubble_fraction:5.1%}, activations held {held}"
    )

try:
    play_program(parse("0F0 0B0 0F1 0B1\n1F1 1B1 1F0 1B0"))
except ScheduleError as error:
    print(f"refused: {error}")
