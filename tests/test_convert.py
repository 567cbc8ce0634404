"""``python -m llama.convert``: nothing lost on the way there and back, nothing overwritten."""

import json
from pathlib import Path

import pytest
import torch
from conftest import make_model
from processes import forked
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from llama import Llama
from llama.checkpoint import open_checkpoint, save_hf
from llama.checkpoint.save import reshard, save
from llama.convert import convert
from llama.generation import TINY
from llama.rope import rope_factors

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 8,
    "attention_factor": 1.5,
    "truncate": False,
}
LONG = {
    "rope_type": "longrope",
    "factor": 2.0,
    "short_factor": [1.0, 1.25, 1.5, 2.0],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 512,
}
VARIANTS = {
    "gqa": {"n_kv_heads": 2},
    "mha, 801 pieces": {"vocab_size": 801},
    "wide heads": {"head_dim": 16, "hidden_dim": 100, "n_kv_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 5e5},
    "llama3": {"rope_scaling": LLAMA3},
    "classifier": {"labels": ["good", "bad", "ugly"]},
    "biases": {"attention_bias": True, "mlp_bias": True, "n_kv_heads": 2},
    "yarn": {"rope_scaling": YARN},
    "longrope": {"rope_scaling": LONG},
    "dynamic": {
        "rope_scaling": {
            "rope_type": "dynamic",
            "factor": 2.0,
            "original_max_position_embeddings": 512,
        }
    },
}


def saved(directory: Path, dtype: torch.dtype | None = None, **params: object) -> Path:
    """A random checkpoint in Meta's layout."""
    model = make_model(**{"vocab_size": 768, **params})
    files = {"tokenizer.model": TINY / "tokenizer.model"}
    save([model.state_dict()], model.params, directory, files=files, dtype=dtype)
    return directory


def same_files(a: Path, b: Path) -> bool:
    ours, theirs = (torch.load(path / "consolidated.00.pth") for path in (a, b))
    same = all(torch.equal(ours[name], theirs[name]) for name in ours)
    return same and ours.keys() == theirs.keys()


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_loads_what_was_written_and_the_way_back_is_exact(
    tmp_path: Path, variant: str
) -> None:
    meta = saved(tmp_path / "meta", **VARIANTS[variant])
    convert(str(meta), str(tmp_path / "hf"), "hf")
    convert(str(tmp_path / "hf"), str(tmp_path / "back"), "meta", model_parallel_size=2)
    reshard(str(tmp_path / "back"), str(tmp_path / "whole"))
    assert same_files(meta, tmp_path / "whole")
    params = [json.loads((path / "params.json").read_text()) for path in (meta, tmp_path / "whole")]
    for key in ("rope_scaling", "attention_bias", "mlp_bias"):
        assert params[0].get(key) == params[1].get(key)

    model = Llama.build(meta, device="cpu", dtype=torch.float32).model
    labels = VARIANTS[variant].get("labels")
    kind = AutoModelForCausalLM if labels is None else AutoModelForSequenceClassification
    theirs = kind.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    tokens = torch.randint(0, 768, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if labels is None:
            torch.testing.assert_close(
                model.forward(tokens), theirs(tokens).logits, atol=1e-4, rtol=0
            )
        else:
            theirs.config.pad_token_id = 3  # it asks for one where it is given a batch
            last = model.forward(tokens, positions=[-1])[:, 0]
            torch.testing.assert_close(last, theirs(tokens).logits, atol=1e-4, rtol=0)
            assert theirs.config.id2label == dict(enumerate(labels))


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    convert(str(TINY), str(tmp_path / "hf"), "hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    llama = Llama.build(tmp_path / "hf", device="cpu", dtype=torch.float32)
    text = "Once upon a time there was a red fox."
    assert theirs.encode(text) == llama.tokenizer.encode(text, bos=True, eos=False)
    ours = Llama.build(device="cpu", dtype=torch.float32)
    dialog = [{"role": "user", "content": "What does the cow say?"}]
    told = [{"role": "system", "content": "Be brief."}, *dialog]
    for some in (dialog, told, [*told, {"role": "assistant", "content": "Moo."}, *dialog]):
        ids = theirs.apply_chat_template(some, tokenize=True, return_dict=False)
        assert ids == ours.chat.prompt(ours.tokenizer, some)
    answers = [m.chat_completion([dialog], temperature=0) for m in (llama, ours)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("to", ["meta", "hf"])
def test_dtypes(tmp_path: Path, dtype: str | None, to: str) -> None:
    meta = saved(tmp_path / "meta", torch.bfloat16)
    convert(str(meta), str(tmp_path / "out"), to, dtype=dtype)
    name = "consolidated.00.pth" if to == "meta" else "model.safetensors"
    path = tmp_path / "out" / name
    tensors = torch.load(path) if to == "meta" else load_file(path)
    expected = getattr(torch, dtype or "bfloat16")
    assert {tensor.dtype for tensor in tensors.values()} == {expected}
    assert open_checkpoint(tmp_path / "out").dtype == expected


def test_large_models_are_split_and_the_index_names_every_tensor(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(save_hf, "SHARD_BYTES", 200_000)
    meta = saved(tmp_path / "meta")
    convert(str(meta), str(tmp_path / "hf"), "hf")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert all((tmp_path / "hf" / file).stat().st_size < 210_000 for file in files)
    convert(str(tmp_path / "hf"), str(tmp_path / "back"))
    assert same_files(meta, tmp_path / "back")


def test_llama3s_factors_are_recognised_and_others_listed(tmp_path: Path) -> None:
    """A failure means that a GGUF file's table of factors gets lost on the way to transformers."""
    published = {**LLAMA3, "original_max_position_embeddings": 8192}
    model = make_model(rope_scaling=published, rope_theta=5e5, head_dim=64)
    factors = rope_factors(model.params).tolist()
    params = {"rope_scaling": {"rope_type": "factors", "factors": factors}, "head_dim": 64}
    meta = saved(tmp_path / "meta", rope_theta=5e5, **params)
    convert(str(meta), str(tmp_path / "hf"), "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["rope_scaling"] == published
    params["rope_scaling"]["factors"][0] = 1.5
    other = saved(tmp_path / "other", rope_theta=5e5, **params)
    convert(str(other), str(tmp_path / "listed"), "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "listed", dtype=torch.float32).eval()
    tokens = torch.arange(3, 100)[None]
    for directory in (other, tmp_path / "listed"):
        model = Llama.build(directory, device="cpu", dtype=torch.float32).model
        with torch.no_grad():
            torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_the_command_line(tmp_path: Path) -> None:
    done = forked("-m", "llama.convert", str(TINY), str(tmp_path / "hf"), "--to", "hf")
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"wrote {tmp_path / 'hf'}\n"
    with pytest.raises((OSError, ValueError), match="already exists: give another name or remove"):
        convert(str(TINY), str(tmp_path / "hf"), to="hf")


def test_mistakes_leave_nothing_behind(tmp_path: Path, monkeypatch) -> None:
    for arguments, message in (
        ({"to": "gguf"}, "to is 'gguf': expected 'meta' or 'hf'"),
        ({"dtype": "int3"}, "dtype is 'int3': expected float32"),
        ({"to": "hf", "model_parallel_size": 2}, "leave it out with --to hf"),
        ({"model_parallel_size": 3}, "3 parts can't be made"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(str(TINY), str(tmp_path / "out"), **arguments)
    monkeypatch.setattr(save_hf, "from_interleaved", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(str(TINY), str(tmp_path / "out"), "hf")
    assert list(tmp_path.iterdir()) == []
