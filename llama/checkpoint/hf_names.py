"""Names of modules in Hugging Face's Llama and in Meta's, and the order of rotary rows in each."""

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
    # LlamaForSequenceClassification has it in place of lm_head.
    "score": "output",
}
_GLOBAL = ("model.embed_tokens", "model.norm", "lm_head", "score")
_HF_NAMES = {meta: hf for hf, meta in META_NAMES.items() if hf != "score"}
_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]*)\.(.+)")


def meta_name(hf_name: str) -> str | None:
    """Return Meta's name of a module or, with ``.weight`` or ``.bias`` behind it, of its parameter.

    None for a name that the Llama network doesn't have.
    """
    stem, suffix = _stem_and_suffix(hf_name)
    if stem in _GLOBAL:
        return META_NAMES[stem] + suffix
    match = _LAYER.fullmatch(stem)
    if match is None or match[2] in _GLOBAL or match[2] not in META_NAMES:
        return None
    return f"layers.{match[1]}.{META_NAMES[match[2]]}{suffix}"


def module_and_part(name: str) -> tuple[str, str] | None:
    """Return the module of a tensor, by its full name, and the rest of the tensor's name.

    The rest is ``weight`` or ``bias``; quantised weights have other tensors, some with dots in
    their names. None for a module that the Llama network doesn't have.
    """
    for match in re.finditer(r"\.", name):
        for module in (name[: match.start()], f"model.{name[: match.start()]}"):
            if meta_name(module) is not None:
                return module, name[match.end() :]
    return None


def hf_name(meta_name: str) -> str:
    """Return Hugging Face's name of a module or parameter; ``lm_head`` for ``output``.

    Raises:
        KeyError: the network has no such module.
    """
    stem, suffix = _stem_and_suffix(meta_name)
    if not stem.startswith("layers."):
        return _HF_NAMES[stem] + suffix
    _, layer, module = stem.split(".", 2)
    return f"model.layers.{layer}.{_HF_NAMES[module]}{suffix}"


def is_rotary(meta_name: str) -> bool:
    """Return whether a module or parameter gives queries or keys, whose rows lie in another order.

    Source: ``permute`` in transformers' ``convert_llama_weights_to_hf.py``.
    """
    return _stem_and_suffix(meta_name)[0].endswith((".attention.wq", ".attention.wk"))


def _stem_and_suffix(name: str) -> tuple[str, str]:
    stem = name.removesuffix(".bias") if name.endswith(".bias") else name.removesuffix(".weight")
    return stem, name[len(stem) :]


def to_interleaved(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return queries' or keys' rows in Meta's order, where a rotated pair is adjacent.

    Args:
        weight: shape (n_heads * head_dim, ...); in Hugging Face's order half a head lies between
            the two.
        head_dim: the size of a head.

    Returns:
        A copy of the same shape.
    """
    halves = weight.unflatten(0, (-1, 2, head_dim // 2))
    return halves.transpose(1, 2).flatten(0, 2)


def from_interleaved(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return a copy in Hugging Face's order: the inverse of ``to_interleaved``."""
    pairs = weight.unflatten(0, (-1, head_dim // 2, 2))
    return pairs.transpose(1, 2).flatten(0, 2)
