"""Networks of transformers and adapters of PEFT, which tests compare with and write to files."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from llama import Transformer
from llama.generation import TINY

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 768,
    "max_position_embeddings": 128,
}
RANDOM = {"initializer_range": 0.2, "attn_implementation": "eager"}


def make_hf(kind: Any = LlamaForCausalLM, seed: int = 1, **config: Any) -> Any:
    """A small network with random weights; config overrides SIZES."""
    torch.manual_seed(seed)
    model = kind(LlamaConfig(**{**SIZES, **RANDOM, **config}))
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def save_hf(model: Any, directory: Path, **saving: Any) -> Any:
    """Save a network as transformers does, with the embedded tokenizer."""
    model.save_pretrained(directory, **saving)
    shutil.copy(TINY / "tokenizer.model", directory)
    return model


def of_paired_tensors(tensors: Mapping[str, torch.Tensor], **config: Any) -> LlamaForCausalLM:
    """A network of tensors whose rotary pairs lie side by side, as Meta's do.

    In transformers they lie half a head apart.
    """
    network = make_hf(**config)
    state = dict(tensors)
    for name, tensor in tensors.items():
        if "q_proj" in name or "k_proj" in name:
            pairs = tensor.unflatten(0, (-1, network.config.head_dim // 2, 2))
            state[name] = pairs.transpose(1, 2).flatten(0, 2)
    if network.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    network.load_state_dict(state)
    network.generation_config.eos_token_id = None
    return network


# Meta's names and transformers'.
NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "tok_embeddings": "model.embed_tokens",
    "output": "lm_head",
    "norm": "model.norm",
}


def as_transformers(model: Transformer, **more: Any) -> LlamaForCausalLM:
    """The same network in transformers; ``more`` overrides its configuration."""
    args = model.params
    tensors = {}
    for name, parameter in model.named_parameters():
        *layer, part = name.removesuffix(".weight").split(".", 2 if name[:6] == "layers" else 0)
        prefix = f"model.layers.{layer[1]}." if layer else ""
        tensors[f"{prefix}{NAMES[part]}.weight"] = parameter.detach()
    config = {
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.kv_heads,
        "vocab_size": args.vocab_size,
        "rms_norm_eps": args.norm_eps,
        "max_position_embeddings": args.max_seq_len,
        "rope_parameters": {"rope_type": "default", "rope_theta": args.rope_theta},
    }
    return of_paired_tensors(tensors, **{"tie_word_embeddings": False, **config, **more})


def write_adapter(
    reference: Any, directory: Path, options: dict[str, Any], seed: int = 1, **saving: Any
) -> PeftModel:
    """Save an adapter of a network, in which all that it trains has values that matter."""
    torch.manual_seed(0)
    model = get_peft_model(reference, LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **options}))
    generator = torch.Generator().manual_seed(seed)
    parts = ("lora_", "modules_to_save", "trainable_tokens_delta")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in parts):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(directory, **saving)
    return model.eval()
