"""``Llama.build`` on adapters, formats and chat formats: what each part gives reaches the user."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import follow_script
from hf_files import make_hf, save_hf, write_adapter
from transformers import AutoModelForCausalLM

from llama import Llama
from llama.chat.formats import FORMATS
from llama.checkpoint import apply_adapter, open_checkpoint
from llama.checkpoint.params import make_args
from llama.checkpoint.sharding import full_shapes, split_dim
from llama.convert import convert
from llama.generation import TINY

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import weights

TOKENS = torch.randint(3, 768, (2, 20), generator=torch.Generator().manual_seed(2))
DIALOG = [{"role": "user", "content": "What does the cow say?"}]


def build(path: Path, **more: object) -> Llama:
    return Llama.build(path, device="cpu", dtype=torch.float32, **more)


MODULES = ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A base and two adapters, and transformers' logits with both merged in."""
    directory = tmp_path_factory.mktemp("adapted")
    model = make_hf(tie_word_embeddings=False)
    for parameter in model.parameters():  # the GGUF file is in bfloat16
        parameter.data = parameter.data.bfloat16().float()
    save_hf(model, directory / "base")
    for seed, name in enumerate(("first", "second")):
        adapted = write_adapter(model, directory / name, {"target_modules": MODULES}, seed)
        model = adapted.merge_and_unload()
    with torch.inference_mode():
        return directory, model(TOKENS).logits


def test_adapters_reach_every_base_format(adapted, tmp_path: Path) -> None:
    directory, expected = adapted
    convert(str(directory / "base"), str(tmp_path / "meta"), model_parallel_size=2)
    source = open_checkpoint(directory / "base")
    args = make_args(source.params, source.source, 768)
    tensors = {n: source.rank_part(n, args, 0, 1).bfloat16() for n in full_shapes(args)}
    weights.write_gguf(args, tensors, tmp_path / "base.gguf")
    adapters = [directory / "first", str(directory / "second")]
    for base in (directory / "base", tmp_path / "meta", tmp_path / "base.gguf"):
        llama = build(base, adapter=adapters, tokenizer_path=TINY / "tokenizer.model")
        torch.testing.assert_close(llama.model.forward(TOKENS), expected, atol=1e-4, rtol=0)
    one = build(directory / "base", adapter=directory / "first").model.forward(TOKENS)
    assert (one - expected).abs().max() > 0.1  # the second one matters


@pytest.mark.parametrize("to", ["meta", "hf"])
def test_convert_merges_adapters(adapted, tmp_path: Path, to: str) -> None:
    directory, expected = adapted
    adapters = (str(directory / "first"), str(directory / "second"))
    convert(str(directory / "base"), str(tmp_path / "out"), to, adapter=adapters)
    found = build(tmp_path / "out").model.forward(TOKENS)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    if to == "hf":
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        with torch.inference_mode():
            torch.testing.assert_close(theirs(TOKENS).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_rank_gets_its_part_of_the_merged_weights(adapted, ranks: int) -> None:
    directory, _ = adapted
    source = apply_adapter(open_checkpoint(directory / "base"), directory / "first")
    args = make_args(source.params, source.source, 768)
    for name in full_shapes(args):
        whole, dim = source.rank_part(name, args, 0, 1), split_dim(name)
        parts = [source.rank_part(name, args, rank, ranks) for rank in range(ranks)]
        if dim is not None and name.split(".")[-2] in ("wk", "wv") and ranks > args.kv_heads:
            parts = parts[:: ranks // args.kv_heads]
        assert torch.equal(parts[0] if dim is None else torch.cat(parts, dim), whole), name


@pytest.mark.parametrize("name", ["vicuna", "alpaca", "inst"])
def test_a_chat_format_is_chosen_by_name(name: str) -> None:
    llama = build(TINY, chat_format=name)
    prompt = llama.chat.prompt(llama.tokenizer, DIALOG)
    assert prompt == FORMATS[name].prompt(llama.tokenizer, DIALOG)
    assert (prompt == build(TINY).chat.prompt(llama.tokenizer, DIALOG)) == (name == "inst")


def test_unknown_chat_formats_are_refused_with_those_known() -> None:
    with pytest.raises(ValueError, match="chat_format is 'llama4': known are inst, turn-based,"):
        build(TINY, chat_format="llama4")


def test_a_formats_stop_strings_end_an_answer_whole_and_streamed(monkeypatch) -> None:
    llama = build(TINY, chat_format="korani")
    ids = llama.tokenizer.encode("It says moo.\n### Human: And", bos=False, eos=False)
    for stream in (False, True):
        script = iter(ids)
        follow_script(monkeypatch, script)
        if stream:
            assert "".join(llama.chat_completion_stream(DIALOG)) == "It says moo."
        else:
            answer = llama.chat_completion([DIALOG])[0]["generation"]
            assert answer == {"role": "assistant", "content": "It says moo."}
