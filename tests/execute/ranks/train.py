"""Run by every rank: ``python train.py FOLDER`` trains each ``*.json`` plan of a folder on the batches that lie there.

Rank 0 writes the losses of each plan's steps into ``FOLDER/losses/``.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import optax

from meshwright.execute.process_group import ProcessGroup, guard
from meshwright.execute.train import build
from meshwright.models.zoo import get_model
from meshwright.plan.planfile import load_plan


def main(folder: Path) -> None:
    group = ProcessGroup.start(devices_per_rank=1, distributed=True)
    with np.load(folder / "batches.npz") as file:
        batches = {name: file[name] for name in file.files}
    steps = len(next(iter(batches.values())))
    for path in sorted(folder.glob("*.json")):
        plan = load_plan(path)
        trainer = build(plan, get_model(plan.model), optax.adamw(3e-3), group)
        state = trainer.init(jax.random.key(1, impl="rbg"))
        losses = []
        for step in range(steps):
            state, metrics = trainer.step(state, {name: leaf[step] for name, leaf in batches.items()})
            losses.append(metrics.loss)
        if group.rank == 0:
            (folder / "losses" / path.name).write_text(json.dumps(losses))


with guard():
    main(Path(sys.argv[1]))
