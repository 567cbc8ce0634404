"""Networks of Llama's kind that differ a little: their logits are those of transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_files import make_hf, save_hf

from llama import Llama

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.25, 1.5, 2.0],
    "long_factor": [2.0, 3.0, 4.0, 8.0],
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "attention bias": {"attention_bias": True},
    "feed-forward bias": {"mlp_bias": True},
    "all biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "one key head with biases": {"attention_bias": True, "num_key_value_heads": 1},
    "yarn": {"rope_parameters": YARN},
    "yarn of wide heads": {"rope_parameters": YARN, "head_dim": 32},
    "yarn between pairs": {"rope_parameters": {**YARN, "truncate": False}, "head_dim": 32},
    "yarn's bounds": {"rope_parameters": {**YARN, "beta_fast": 8, "beta_slow": 2}, "head_dim": 32},
    "yarn's attention": {"rope_parameters": {**YARN, "attention_factor": 1.5}},
    "yarn's mscale": {"rope_parameters": {**YARN, "mscale": 1.5, "mscale_all_dim": 0.5}},
    "yarn by its length": {"rope_parameters": {**YARN, "factor": None}},
    "longrope": {"rope_parameters": LONG},
    "longrope's attention": {"rope_parameters": {**LONG, "attention_factor": 0.75}},
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    },
}
TOKENS = torch.randint(0, 760, (2, 100), generator=torch.Generator().manual_seed(1))


def write(directory: Path, make: Callable[..., Any] = make_hf, **config: Any) -> Any:
    """Save a small network as transformers does, biases that matter included."""
    model = make(**config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.5, generator=generator)
    return save_hf(model, directory)


def build(directory: Path, **options: Any) -> Llama:
    options = {"device": "cpu", "dtype": torch.float32, "max_seq_len": 128, **options}
    llama = Llama.build(directory, **options)
    llama.tokenizer.stop_ids = frozenset()
    return llama


def change(directory: Path, **values: object) -> None:
    """Change keys of ``config.json``; a value of ``...`` takes the key out."""
    path = directory / "config.json"
    data = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))


def logits_of(reference: Any) -> torch.Tensor:
    with torch.inference_mode():
        return reference(TOKENS).logits


def assert_same(llama: Llama, expected: torch.Tensor, atol: float = 1e-4) -> None:
    """Logits of whole texts, and of texts that are read in pieces and token by token."""
    torch.testing.assert_close(llama.model(TOKENS), expected, atol=atol, rtol=1e-4)
    llama.model(TOKENS[:, :30])
    llama.model(TOKENS[:, 30:98], 30)
    last = torch.cat([llama.model(TOKENS[:, i : i + 1], i) for i in (98, 99)], dim=1)
    torch.testing.assert_close(last, expected[:, 98:], atol=atol, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(variant: str, tmp_path: Path) -> None:
    """A failure means that a network that transformers runs is refused, or answers otherwise."""
    reference = write(tmp_path, **VARIANTS[variant])
    assert_same(build(tmp_path), logits_of(reference))
