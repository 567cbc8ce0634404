"""The hyper-parameters of a network: ``ModelArgs``."""

from dataclasses import dataclass
from typing import Any


@dataclass
class ModelArgs:
    """The hyper-parameters of a checkpoint (its ``params.json``) and the size of the cache.

    ``vocab_size`` of -1 stands for the tokenizer's. ``n_kv_heads`` of None means one key/value
    head for each query head (multi-head attention). The last seven extend Meta's format:

    Args:
        head_dim: a head's width; -1 for ``dim / n_heads``.
        hidden_dim: the feed-forward layer's width; -1 for 2/3 of 4 ``dim``, times
            ``ffn_dim_multiplier``, rounded up to a multiple of ``multiple_of``.
        rope_scaling: how rotary frequencies are stretched, see ``llama.rope``.
        tie_word_embeddings: whether the output's weight is the embedding's.
        labels: a classifier's classes; the network's logits are theirs, in place of tokens'. An
            empty list stands for a network without a head, which embeds.
        attention_bias: whether ``wq``, ``wk``, ``wv`` and ``wo`` have biases.
        mlp_bias: whether ``w1``, ``w2`` and ``w3`` have biases.
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    vocab_size: int = -1
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_batch_size: int = 32
    max_seq_len: int = 2048
    head_dim: int = -1
    hidden_dim: int = -1
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    labels: list[str] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        if self.head_dim == -1:
            self.head_dim = self.dim // self.n_heads
        if self.hidden_dim == -1:
            hidden = int(2 * 4 * self.dim / 3)
            if self.ffn_dim_multiplier is not None:
                hidden = int(self.ffn_dim_multiplier * hidden)
            self.hidden_dim = self.multiple_of * -(-hidden // self.multiple_of)

    @property
    def kv_heads(self) -> int:
        """The number of key/value heads."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def n_outputs(self) -> int:
        """The number of logits of a token."""
        return self.vocab_size if self.labels is None else len(self.labels)
