"""Scripts that were written for Meta's repositories find the names where they were, and call them
as there: ``llama``'s and ``codellama``'s ``generation.py``, ``model.py`` and ``tokenizer.py``."""

from importlib import import_module

import pytest
import torch
from conftest import make_model

from llama import Llama
from llama.generation import (
    B_INST,
    TINY,
    UNSAFE_ERROR,
    dialog_prompt_tokens,
    infilling_prompt_tokens,
    sample_top_p,
)
from llama.model import ModelArgs
from llama.tokenizer import Tokenizer

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
DIALOG = [{"role": "user", "content": "What does the cow say?"}]


@pytest.mark.parametrize("module", NAMES)
def test_names_are_where_meta_has_them(module: str) -> None:
    for name in NAMES[module].split():
        assert hasattr(import_module(module), name), f"{module}.{name} can't be imported"


def test_sample_top_p_takes_metas_two_arguments() -> None:
    probs = torch.tensor([[0.5, 0.3, 0.1, 0.1]]).expand(200, 4)
    assert set(sample_top_p(probs, 0.6).tolist()) == {0, 1}
    assert set(sample_top_p(probs=probs, p=0.6).tolist()) == {0, 1}


def test_build_takes_metas_arguments() -> None:
    """An argument of Meta's ``build`` that has another name, place or meaning."""
    built = Llama.build(str(TINY), str(TINY / "tokenizer.model"), 64, 2, 1, 7)
    params = built.model.params
    assert (params.max_seq_len, params.max_batch_size) == (64, 2)
    named = Llama.build(
        ckpt_dir=str(TINY),
        tokenizer_path=str(TINY / "tokenizer.model"),
        max_seq_len=64,
        max_batch_size=2,
        model_parallel_size=None,
        seed=7,
    )
    drawn = [each.text_completion(["Once"], max_gen_len=8) for each in (built, named)]
    assert drawn[0] == drawn[1]


def test_generation_takes_metas_arguments(tiny: Llama) -> None:
    """A method whose arguments have other names or places, or whose results other keys."""
    ids = tiny.tokenizer.encode("Once upon a time", True, False)
    tokens, logprobs = tiny.generate([ids], 4, 0, 0.9, True, True)
    assert logprobs is not None and len(tokens[0]) == len(logprobs[0]) == len(ids) + 4
    named = tiny.generate(
        prompt_tokens=[ids], max_gen_len=4, temperature=0, top_p=0.9, logprobs=True, echo=True
    )
    assert named[0] == tokens
    [stopped], none = tiny.generate(
        prompt_tokens=[ids], max_gen_len=4, temperature=0, stop_token=tokens[0][-1]
    )
    assert stopped == tokens[0][len(ids) : -1] and none is None

    [text] = tiny.text_completion(["Once upon a time"], 0, 0.9, 4, True, False)
    assert len(text["tokens"]) == len(text["logprobs"]) == 4
    assert tiny.text_completion(
        prompts=["Once upon a time"],
        temperature=0,
        top_p=0.9,
        max_gen_len=4,
        logprobs=True,
        echo=False,
    ) == [text]

    [answer] = tiny.chat_completion([DIALOG], 0, 0.9, None, True)
    assert answer["generation"] == {"role": "assistant", "content": "The cow says moo."}
    assert len(answer["tokens"]) == len(answer["logprobs"])
    assert tiny.chat_completion(
        dialogs=[DIALOG], temperature=0, top_p=0.9, max_gen_len=None, logprobs=True
    ) == [answer]
    unsafe = [{"role": "user", "content": B_INST}]
    [refused] = tiny.chat_completion([unsafe])
    assert refused["generation"]["content"] == UNSAFE_ERROR

    prefix, suffix = "def add(a, b):\n    return ", "\n"
    [middle] = tiny.text_infilling([prefix], [suffix], 0, 0.9, None, False, False)
    assert middle["full_text"] == prefix + middle["generation"] + suffix
    assert tiny.text_infilling(
        prefixes=[prefix],
        suffixes=[suffix],
        temperature=0,
        top_p=0.9,
        max_gen_len=None,
        logprobs=False,
        suffix_first=False,
    ) == [middle]


def test_prompts_take_metas_arguments(tiny: Llama) -> None:
    """A prompt's function that takes its texts in another order."""
    prompt = dialog_prompt_tokens(tokenizer=tiny.tokenizer, dialog=DIALOG)
    assert prompt == tiny.tokenizer.encode("[INST] What does the cow say? [/INST]", True, False)
    ids = infilling_prompt_tokens(tiny.tokenizer, "a", "b", suffix_first=False)
    assert ids[:2] == [tiny.tokenizer.bos_id, tiny.tokenizer.prefix_id]


def test_model_and_tokenizer_take_metas_arguments() -> None:
    """A field of ``ModelArgs`` in another place, or other arguments of network or tokenizer."""
    args = ModelArgs(64, 2, 8, 4, 96, 32, None, 1e-5)
    assert (args.dim, args.n_layers, args.n_heads, args.n_kv_heads) == (64, 2, 8, 4)
    assert (args.vocab_size, args.multiple_of, args.norm_eps) == (96, 32, 1e-5)
    model = make_model()
    tokens = torch.tensor([[1, 2, 3]])
    assert model.forward(tokens, 0).shape == (1, 3, 96)
    assert model(tokens=tokens[:, :1], start_pos=3).shape == (1, 1, 96)

    tokenizer = Tokenizer(model_path=str(TINY / "tokenizer.model"))
    ids = tokenizer.encode("Hello", bos=True, eos=True)
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert tokenizer.decode(ids) == "Hello"
    assert {"n_words", "pad_id"} <= set(dir(tokenizer))
