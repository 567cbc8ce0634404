"""Networks of Llama's kind that differ a little: their logits are those of transformers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_files import RANDOM, SIZES, make_hf, save_hf
from processes import forked, script
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from llama import Llama, Transformer
from llama.checkpoint import open_checkpoint
from llama.checkpoint.hf_names import from_interleaved, hf_name, is_rotary
from llama.checkpoint.pretrained import fit_tokenizer
from llama.checkpoint.sharding import parameter_count, weight_bytes
from llama.convert import convert
from llama.layers.linear import ParallelLinear

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


def with_weights_of(model: Transformer, reference: Any) -> Any:
    """The network of transformers with the weights, not the biases, of a quantised one."""
    words = torch.arange(model.params.vocab_size)
    reference.get_input_embeddings().weight.data = model.tok_embeddings(words)
    for name, module in model.named_modules():
        if isinstance(module, ParallelLinear):
            weight = module.plain_weight()
            if is_rotary(name):
                weight = from_interleaved(weight, model.params.head_dim)
            reference.get_submodule(hf_name(name)).weight.data = weight
    return reference


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
    llama = build(tmp_path)
    assert_same(llama, logits_of(reference))
    count = sum({p.data_ptr(): p.numel() for p in llama.model.parameters()}.values())
    assert parameter_count(llama.model.params) == count
    assert weight_bytes(llama.model.params, torch.float32) == 4 * count


def test_mistral_without_a_sliding_window_is_a_llama(tmp_path: Path) -> None:
    """A failure means that a Mistral is refused, or runs without the window that it has."""

    def make(**config: Any) -> Any:
        sizes = {**SIZES, **RANDOM, "sliding_window": None, **config}
        torch.manual_seed(1)
        return MistralForCausalLM(MistralConfig(**sizes)).eval()

    reference = write(tmp_path, make, num_attention_heads=16, num_key_value_heads=8)
    assert_same(build(tmp_path), logits_of(reference))
    change(tmp_path, num_key_value_heads=...)  # transformers' default is another one than Llama's
    assert_same(build(tmp_path), logits_of(reference))
    for window in (16, 4096, 0, "wide", ...):
        change(tmp_path, sliding_window=window)
        with pytest.raises(ValueError, match=r"has a sliding_window of .*reads all of a text"):
            build(tmp_path)


def test_a_network_without_a_head_embeds(tmp_path: Path) -> None:
    """A failure means that LlamaModel's files don't load, or that a text is drawn from nothing."""
    network = write(tmp_path / "hf").model
    shutil.rmtree(tmp_path / "hf")
    save_hf(network, tmp_path / "hf")
    for path in (tmp_path / "hf", tmp_path / "meta", tmp_path / "back"):
        if path.name != "hf":
            earlier = path.with_name({"meta": "hf", "back": "meta"}[path.name])
            convert(str(earlier), str(path), "meta" if path.name == "meta" else "hf")
        for options in ({}, {"quantize": "int8"}):
            llama = build(path, **options)
            ids = llama.tokenizer.encode("a red fox", bos=True, eos=False)
            with torch.inference_mode():
                states = network(torch.tensor([ids])).last_hidden_state
            found = llama.embed(["a red fox"], "last")[0]
            assert torch.nn.functional.cosine_similarity(found, states[0, -1], dim=0) > 0.99
            for call in (llama.generate, llama.text_completion):
                with pytest.raises(ValueError, match=r"embeds \(it has no head\) and writes no"):
                    call([ids], max_gen_len=4)
        with pytest.raises(ValueError, match="has no labels"):
            llama.classify(["a"])
        with pytest.raises(ValueError, match="this network has no head"):
            llama.model(torch.tensor([ids]))
    theirs = AutoModel.from_pretrained(tmp_path / "back", attn_implementation="eager")
    assert theirs(TOKENS).last_hidden_state.equal(network(TOKENS).last_hidden_state)


def test_a_head_of_its_own_beside_a_tied_embedding_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A failure means that a head that was trained after all is dropped without a word."""
    reference = write(tmp_path, tie_word_embeddings=True)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding.clone()}, path, metadata={"format": "pt"})
    llama = build(tmp_path)
    assert llama.model.params.tie_word_embeddings and not caplog.records
    assert_same(llama, logits_of(reference))

    head = embedding.clone()
    head[-1, -1] += 1  # a little is enough
    save_file({**tensors, "lm_head.weight": head}, path, metadata={"format": "pt"})
    llama = build(tmp_path)
    assert not llama.model.params.tie_word_embeddings
    assert "lm_head.weight differs from the embedding" in caplog.text
    assert_same(llama, logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)))

    del tensors["model.embed_tokens.weight"]  # the one that is left stands for both
    save_file({**tensors, "lm_head.weight": embedding}, path, metadata={"format": "pt"})
    assert_same(build(tmp_path), logits_of(reference))


