"""Hugging Face's names and order of rows, and Meta's."""

import re

import torch

# Hugging Face's name of a module, without its layer's prefix, and Meta's.
META_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.norm": "norm",
    "lm_head": "output",
    # What LlamaForSequenceClassification has in place of lm_head.
    "score": "output",
}
_GLOBAL = ("model.embed_tokens", "model.norm", "lm_head", "score")
_HF_NAMES = {meta: hf for hf, meta in META_NAMES.items() if hf != "score"}
_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]*)\.(.+)")


def meta_name(hf_name: str) -> str | None:
    """Meta's name of a module or, with ``.weight`` at the end, of its weight.

    Returns:
        None for a name that the Llama network doesn't have.
    """
    stem = hf_name.removesuffix(".weight")
    suffix = hf_name[len(stem) :]
    if stem in _GLOBAL:
        return META_NAMES[stem] + suffix
    found = _LAYER.fullmatch(stem)
    if found is None or found[2] in _GLOBAL or found[2] not in META_NAMES:
        return None
    return f"layers.{found[1]}.{META_NAMES[found[2]]}{suffix}"


def hf_name(meta_name: str) -> str:
    """Hugging Face's name of one of the network's modules or weights; ``lm_head`` for ``output``.

    Raises:
        KeyError: the network has no such module.
    """
    stem = meta_name.removesuffix(".weight")
    suffix = meta_name[len(stem) :]
    if not stem.startswith("layers."):
        return _HF_NAMES[stem] + suffix
    _, layer, module = stem.split(".", 2)
    return f"model.layers.{layer}.{_HF_NAMES[module]}{suffix}"


def is_rotary(meta_name: str) -> bool:
    """Whether the rows of a module or weight are queries or keys, whose order differs."""
    return meta_name.removesuffix(".weight").endswith((".attention.wq", ".attention.wk"))


def to_interleaved(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Queries' or keys' rows in Meta's order: what rotates together lies side by side.

    Args:
        weight: shape (n_heads * head_dim, ...); Hugging Face's have half a head between the two.

    Returns:
        A copy of the same shape.
    """
    halves = weight.unflatten(0, (-1, 2, head_dim // 2))
    return halves.transpose(1, 2).flatten(0, 2)


def from_interleaved(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The inverse of ``to_interleaved``."""
    pairs = weight.unflatten(0, (-1, head_dim // 2, 2))
    return pairs.transpose(1, 2).flatten(0, 2)
