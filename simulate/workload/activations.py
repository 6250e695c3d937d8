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
