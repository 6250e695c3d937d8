"""A decoder-only transformer as sizes: what it holds and what arithmetic a step of it needs."""

from dataclasses import dataclass

from meshwright.errors import ModelError
from meshwright.simulate.compute import DTYPE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Transformer:
    """Layers of attention and an MLP between an embedding and a head.

    ``kv_heads`` below ``heads`` is grouped-query attention; ``gated`` MLPs have three matrices (SwiGLU) instead of
    two. ``experts`` MLPs a layer, of which each token takes ``experts_per_token``, make a mixture of experts.
    ``biases`` (with layer norms that have a shift) and ``dropout`` are GPT's; ``rotary`` positions are computed,
    others are a learned table. ``matmul_dtype`` is that of the matrix products of the layers, if it differs.
    None stands for the usual: as many ``kv_heads`` as heads, ``head_dim`` hidden / heads, ``ffn_hidden`` 4 hidden.
    """

    layers: int
    hidden: int
    heads: int
    vocabulary: int
    sequence: int
    kv_heads: int | None = None
    head_dim: int | None = None
    ffn_hidden: int | None = None
    gated: bool = False
    biases: bool = True
    rotary: bool = False
    dropout: bool = True
    causal: bool = True
    tied: bool = True
    experts: int = 1
    experts_per_token: int = 1
    dtype: str = "bf16"
    matmul_dtype: str | None = None

    def __post_init__(self) -> None:
        optional = ("kv_heads", "head_dim", "ffn_hidden")
        sizes = ("layers", "hidden", "heads", "vocabulary", "sequence", "experts", "experts_per_token", *optional)
        for name in sizes:
            size = getattr(self, name)
            if size is not None and not (isinstance(size, int) and size >= 1):
                raise ModelError(f"{name} of a transformer is {size}; a whole number of at least 1 is needed")
        if self.head_dim is None and self.hidden % self.heads:
            raise ModelError(f"hidden {self.hidden} does not split over {self.heads} heads; give head_dim")
        if self.heads % self.key_heads:
            raise ModelError(f"{self.heads} heads do not share {self.key_heads} kv_heads evenly")
        if self.experts_per_token > self.experts:
            raise ModelError(f"a token cannot take {self.experts_per_token} of {self.experts} experts; at most all")
        for dtype in (self.dtype, self.matmul_dtype or self.dtype):
            if dtype not in DTYPE_BYTES:
                raise ModelError(f"dtype {dtype!r} is unknown; known are {', '.join(DTYPE_BYTES)}")

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_size(self) -> int:
        """Dim of one head."""
        return self.hidden // self.heads if self.head_dim is None else self.head_dim

    @property
    def ffn(self) -> int:
        """Hidden dim of one MLP."""
        return 4 * self.hidden if self.ffn_hidden is None else self.ffn_hidden

    @property
    def query_dim(self) -> int:
        """All heads of the queries side by side."""
        return self.heads * self.head_size

    @property
    def key_dim(self) -> int:
        """All heads of the keys side by side."""
        return self.key_heads * self.head_size

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one activation or weight."""
        return DTYPE_BYTES[self.dtype]

    @property
    def matmuls_in(self) -> str:
        """The dtype of the layers' matrix products."""
        return self.matmul_dtype or self.dtype

    @property
    def attention_parameters(self) -> int:
        """Weights of one layer's attention, its norm included."""
        projections = 2 * self.hidden * (self.query_dim + self.key_dim)
        biases = self.query_dim + 2 * self.key_dim + self.hidden if self.biases else 0
        return projections + biases + self.norm_parameters

    @property
    def expert_parameters(self) -> int:
        """Weights of one MLP (of one expert)."""
        biases = self.ffn * (2 if self.gated else 1) + self.hidden if self.biases else 0
        return (3 if self.gated else 2) * self.hidden * self.ffn + biases

    @property
    def dense_parameters(self) -> int:
        """Weights of one layer that every token uses: attention, norms, the router, the MLP if there is but one."""
        own = self.hidden * self.experts if self.experts > 1 else self.expert_parameters
        return self.attention_parameters + self.norm_parameters + own

    @property
    def routed_parameters(self) -> int:
        """Weights of one layer's experts together; 0 without a choice among experts."""
        return self.experts * self.expert_parameters if self.experts > 1 else 0

    @property
    def norm_parameters(self) -> int:
        """Weights of one norm: a scale, and a shift where there are biases."""
        return self.hidden * (2 if self.biases else 1)

    @property
    def embedding_parameters(self) -> int:
        """The table of tokens, and of positions where these are learned."""
        return self.hidden * (self.vocabulary + (0 if self.rotary else self.sequence))

    @property
    def head_parameters(self) -> int:
        """The final norm, and the head's own matrix where it is not the embedding's."""
        return self.norm_parameters + (0 if self.tied else self.hidden * self.vocabulary)

    @property
    def parameters(self) -> int:
        """All weights.

        Of a GPT this is Narayanan et al., SC 2021, equation 2, and the 2h of the final norm that it leaves out.
        """
        layer = self.dense_parameters + self.routed_parameters
        return self.layers * layer + self.embedding_parameters + self.head_parameters

    def forward_flops(self, batch: int, *, causal: bool = False) -> float:
        """Arithmetic of the matrix products of one forward over ``batch`` sequences.

        With ``causal``, only what a causal mask leaves of attention counts; published utilisations count all of it.
        """
        used = self.experts_per_token * self.ffn * (3 if self.gated else 2)
        router = self.experts if self.experts > 1 else 0
        per_token = 2 * self.hidden * (2 * self.query_dim + 2 * self.key_dim + used + router)
        scores = 4 * self.sequence * self.query_dim * (0.5 if causal else 1.0)
        head = 2 * self.hidden * self.vocabulary
        return float(batch) * self.sequence * (self.layers * (per_token + scores) + head)

    def step_flops(self, batch: int) -> float:
        """Model FLOPs of a training step: a forward and a backward twice as dear (Chowdhery et al., PaLM, app. B)."""
        return 3 * self.forward_flops(batch)


def megatron_flops(model: Transformer, batch: int) -> float:
    """FLOPs of a step of a GPT that recomputes all activations: 96 B s l h² (1 + s / 6h + V / 16lh).

    Four passes of the layers and three of the head, which is not recomputed.
    Source: Narayanan et al., SC 2021, equation 3.
    """
    s, layers, h, v = model.sequence, model.layers, model.hidden, model.vocabulary
    return 96.0 * batch * s * layers * h**2 * (1 + s / (6 * h) + v / (16 * layers * h))
