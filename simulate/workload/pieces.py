"""The kernels of one layer, of the embedding and of the head, on one device.

A layer is a row of pieces; each knows its forward kernels, those of its input-gradient and of its weight-gradient.
Sizes follow Shoeybi et al., Megatron-LM, 2019, section 3 (columns, then rows, of each pair of matrices), and
Korthikanti et al., 2022, section 4 (sequence parallelism).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from meshwright.simulate.compute import DTYPE_BYTES
from meshwright.simulate.operations import (
    Attention,
    Collective,
    CrossEntropy,
    Embedding,
    Kernel,
    Matmul,
    Pointwise,
)
from meshwright.simulate.workload.grid import Grid
from meshwright.simulate.workload.stack import Stack
from meshwright.simulate.workload.transformer import Transformer


@dataclass(frozen=True, slots=True)
class Piece:
    """A step of the forward and its two gradients; ``core`` pieces are recomputed by the selective policy."""

    name: str
    forward: tuple[Kernel, ...]
    input_gradient: tuple[Kernel, ...] = ()
    weight_gradient: tuple[Kernel, ...] = ()
    core: bool = False


@dataclass(frozen=True)
class Local:
    """What one device sees of a layer."""

    model: Transformer
    grid: Grid
    stack: Stack

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch between the collectives of a layer."""
        return self.grid.microbatch_size * self.model.sequence // self.grid.context

    @property
    def outer_tokens(self) -> int:
        """Tokens where sequence parallelism splits them: in norms, residuals and dropout."""
        return self.tokens // (self.grid.tensor if self.grid.sequence_parallel else 1)

    @property
    def heads(self) -> int:
        return self.model.heads // self.grid.tensor

    @property
    def kv_heads(self) -> int:
        """Devices beyond the number of kv_heads hold copies."""
        return max(1, self.model.key_heads // self.grid.tensor)

    @property
    def query_dim(self) -> int:
        return self.heads * self.model.head_size

    @property
    def key_dim(self) -> int:
        return self.kv_heads * self.model.head_size

    @property
    def ffn(self) -> int:
        return self.model.ffn // self.grid.tensor

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding here; Megatron-LM pads the last part."""
        return ceil(self.model.vocabulary / self.grid.tensor)


def layer_pieces(local: Local) -> tuple[Piece, ...]:
    """One layer, first to last."""
    model = local.model
    mlp = _experts(local) if model.experts > 1 else _mlp(local, local.tokens)
    return (
        _norm(local, "attention norm"),
        *_enter(local),
        _linear(local, "qkv", local.tokens, model.hidden, local.query_dim + 2 * local.key_dim, gathered=True),
        *(_rotary(local) if model.rotary else ()),
        *_attention(local),
        _linear(local, "projection", local.tokens, local.query_dim, model.hidden),
        *_leave(local),
        *_residual(local, "attention residual"),
        _norm(local, "mlp norm"),
        *_enter(local),
        *mlp,
        *_leave(local),
        *_residual(local, "mlp residual"),
    )


def embedding_pieces(local: Local) -> tuple[Piece, ...]:
    """What comes before the first layer: tokens looked up, positions added, dropped out."""
    model, hidden_bytes = local.model, local.tokens * local.model.hidden * local.model.dtype_bytes
    table = Piece(
        "embedding",
        (Embedding(tokens=local.tokens, hidden=model.hidden, dtype=model.dtype),),
        weight_gradient=(Embedding(tokens=local.tokens, hidden=model.hidden, dtype=model.dtype, backward=True),),
    )
    passes = (0 if model.rotary else 2) + (2 if model.dropout else 0)
    after = _pointwise("position and dropout", passes * hidden_bytes, passes * hidden_bytes)
    return (table, *_leave(local), *((after,) if passes else ()))


def head_pieces(local: Local) -> tuple[Piece, ...]:
    """What comes after the last layer: norm, logits, loss."""
    model, grid = local.model, local.grid
    tokens, vocabulary = local.tokens, local.vocabulary
    return (
        _norm(local, "final norm"),
        *_enter(local),
        _linear(local, "logits", tokens, model.hidden, vocabulary, gathered=True, dtype=model.dtype),
        _pointwise("logits to f32", tokens * vocabulary * (model.dtype_bytes + 4.0)),
        *((_sum(local, "loss sums", 3 * 4.0 * tokens, backward=False),) if grid.tensor > 1 else ()),
        _loss(local),
    )


def _loss(local: Local) -> Piece:
    """Softmax cross-entropy in f32; apart, as Megatron-LM's ``mpu/cross_entropy.py`` has it, five kernels."""
    fused = CrossEntropy(tokens=local.tokens, vocabulary=local.vocabulary, dtype="f32")
    forward: tuple[Kernel, ...] = (fused,)
    if not local.stack.fused_loss:
        once = 4.0 * local.tokens * local.vocabulary
        passes = (1, 2, 2, 1, 2)  # maximum, difference, exponential, sum, quotient: each reads, some write
        forward = tuple(Pointwise(bytes=times * once) for times in passes)
    return Piece("loss", forward, (replace(fused, backward=True),))


def _pointwise(name: str, bytes: float, backward_bytes: float | None = None, *, core: bool = False) -> Piece:
    back = bytes if backward_bytes is None else backward_bytes
    return Piece(name, (Pointwise(bytes=bytes),), (Pointwise(bytes=back),) if back else (), core=core)


def _norm(local: Local, name: str) -> Piece:
    """Forward: read, write. Backward: input and cotangent read, cotangent written."""
    held = local.outer_tokens * local.model.hidden * local.model.dtype_bytes
    return _pointwise(name, 2.0 * held, 3.0 * held)


def _residual(local: Local, name: str) -> Iterator[Piece]:
    """Bias, dropout and the sum with what went round the block; the sum's cotangent goes both ways for nothing."""
    model = local.model
    elements = local.outer_tokens * model.hidden
    held = float(elements * model.dtype_bytes)
    mask = float(elements) if model.dropout else 0.0
    if local.stack.fused_pointwise:
        yield _pointwise(name, 3 * held + mask, 2 * held + mask)
        return
    if model.dropout:
        yield _pointwise(f"{name}: dropout", 2 * held + mask)
    yield _pointwise(f"{name}: sum", 3 * held)


def _rotary(local: Local) -> Iterator[Piece]:
    elements = [local.tokens * dim for dim in (local.query_dim, local.key_dim)]
    sizes = [sum(elements)] if local.stack.fused_pointwise else elements
    for size in sizes:
        yield _pointwise("rotary embedding", 2.0 * size * local.model.dtype_bytes)


def _linear(
    local: Local, name: str, tokens: int, k: int, n: int, *, gathered: bool = False, batch: int = 1, dtype: str = ""
) -> Piece:
    """Y = X W with W k × n; of ``gathered`` input the backward needs the gathered X again (sequence parallelism)."""
    model, stack, grid = local.model, local.stack, local.grid
    used = dtype or model.matmuls_in
    multiply = Matmul(m=tokens, n=n, k=k, dtype=used, batch=batch)
    again: tuple[Kernel, ...] = ()
    if gathered and grid.sequence_parallel and grid.tensor > 1:
        again = (_collective(local, "all_gather"),)
    summed: tuple[Kernel, ...] = ()
    if not stack.fused_accumulation and grid.microbatches > 1:
        sum_bytes = float(batch * k * n * (model.dtype_bytes + 2 * stack.gradient_bytes))
        summed = (Pointwise(bytes=sum_bytes),)
    return Piece(
        name,
        (*_cast(model, used, batch * tokens * k), multiply),
        (*_cast(model, used, batch * tokens * n), Matmul(m=tokens, n=k, k=n, dtype=used, batch=batch)),
        (*again, Matmul(m=k, n=n, k=tokens, dtype=used, batch=batch), *summed),
    )


def _cast(model: Transformer, dtype: str, elements: int) -> tuple[Kernel, ...]:
    """To a narrower type: read once, written as it is and transposed, as products of either backward need it."""
    if DTYPE_BYTES[dtype] >= model.dtype_bytes:
        return ()
    return (Pointwise(bytes=float(elements * (model.dtype_bytes + 2 * DTYPE_BYTES[dtype]))),)


def _attention(local: Local) -> Iterator[Piece]:
    """The core of attention; under context parallelism the keys and values of all are gathered first.

    Source of the exchange: Llama Team, The Llama 3 Herd of Models, 2024, section 3.3.2.
    """
    model, grid = local.model, local.grid
    queries = model.sequence // grid.context
    if grid.context > 1:
        message = 2.0 * grid.microbatch_size * model.sequence * local.key_dim * model.dtype_bytes
        gather, scatter = (
            Collective(kind=kind, message_bytes=message, ranks=grid.context, axis="context")
            for kind in ("all_gather", "reduce_scatter")
        )
        yield Piece("keys and values", (gather,), (scatter,), core=True)
    if grid.fused_attention:
        flash = Attention(
            batch=grid.microbatch_size,
            heads=local.heads,
            kv_heads=local.kv_heads,
            queries=queries,
            keys=model.sequence,
            head_dim=model.head_size,
            dtype=model.dtype,
            causal=model.causal,
        )
        yield Piece("attention", (flash,), (replace(flash, backward=True),), core=True)
        return
    heads, size = grid.microbatch_size * local.heads, model.head_size
    scores = heads * queries * model.sequence
    held = float(scores * model.dtype_bytes)
    score, weigh, to_keys = (
        Matmul(m=m, n=n, k=k, dtype=model.dtype, batch=heads)
        for m, n, k in (
            (queries, model.sequence, size),
            (queries, size, model.sequence),
            (model.sequence, size, queries),
        )
    )
    yield Piece("scores", (score,), (weigh, to_keys), core=True)
    if local.stack.fused_softmax:
        yield _pointwise("softmax", 2 * held, 3 * held, core=True)
    else:
        yield from _separate_softmax(held, float(4 * scores))
    if model.dropout:
        yield _pointwise("attention dropout", 2 * held + scores, core=True)
    yield Piece("weighing", (weigh,), (score, to_keys), core=True)


def _separate_softmax(held: float, wide: float) -> Iterator[Piece]:
    """Scores of ``held`` bytes, which the softmax takes as f32 of ``wide`` bytes, by a kernel for each step.

    Bytes follow OPTAttention.forward of Hugging Face transformers 4.3x: a mask is added, torch.max keeps scores finite
    (its gradient compares twice, halves, selects and fills), softmax writes f32, which is cast back to 16 bits.
    """
    yield _pointwise("mask scores", 2 * held, 0.0, core=True)
    yield _pointwise("bound scores", 2 * held, 11 * held, core=True)
    yield _pointwise("softmax in f32", held + wide, held + 2 * wide, core=True)
    if held < wide:
        yield _pointwise("weights from f32", held + wide, core=True)


def _mlp(local: Local, tokens: int, batch: int = 1) -> tuple[Piece, ...]:
    """Up, activation, down; ``batch`` experts with so many tokens each."""
    model = local.model
    ups = 2 if model.gated else 1
    between = float(batch * tokens * local.ffn * model.dtype_bytes)
    routed = model.experts > 1
    activation = [_pointwise("activation", (ups + 1) * between, (2 * ups + 1) * between)]
    if model.biases and not local.stack.fused_pointwise:
        activation.insert(0, _pointwise("mlp bias", 2 * ups * between, ups * between))
    return (
        _linear(local, "mlp up", tokens, model.hidden, ups * local.ffn, gathered=not routed, batch=batch),
        *activation,
        _linear(local, "mlp down", tokens, local.ffn, model.hidden, batch=batch),
    )


def _experts(local: Local) -> tuple[Piece, ...]:
    """Router, tokens sent to their experts (evenly), the experts' MLPs as one grouped product, tokens sent back."""
    model, grid = local.model, local.grid
    choices = local.tokens * model.experts_per_token
    here = model.experts // grid.expert
    moved = float(choices * model.hidden * model.dtype_bytes)
    permute = _pointwise("permute tokens", 2 * moved)
    exchange: tuple[Piece, ...] = ()
    if grid.expert > 1:
        swap = Collective(
            kind="all_to_all", message_bytes=moved * grid.expert, ranks=grid.expert, axis="expert"
        )  # each rank brings its own choices: the array that all hold together
        exchange = (Piece("exchange tokens", (swap,), (swap,)),)
    return (
        _linear(local, "router", local.tokens, model.hidden, model.experts, dtype=model.dtype),
        _pointwise("choose experts", 4.0 * local.tokens * model.experts * 3),
        permute,
        *exchange,
        *_mlp(local, ceil(choices / here), here),
        *exchange,
        permute,
    )


def _enter(local: Local) -> Iterator[Piece]:
    """Before matrices split by columns: the cotangent is summed; split tokens are gathered first."""
    if local.grid.tensor == 1:
        return
    if local.grid.sequence_parallel:
        yield Piece("gather tokens", (_collective(local, "all_gather"),), (_collective(local, "reduce_scatter"),))
    else:
        yield Piece("sum cotangents", (), (_collective(local, "all_reduce"),))


def _leave(local: Local) -> Iterator[Piece]:
    """After matrices split by rows: partial results are summed, and split by token again."""
    if local.grid.tensor == 1:
        return
    if local.grid.sequence_parallel:
        yield Piece("scatter tokens", (_collective(local, "reduce_scatter"),), (_collective(local, "all_gather"),))
    else:
        yield Piece("sum results", (_collective(local, "all_reduce"),))


def _collective(local: Local, kind: str) -> Collective:
    message = float(local.tokens * local.model.hidden * local.model.dtype_bytes)
    return Collective(kind=kind, message_bytes=message, ranks=local.grid.tensor, axis="tensor")  # type: ignore[arg-type]


def _sum(local: Local, name: str, bytes: float, *, backward: bool) -> Piece:
    total = Collective(kind="all_reduce", message_bytes=bytes, ranks=local.grid.tensor, axis="tensor")
    return Piece(name, (total,), (total,) if backward else ())