@pytest.mark.parametrize("stated", ["bfloat16", "float32", None])
@pytest.mark.parametrize("wide", ["embedding", "rest"])
def test_mixed_dtypes(
    wide: str, stated: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A failure means that one tensor decides the dtype of all, or that rounding goes untold."""
    write(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        is_embedding = name == "model.embed_tokens.weight"
        tensors[name] = tensor if is_embedding == (wide == "embedding") else tensor.bfloat16()
    save_file(tensors, path, metadata={"format": "pt"})
    change(tmp_path, dtype=stated or ...)
    most = "bfloat16" if wide == "embedding" else "float32"
    expected = getattr(torch, stated or most)
    assert open_checkpoint(tmp_path).dtype == expected
    if stated is not None:
        assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == expected
    assert ("are wider, such as" in caplog.text) == (expected == torch.bfloat16)
    exact = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same(build(tmp_path), logits_of(exact))  # the caller's dtype rounds nothing


@pytest.mark.parametrize("dtype", ["fp16", 16, ["float32"]])
def test_a_dtype_that_no_weights_have(
    dtype: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A failure means that a wrong word refuses sound weights, or that nobody learns of it."""
    write(tmp_path)
    change(tmp_path, dtype=dtype)
    assert open_checkpoint(tmp_path).dtype == torch.float32
    assert "which is none of float32, float16, bfloat16, float64" in caplog.text


WRAPPED = (
    "_orig_mod.{}",
    "module.{}",
    "module._orig_mod.{}",
    "base_model.model.{}",
    "model.{}",
    "_orig_mod.module.model.{}",
)


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_wrapped_names(wrapped: str, tmp_path: Path) -> None:
    """A failure means that what torch.compile, DDP, PEFT or Lightning saved is refused."""
    reference = write(tmp_path / "hf", attention_bias=True)
    convert(str(tmp_path / "hf"), str(tmp_path / "meta"))
    tensors = load_file(tmp_path / "hf/model.safetensors")
    named = {wrapped.format(name): tensor for name, tensor in tensors.items()}
    save_file(named, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    tensors = torch.load(tmp_path / "meta/consolidated.00.pth")
    inner = {name.replace(".attention", "._orig_mod.attention"): t for name, t in tensors.items()}
    named = {wrapped.format(name): tensor for name, tensor in inner.items()}
    torch.save(named, tmp_path / "meta/consolidated.00.pth")
    for path in (tmp_path / "hf", tmp_path / "meta"):
        assert_same(build(path), logits_of(reference))
    torch.save({**named, "norm.weight": torch.ones(64)}, tmp_path / "meta/consolidated.00.pth")
    with pytest.raises(ValueError, match="some tensors twice, under two names"):
        build(tmp_path / "meta")


def test_a_whole_file_beside_a_stale_index(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A failure means that files of an older download stand in the way of the present ones."""
    reference = write(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    stale = {"model.norm.weight": "model-00001-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": stale}))
    assert_same(build(tmp_path), logits_of(reference))
    assert f"{index} is ignored" in caplog.text


def test_an_embedding_smaller_than_the_tokenizer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A failure means that ids without an embedding reach the network, or that it is refused."""
    reference = write(tmp_path / "hf", vocab_size=760)
    llama = build(tmp_path / "hf")
    assert (
        "has 768 pieces" in caplog.text and "text that needs the others is refused" in caplog.text
    )
    assert_same(llama, logits_of(reference))
    assert max(llama.generate([[1, 5]], 40, temperature=1.0, seed=1)[0][0]) < 760
    text = llama.tokenizer.sp_model.id_to_piece(767).replace("▁", " ")
    with pytest.raises(ValueError, match=r"holds the token id 76\d, outside the vocabulary of 760"):
        llama.text_completion([text * 3])
    with pytest.raises(ValueError, match="the token id 765, outside the vocabulary of 760"):
        llama.generate([[1, 5]], 1, logit_bias={765: 1.0})
    write(tmp_path / "300", vocab_size=300)
    with pytest.raises(ValueError, match="300: this is another model's tokenizer"):
        build(tmp_path / "300")
    llama.tokenizer.n_words, llama.tokenizer.bos_id = 768, 765
    with pytest.raises(ValueError, match="760: this is another model's tokenizer"):
        fit_tokenizer(llama.tokenizer, 760, "config.json")


@pytest.mark.parametrize("rows", [760, 800])
def test_an_embedding_that_params_json_leaves_to_the_files(rows: int, tmp_path: Path) -> None:
    """A failure means that a padded embedding is taken for another model's."""
    reference = write(tmp_path / "hf", vocab_size=rows)
    convert(str(tmp_path / "hf"), str(tmp_path / "meta"))
    path = tmp_path / "meta/params.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": -1}))
    llama = build(tmp_path / "meta")
    assert llama.tokenizer.n_words == min(rows, 768)
    assert_same(llama, logits_of(reference))


def test_texts_that_dynamic_scaling_would_change_are_refused(tmp_path: Path) -> None:
    """A failure means that the same prompt, cut otherwise, gets other logits without a word."""
    for name, rope in (("dynamic", {"rope_type": "dynamic", "factor": 2.0}), ("longrope", LONG)):
        write(tmp_path / name, rope_parameters={**rope, "rope_theta": 10000.0})
        with pytest.raises(ValueError, match=f"max_seq_len is 129, .* 128 tokens .*{name}"):
            build(tmp_path / name, max_seq_len=129)
        build(tmp_path / name, max_seq_len=128)


