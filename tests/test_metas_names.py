"""Scripts that were written for Meta's repositories find the names where they were."""

from importlib import import_module

import pytest
import torch

NAMES = {
    "llama": "Llama Dialog Message Transformer ModelArgs Tokenizer",
    "llama.generation": (
        "Llama Dialog Message Role CompletionPrediction ChatPrediction InfillingPrediction "
        "sample_top_p B_INST E_INST B_SYS E_SYS SPECIAL_TAGS UNSAFE_ERROR dialog_prompt_tokens "
        "infilling_prompt_tokens"
    ),
    "llama.model": (
        "ModelArgs Transformer TransformerBlock Attention FeedForward RMSNorm precompute_freqs_cis "
        "apply_rotary_emb"
    ),
    "llama.tokenizer": "Tokenizer",
}


@pytest.mark.parametrize("module", NAMES)
def test_names_are_where_meta_has_them(module: str) -> None:
    for name in NAMES[module].split():
        assert hasattr(import_module(module), name), f"{module}.{name} can't be imported"


def test_sample_top_p_takes_metas_two_arguments() -> None:
    from llama.generation import sample_top_p

    probs = torch.tensor([[0.5, 0.3, 0.1, 0.1]]).expand(200, 4)
    assert set(sample_top_p(probs, 0.6).tolist()) == {0, 1}
