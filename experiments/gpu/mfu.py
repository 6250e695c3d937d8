"""Plain JAX on one device: the same model without our executor, and what share of the peak it reaches."""

import time
from pathlib import Path
from typing import Any, Literal

import jax

from experiments.gpu.baselines import hand_written_loss, training_step
from experiments.gpu.cases import Case
from experiments.gpu.common import BATCHES, adamw, end_of_steps, one_device, random_batches, utilization
from experiments.gpu.timing import memory_in_use, spread, timed_steps
from meshwright.models.zoo import get_model
from meshwright.plan.trace.model import trace

Variant = Literal["xla", "cudnn", "zoo"]


def train_plainly(
    case: Case, microbatches: int, variant: Variant, machine: Path | None, until: float
) -> dict[str, Any]:
    """Train the same model without our executor.

    Args:
        microbatches: of the plan that our executor ran, so that both do the same sums.
        variant: ``xla`` or ``cudnn``, the attention of the model by hand; ``zoo``, the zoo's own loss under ``jit``.
    """
    began = time.monotonic()
    model, optimizer = get_model(case.model), adamw()
    loss = model.loss_fn if variant == "zoo" else hand_written_loss(model, variant)
    # One program makes all weights: a call for each would compile each shape by itself.
    params = jax.jit(model.init_fn)(jax.random.key(0))
    state = jax.jit(optimizer.init)(params)
    batches = random_batches(model, case.batch)
    step_fn = training_step(loss, optimizer, microbatches).lower(params, state, batches[0]).compile()
    ready = time.monotonic()
    losses: list[float] = []

    def step() -> float:
        nonlocal params, state
        start = time.perf_counter()
        params, state, value = step_fn(params, state, batches[len(losses) % BATCHES])
        jax.block_until_ready(params)
        losses.append(float(value))
        return time.perf_counter() - start

    samples = timed_steps(step, end_of_steps(began, until))
    flops = trace(model, case.batch, microbatches).graph.model_flops * microbatches
    dtype = getattr(model.loss_fn.args[0], "dtype", "f32")  # type: ignore[attr-defined]
    measured = spread(samples)
    analysis = step_fn.memory_analysis()
    return {
        "device_kind": jax.local_devices()[0].device_kind,
        "variant": variant,
        "batch": case.batch,
        "microbatches": microbatches,
        "measured": measured,
        **utilization(flops, measured["median_seconds"], dtype, one_device(machine) if machine else None),
        "temporary_bytes": float(analysis.temp_size_in_bytes) if analysis is not None else None,
        "allocator": {"after_steps": memory_in_use()},
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "compile_and_init_seconds": ready - began,
    }
