"""Bases of adapters: networks of transformers, and the same in this library's form."""

from pathlib import Path
from typing import Any

import torch
from hf_files import make_hf
from peft import PeftModel
from transformers import LlamaForCausalLM

from llama import ModelArgs, parallel
from llama.checkpoint.base import Checkpoint
from llama.checkpoint.hf import is_rotary, meta_name, to_interleaved
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


def logits(checkpoint: Checkpoint, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    parallel.initialize(torch.device("cpu"))
    args = make_args(checkpoint.params, checkpoint.source, 0, 16, 2)
    return load(checkpoint, args, torch.device("cpu"), torch.float32)(tokens, 0)


def expected_logits(model: PeftModel, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokens).logits
