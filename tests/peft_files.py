"""Bases of adapters: networks of transformers, and the same in this library's form."""

from pathlib import Path
from typing import Any

import torch
from hf_files import make_hf
from peft import PeftModel, PromptLearningConfig, get_peft_model
from transformers import LlamaForCausalLM

from llama import ModelArgs, Transformer, parallel
from llama.checkpoint import open_checkpoint
from llama.checkpoint.base import Checkpoint
from llama.checkpoint.hf_names import is_rotary, meta_name, to_interleaved
from llama.checkpoint.load import load
from llama.checkpoint.params import make_args
from llama.checkpoint.save import save

HEAD_DIM, VOCABULARY = 8, 50
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
}
TOKENS = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(5))

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FFN = ["gate_proj", "up_proj", "down_proj"]

# Settings of adapters.
VARIANTS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ATTENTION},
    "feed_forward": {"target_modules": FFN, "lora_alpha": 3},
    "all_linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*layers\.1\..*(q|down)_proj"},
    "embedding_and_output": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "patterns": {
        "target_modules": ATTENTION + FFN,
        "rank_pattern": {"k_proj": 2, r"layers\.1\.mlp.*": 6, "model.layers.0.mlp.up_proj": 3},
        # Of several that match the first counts, and PEFT sorts them when it saves.
        "alpha_pattern": {r".*\.0\.self_attn\..*": 5, "^self_attn.v_proj": 100, "q_proj": 20},
    },
    "rslora": {
        "target_modules": ATTENTION,
        "use_rslora": True,
        "rank_pattern": {"v_proj": 8},
        "lora_alpha": 6.5,
    },
    "gaussian": {"target_modules": ATTENTION, "init_lora_weights": "gaussian"},
    "saved_modules": {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved_norms": {"target_modules": ["v_proj"], "modules_to_save": ["norm", "layernorm"]},
    "saved_queries": {"target_modules": ["v_proj"], "modules_to_save": ["q_proj", "k_proj"]},
    "one_layer": {"target_modules": ATTENTION, "layers_to_transform": [1]},
    "layers_pattern": {
        "target_modules": ATTENTION,
        "layers_to_transform": 0,
        "layers_pattern": "layers",
    },
    "exclusion": {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
    "tokens": {"target_modules": ["v_proj"], "trainable_token_indices": [7, 3, 40]},
    "tokens_of_both": {
        "target_modules": ["v_proj"],
        "trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [9]},
    },
    "unused_bias": {"target_modules": ATTENTION, "bias": "all"},
    "saved_feed_forward": {"target_modules": ["v_proj"], "modules_to_save": ["mlp"]},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "dora_of_patterns": {
        "target_modules": ATTENTION + FFN,
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {"k_proj": 2, r"layers\.1\.mlp.*": 6},
        "alpha_pattern": {"q_proj": 20},
    },
    "dora_of_embedding_and_output": {
        "target_modules": ["q_proj", "embed_tokens", "lm_head"],
        "use_dora": True,
    },
}

BIASED: dict[str, tuple[dict[str, Any], bool]] = {
    "all": ({"target_modules": ATTENTION, "bias": "all"}, True),
    "of_targets": ({"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"}, True),
    "of_factors": ({"target_modules": ATTENTION + FFN, "lora_bias": True}, True),
    "of_factors_alone": ({"target_modules": ["q_proj", "o_proj"], "lora_bias": True}, False),
    "saved": ({"target_modules": ["v_proj"], "modules_to_save": ["q_proj", "mlp"]}, True),
    "dora": ({"target_modules": "all-linear", "use_dora": True, "bias": "all"}, True),
}

TIED: dict[str, tuple[dict[str, Any], bool]] = {
    "neither": ({"target_modules": ["q_proj"]}, True),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, False),
    "output": ({"target_modules": ["q_proj", "lm_head"]}, False),
    "both": ({"target_modules": ["embed_tokens", "lm_head"]}, False),
    "kept": ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, True),
    "saved_embedding": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
    "saved_output": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
    "saved_and_kept": (
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
        True,
    ),
    "tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": [7, 3]}, True),
    "dora": ({"target_modules": ["embed_tokens"], "use_dora": True}, False),
    "dora_kept": (
        {"target_modules": ["embed_tokens"], "use_dora": True, "ensure_weight_tying": True},
        False,
    ),
    "other_tokens": (
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [3, 8]},
        },
        False,
    ),
}


def make_reference(
    kind: Any = LlamaForCausalLM, tied: bool = False, labels: int = 2, biased: bool = False
) -> Any:
    biases = {"attention_bias": biased, "mlp_bias": biased}
    reference = make_hf(kind, 0, **SIZES, tie_word_embeddings=tied, num_labels=labels, **biases)
    generator = torch.Generator().manual_seed(6)
    for name, parameter in reference.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_(std=0.2, generator=generator)
    return reference


def write_base(reference: LlamaForCausalLM, directory: Path, shards: int = 1) -> Path:
    config = reference.config
    tied = config.tie_word_embeddings
    tensors = {}
    for name, tensor in reference.state_dict().items():
        module, _, part = name.rpartition(".")
        meta = str(meta_name(module))
        if meta == "output" and tied:
            continue
        tensor = to_interleaved(tensor, HEAD_DIM) if is_rotary(meta) else tensor
        tensors[f"{meta}.{part}"] = tensor
    args = ModelArgs(
        dim=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        hidden_dim=config.intermediate_size,
        vocab_size=VOCABULARY,
        norm_eps=config.rms_norm_eps,
        tie_word_embeddings=tied,
        attention_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
    )
    save([tensors], args, directory, shards)
    return directory


def load_float32(checkpoint: Checkpoint) -> Transformer:
    parallel.initialize(torch.device("cpu"))
    args = make_args(checkpoint.params, checkpoint.source, 0, 16, 2)
    return load(checkpoint, args, torch.device("cpu"), torch.float32)


def open_model(directory: Path) -> Transformer:
    """The network of a checkpoint, in float32."""
    return load_float32(open_checkpoint(directory))


def logits(checkpoint: Checkpoint, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    return load_float32(checkpoint)(tokens, 0)


def expected_logits(model: PeftModel, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokens).logits


def write_virtual_tokens(
    reference: Any, directory: Path, config: PromptLearningConfig, seed: int = 1
) -> PeftModel:
    """Save an adapter that puts virtual tokens in front of a network's prompts."""
    torch.manual_seed(seed)
    model = get_peft_model(reference, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(directory)
    return model.eval()
