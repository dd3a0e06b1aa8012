"""The shape of the transformer."""

from dataclasses import dataclass

from nanochat_jax.config.setting import UserError


@dataclass(frozen=True)
class GPTConfig:
    """The shape of the transformer. Instances are hashable, because jitted functions take them as static arguments."""

    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    vocab_size: int = 65536
    sequence_len: int = 2048
    norm_eps: float = 1.1920929e-07  # the machine epsilon of float32, which is torch's default for RMSNorm
    rope_theta: float = 10000.0
    softcap: float = 15.0
    # One letter per layer. S: a token attends to a quarter of the context. L: a token attends to the whole context. The
    # pattern repeats over the layers, except that the last layer is always L.
    window_pattern: str = "L"

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_kv_head", "n_embd", "vocab_size", "sequence_len"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: must be at least 1")
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise UserError(f"n_embd {self.n_embd} / n_head {self.n_head}: the head size must be an even integer")
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_kv_head {self.n_kv_head} does not divide n_head {self.n_head}")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise UserError(f"window pattern {self.window_pattern!r}: must consist of the letters S and L, like SSSL")

    @property
    def windows(self) -> tuple[int, ...]:
        """The attention window of each layer: how many earlier tokens a token attends to (0: all earlier tokens)."""
        short = -(-self.sequence_len // 4 // 128) * 128
        pattern = (self.window_pattern * self.n_layer)[: self.n_layer - 1] + "L"
        return tuple(short if letter == "S" and short < self.sequence_len else 0 for letter in pattern)

    @property
    def head_dim(self) -> int:
        """The size of an attention head."""
        return self.n_embd // self.n_head

    @property
    def padded_vocab(self) -> int:
        """The number of rows in the embedding and in the head: vocab_size, rounded up to a multiple of 64.

        Rounding up makes matmuls faster and all shards equal in size.
        """
        return -(-self.vocab_size // 64) * 64

    @property
    def num_params(self) -> int:
        """The number of weights, including the padding rows of the embedding and the head."""
        kv = self.n_kv_head * self.head_dim
        block = 2 * self.n_embd**2 + 2 * self.n_embd * kv + 8 * self.n_embd**2
        return 2 * self.padded_vocab * self.n_embd + self.n_layer * block

    def describe(self) -> str:
        """Returns text such as "20 layers, width 1280, 10 heads (10 kv), vocabulary 65,536, context 2,048"."""
        layers, heads = (f"{n} {word}{'s' * (n != 1)}" for n, word in ((self.n_layer, "layer"), (self.n_head, "head")))
        return (
            f"{layers}, width {self.n_embd}, {heads} ({self.n_kv_head} kv), vocabulary {self.vocab_size:,}, "
            f"context {self.sequence_len:,}"
        )

    @property
    def flops_per_token(self) -> int:
        """FLOPs per token for a forward and a backward pass. Attention is counted as if there were no causal mask."""
        matmul = self.num_params - self.padded_vocab * self.n_embd  # the embedding is a lookup, not a matmul
        return 6 * matmul + 12 * self.n_embd * sum(window or self.sequence_len for window in self.windows)
