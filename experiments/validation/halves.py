"""Rows → a half that constants are fitted to and a half that they are judged on, by a seed.

Whole groups go to one side: plans of one model, cluster and batch are alike, so that a row would give its neighbours
away.
"""

import random
from collections.abc import Hashable, Sequence

FIT, HELD_OUT = "fit", "held out"


def halves(groups: Sequence[Hashable], seed: int) -> list[str]:
    """``FIT`` or ``HELD_OUT`` for each row: groups in a random order, each to the side with fewer rows so far.

    One group alone is held out.
    """
    sizes: dict[Hashable, int] = {}
    for group in groups:
        sizes[group] = sizes.get(group, 0) + 1
    order = list(sizes)
    random.Random(seed).shuffle(order)
    rows = {FIT: 0, HELD_OUT: 0}
    side: dict[Hashable, str] = {}
    for group in order:
        side[group] = FIT if rows[FIT] < rows[HELD_OUT] else HELD_OUT
        rows[side[group]] += sizes[group]
    return [side[group] for group in groups]
