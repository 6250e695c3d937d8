"""Our executor on one device: plan, predict, train, and hold the run against the prediction."""

import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import msgspec

from experiments.gpu.cases import Case
from experiments.gpu.common import BATCHES, adamw, end_of_steps, one_device, random_batches, utilization
from experiments.gpu.timing import memory_in_use, spread, timed_steps
from meshwright.api import find_plan
from meshwright.execute.train import build
from meshwright.models.zoo import get_model
from meshwright.plan.planfile import Plan
from meshwright.plan.predict import predict
from meshwright.plan.search import Fix
from meshwright.simulate.timeline import Timeline


def train(case: Case, machine: Path, until: float) -> dict[str, Any]:
    """Plan one model for the calibrated device, train it, and hold step time and memory against the prediction.

    Args:
        until: ``time.monotonic`` at which the job should be over.
    """
    began = time.monotonic()
    cluster, model, optimizer = one_device(machine), get_model(case.model), adamw()
    fix = Fix(schedule="1f1b")  # on one device all schedules are one
    plan = find_plan(model, cluster=cluster, optimizer=optimizer, batch_size=case.batch, fix=fix)
    planned = time.monotonic()
    trainer = build(plan, model, optimizer)
    state = trainer.init(jax.random.key(0))
    ready = time.monotonic()
    before = memory_in_use()
    batches = random_batches(model, case.batch)
    losses: list[float] = []

    def step() -> float:
        nonlocal state
        state, metrics = trainer.step(state, batches[len(losses) % BATCHES])
        losses.append(metrics.loss)
        return metrics.step_seconds

    samples = timed_steps(step, end_of_steps(began, until))
    after = memory_in_use()
    state, _ = trainer.step(state, batches[0], measure=True)
    prediction = predict(plan)
    flops = plan.model_flops * plan.microbatches
    measured = spread(samples)
    return {
        "device_kind": jax.local_devices()[0].device_kind,
        "plan": _plan_summary(plan),
        "predicted": msgspec.to_builtins(prediction.predicted),
        "predicted_seconds_by_instruction": by_instruction(prediction.timeline),
        "measured": measured,
        "measured_seconds_by_instruction": by_instruction(trainer.timeline),
        **utilization(flops, measured["median_seconds"], plan.compute_dtype, cluster),
        "executor_peak_bytes": max(trainer.runtime.peak_bytes.values()),
        "allocator": {"before_steps": before, "after_steps": after},
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "plan_seconds": planned - began,
        "compile_and_init_seconds": ready - planned,
    }


def _plan_summary(plan: Plan) -> dict[str, Any]:
    names = ("batch", "microbatches", "schedule", "remat", "compute_dtype", "parameters")
    return {name: getattr(plan, name) for name in names}


def by_instruction(timeline: Timeline) -> dict[str, float]:
    """Seconds that the instructions of each kind take in a step, summed; in a measured step each is waited for."""
    seconds: dict[str, float] = defaultdict(float)
    for event in timeline.events:
        seconds[type(event.instruction).__name__.lower()] += event.end_seconds - event.start_seconds
    return dict(seconds)