HOSTILE: dict[str, tuple[dict[str, object], str]] = {
    "no factor": (
        {**YARN, "factor": 0},
        "rope_scaling's factor is 0 in .*: expected a number above",
    ),
    "negative": ({**YARN, "factor": -1.0}, "factor is -1.0"),
    "huge": ({**YARN, "factor": 1e300}, "factor is 1e[+]300"),
    "tiny": ({**YARN, "original_max_position_embeddings": 1e-300}, "embeddings is 1e-300"),
    "not a number": ({**YARN, "beta_fast": float("nan")}, "beta_fast is nan"),
    "infinite": ({**YARN, "beta_slow": float("inf")}, "beta_slow is inf"),
    "text": ({**YARN, "mscale": "1"}, "mscale is '1'"),
    "true": ({**YARN, "mscale_all_dim": True}, "mscale_all_dim is True"),
    "a list": ({**YARN, "attention_factor": [1]}, r"attention_factor is \[1\]"),
    "no truth": ({**YARN, "truncate": 1}, "truncate is 1 in .*: expected true or false"),
    "crossed": ({**YARN, "beta_fast": 1, "beta_slow": 2}, "beta_fast below its beta_slow"),
    "no waves": ({**YARN, "rope_theta": 1}, "rope_theta is 1 .*: yarn needs a number above 1"),
    "few factors": ({**LONG, "short_factor": [1.0]}, "short_factor in .* expected 4 numbers"),
    "odd factors": ({**LONG, "long_factor": [1, 1, 0, 1]}, "a factor of rope_scaling is 0"),
    "no factors": ({**LONG, "long_factor": None}, "long_factor in .* are None: expected 4 numbers"),
    "length 1": ({**LONG, "original_max_position_embeddings": 1}, "is 1 .*: longrope needs"),
    "no length": ({**LONG, "original_max_position_embeddings": "x"}, "embeddings is 'x'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_wrong_values_of_rotary_scaling(name: str, saved: Path, tmp_path: Path) -> None:
    """A failure means an error of Python's own, or a network whose logits aren't finite."""
    rope, message = HOSTILE[name]
    path = shutil.copytree(saved, tmp_path / "model")
    change(path, rope_parameters=rope)
    with pytest.raises(ValueError, match=message) as error:
        build(path)
    assert len(str(error.value).splitlines()) == 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    write(path)
    return path


RANKS = """
import json, os, sys, torch
from llama import Llama
tokens, cases = torch.load(sys.argv[1])
for path, options, expected, most in cases:
    llama = Llama.build(path, device="cpu", dtype=torch.float32, max_seq_len=128, **options)
    found = [llama.model(tokens[:, :99]), llama.model(tokens[:, 99:], 99)]
    error = (torch.cat(found, dim=1) - expected).abs().mean() / expected.abs().mean()
    assert error < most, (path, error)
open(sys.argv[1] + os.environ["RANK"], "w").close()
"""


@pytest.mark.slow
def test_two_ranks_and_written_files_give_the_same_logits(tmp_path: Path) -> None:
    """A failure means that a bias is divided or added wrongly, or gets lost in another format."""
    cases: list[tuple[str, dict[str, str], torch.Tensor, float]] = []
    for i, variant in enumerate(("all biases, tied", "one key head with biases")):
        path = tmp_path / f"{i}"
        reference = write(path, hidden_size=128, intermediate_size=256, **VARIANTS[variant])
        expected = logits_of(reference)
        convert(str(path), str(tmp_path / f"{i}-meta"), model_parallel_size=2)
        cases += [(str(p), {}, expected, 1e-5) for p in (path, tmp_path / f"{i}-meta")]
        assert_same(build(tmp_path / f"{i}-meta"), expected)
        for scheme in ("int8", "int4"):
            convert(str(path), str(tmp_path / f"{i}-{scheme}"), quantize=scheme)
            llama = build(path, quantize=scheme)
            rounded = llama.model(TOKENS)
            exact = logits_of(with_weights_of(llama.model, reference))
            # int8 rounds inputs too.
            bound = (0.15 if scheme == "int8" else 1e-4) * exact.abs().mean()
            assert (rounded - exact).abs().mean() < bound
            # Of a rank's inputs the largest may be another one.
            cases.append((str(path), {"quantize": scheme}, rounded, 0.15))
            cases.append((str(tmp_path / f"{i}-{scheme}"), {}, rounded, 0.15))
            found = build(tmp_path / f"{i}-{scheme}").model(TOKENS)
            torch.testing.assert_close(found, rounded, atol=1e-4, rtol=1e-4)
    torch.save((TOKENS, cases), tmp_path / "cases")
    done = forked(script(tmp_path, RANKS), str(tmp_path / "cases"), n=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "cases0").exists() and (tmp_path / "cases1").exists()
