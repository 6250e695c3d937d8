"""What a device keeps of a micro-batch's forward for its backward.

Source: Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models, 2022, sections 4 and 5. For a
GPT in 16 bits, with s, b, h, a, t as there, one layer keeps (equations 1, 2, 4 and their selective forms)

    s b h (34 + 5 a s / h)                no tensor parallelism
    s b h (10 + 24 / t + 5 a s / (h t))   tensor parallelism
    s b h / t (34 + 5 a s / h)            and sequence parallelism
    2 s b h                               full recomputation
"""

from meshwright.simulate.workload.pieces import Local

MASK_BYTES = 1  # of a dropout mask, for each element


def layer_bytes(local: Local, *, kept: str | None = None) -> float:
    """Bytes that one layer keeps under the grid's recomputation policy, or under the policy ``kept``."""
    model, grid = local.model, local.grid
    policy = grid.recompute if kept is None else kept
    size, hidden = model.dtype_bytes, model.hidden
    mask = MASK_BYTES if model.dropout else 0
    if policy == "full":
        return float(local.outer_tokens * hidden * size)
    outer = local.outer_tokens * hidden * (4 * size + 2 * mask)  # inputs of norms and matrices, masks of residuals
    between = 3 if model.gated else 2  # inputs of the activation, and of the matrix after it
    routed = model.experts_per_token if model.experts > 1 else 1
    inner = local.tokens * size * (2 * local.query_dim + 2 * local.key_dim + routed * between * local.ffn)
    if model.experts > 1:
        inner += local.tokens * size * routed * hidden * 2  # tokens as sent to the experts, and as they come back
    return float(outer + inner) + (core_bytes(local) if policy == "none" else 0.0)


def weight_gradient_bytes(local: Local) -> float:
    """Bytes of one layer that its weight-gradients wait for: the inputs of its matrices and their outputs' cotangents.

    Source: Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024, table 1: 32 s b h of a GPT's 34 s b h + 5 a s² b.
    Never more than the layer keeps; under recomputation all of it is taken to wait.
    """
    model, kept = local.model, layer_bytes(local)
    if local.grid.recompute != "none" or model.experts > 1:
        return kept
    ups = 2 if model.gated else 1
    inputs = 2 * model.hidden + local.query_dim + local.ffn
    outputs = local.query_dim + 2 * local.key_dim + 2 * model.hidden + ups * local.ffn
    return min(kept, float(local.tokens * model.dtype_bytes * (inputs + outputs)))


def head_weight_gradient_bytes(local: Local) -> float:
    """Bytes that the head's weight-gradient waits for: its input, and the logits' cotangent as it is multiplied."""
    elements = local.outer_tokens * local.model.hidden + local.tokens * local.vocabulary
    return float(local.model.dtype_bytes * elements)


def core_bytes(local: Local) -> float:
    """What the core of attention keeps: its scores, or where it is fused the sums of their rows."""
    model, grid = local.model, local.grid
    rows = grid.microbatch_size * local.heads * (model.sequence // grid.context)
    if grid.fused_attention:
        return 4.0 * rows
    copies = 2 * model.dtype_bytes + MASK_BYTES if model.dropout else model.dtype_bytes
    return float(rows * model.sequence * copies)


def embedding_bytes(local: Local) -> float:
    """What the embedding keeps: the mask of its dropout."""
    return float(local.outer_tokens * local.model.hidden * MASK_BYTES) if local.model.dropout else 0.0


def head_bytes(local: Local) -> float:
    """What the head keeps: the inputs of the norm and of the logits, and the logits in f32 (section 4.3)."""
    held = 2 * local.outer_tokens * local.model.hidden * local.model.dtype_bytes
    return float(held + 4 * local.tokens * local.vocabulary)
