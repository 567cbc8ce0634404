"""Directories that transformers has written: the network and its ids are those of transformers."""

import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_files import SIZES, make_hf, save_hf
from hypothesis import example, given, settings
from hypothesis import strategies as st
from processes import forked, script
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from llama import Llama
from llama.checkpoint.hf import open_hf
from llama.checkpoint.params import make_args
from llama.generation import TINY
from llama.rope import attention_factor, rope_factors

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # So few that within the tests' texts all three kinds of waves are met.
    "original_max_position_embeddings": 32,
}
PROMPTS = [[1, 20, 300], [1, *range(40, 80)], [1], [1, *range(500, 517)]]


def write(directory: Path, dtype: torch.dtype = torch.float32, **config: Any) -> LlamaForCausalLM:
    """Save a small random model as transformers does; gives the model in float32."""
    shard_size = config.pop("max_shard_size", "1GB")
    model = make_hf(**config)
    for parameter in model.parameters():  # not the rotary table, which stays in float32
        parameter.data = parameter.data.to(dtype)
    save_hf(model, directory, max_shard_size=shard_size)
    model.generation_config.eos_token_id = None
    return model.float()


def build(directory: Path) -> Llama:
    llama = Llama.build(directory, device="cpu", dtype=torch.float32, max_seq_len=128)
    llama.tokenizer.stop_ids = frozenset()
    return llama


def assert_same(llama: Llama, reference: LlamaForCausalLM) -> None:
    """The logits of whole texts, and what a ragged batch is continued with."""
    vocab_size = reference.config.vocab_size
    tokens = torch.randint(0, vocab_size, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = reference(tokens).logits
    assert (llama.model(tokens, 0) - expected).abs().max() < 1e-4
    rows = llama.generate(PROMPTS, 10, temperature=0)[0]
    padding = list(range(llama.tokenizer.n_words, vocab_size))  # means nothing to the tokenizer
    for prompt, row in zip(PROMPTS, rows, strict=True):
        wanted = reference.generate(
            torch.tensor([prompt]),
            max_new_tokens=10,
            do_sample=False,
            pad_token_id=0,
            suppress_tokens=padding or None,
        )
        assert row == wanted[0, len(prompt) :].tolist()


def change(directory: Path, name: str, **values: object) -> None:
    """Change an object in a JSON file; a value of ``...`` takes the key out."""
    path = directory / name
    data = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))


def change_weights(directory: Path, **tensors: torch.Tensor | None) -> None:
    """Change tensors of ``model.safetensors``; None takes one out, ``__`` stands for a dot."""
    path = directory / "model.safetensors"
    changed = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    kept = {**load_file(path), **changed}
    save_file({name: tensor for name, tensor in kept.items() if tensor is not None}, path)


VARIANTS = {
    "mha": {"num_key_value_heads": 8},
    "gqa": {},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 16},
    "narrow heads": {"head_dim": 6},
    "theta and eps": {
        "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
    "linear": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
    "llama3": {"rope_parameters": LLAMA3},
    "llama3 and wide heads": {"rope_parameters": LLAMA3, "head_dim": 16},
    "shards": {"max_shard_size": "100KB"},
    "tied shards": {"max_shard_size": "100KB", "tie_word_embeddings": True},
    "padded vocabulary": {"vocab_size": 832},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_ids_are_those_of_transformers(variant: str, tmp_path: Path) -> None:
    reference = write(tmp_path, **VARIANTS[variant])
    assert (tmp_path / "model.safetensors.index.json").is_file() == ("shards" in variant)
    assert_same(build(tmp_path), reference)


OLD = {
    "default": ({}, {"rope_theta": 10000.0}),
    "theta": ({"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5}),
    "no theta": ({}, {}),
    "null": ({}, {"rope_theta": 10000.0, "rope_scaling": None}),
    "linear": (
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
    ),
    "llama3": (
        {**LLAMA3, "rope_theta": 5e5},
        {
            "rope_theta": 5e5,
            "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"},
        },
    ),
    "both spellings of the kind": (
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}},
    ),
}


@pytest.mark.parametrize("variant", OLD)
def test_configurations_in_older_spellings(variant: str, tmp_path: Path) -> None:
    rope, spelling = OLD[variant]
    reference = write(tmp_path, **({"rope_parameters": rope} if rope else {}))
    config = {
        "architectures": ["LLaMAForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "pretraining_tp": 1,
        "torch_dtype": "float16",
        "transformers_version": "4.28.0",
        "rms_norm_eps": 1e-6,
        **{k: v for k, v in SIZES.items() if k != "max_position_embeddings"},
        **spelling,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same(build(tmp_path), reference)


def test_a_bare_configuration_has_the_defaults_of_transformers(tmp_path: Path) -> None:
    reference = write(tmp_path, num_key_value_heads=8)
    sizes = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads",)}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    assert_same(build(tmp_path), reference)


@pytest.mark.parametrize("shards", [1, 3])
def test_pytorch_files(shards: int, tmp_path: Path) -> None:
    reference = write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        files = [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)]
        where = {name: files[i % shards] for i, name in enumerate(tensors)}
        for file in files:
            part = {name: tensors[name] for name in tensors if where[name] == file}
            torch.save(part, tmp_path / file)
        index = {"metadata": {}, "weight_map": where}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_same(build(tmp_path), reference)


def test_stale_rotary_tables_are_ignored(tmp_path: Path) -> None:
    reference = write(tmp_path)
    stale = {
        f"model__layers__{i}__self_attn__rotary_emb__inv_freq": torch.zeros(4) for i in range(2)
    }
    change_weights(tmp_path, **stale, model__rotary_emb__inv_freq=torch.zeros(4))
    assert_same(build(tmp_path), reference)


def test_names_without_the_prefix_are_those_of_a_bare_network(tmp_path: Path) -> None:
    reference = write(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors")
    assert_same(build(tmp_path), reference)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 5}, ..., {5}),
        ({"eos_token_id": [5, 7]}, ..., {5, 7}),
        # Where both say so: of config.json's, which may be older, control pieces only.
        ({"eos_token_id": [5, 7]}, {"eos_token_id": [9, 2]}, {5, 9, 2}),
        ({"text_config": {"eos_token_id": 5}}, {}, {2, 5}),
        ({"eos_token_id": None}, {}, {2}),
    ],
)
def test_ids_that_end_a_text(
    config: dict[str, Any], generation: Any, expected: set[int], tmp_path: Path
) -> None:
    write(tmp_path)
    change(tmp_path, "config.json", **config)
    (tmp_path / "generation_config.json").unlink()
    if generation is not ...:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    llama = Llama.build(tmp_path, device="cpu")
    # The tokenizer's own end is one too.
    assert llama.tokenizer.stop_ids == expected | {llama.tokenizer.eos_id}


RANKS = """
import json, os, sys, torch
from llama import Llama
llama = Llama.build(sys.argv[1], device="cpu", dtype=torch.float32, max_seq_len=128)
llama.tokenizer.stop_ids = frozenset()
rows = llama.generate(json.loads(sys.argv[3]), 24, temperature=0)[0]
with open(sys.argv[2] + os.environ["RANK"], "w") as file:
    json.dump(rows, file)
"""


@pytest.mark.slow
def test_two_ranks_generate_what_one_process_does(tmp_path: Path) -> None:
    path, out = tmp_path / "model", tmp_path / "rank"
    write(path, tie_word_embeddings=True, num_key_value_heads=1)
    alone = build(path).generate(PROMPTS, 24, temperature=0)[0]
    done = forked(script(tmp_path, RANKS), str(path), str(out), json.dumps(PROMPTS), n=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [json.loads(Path(f"{out}{rank}").read_text()) for rank in range(2)] == [alone, alone]


MEMORY = """
import sys, torch
from llama import Llama
from llama.layers.capability import Capability
from llama.layers.kernels import plain_kernel
weight = torch.randn(512, 512).bfloat16()
kind = plain_kernel(weight, 1, False, Capability())
if kind is not None:
    kind({"weight": weight})  # for which numba's compiler takes as much as these weights, once
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
# What every model needs once, such as libraries and their buffers.
Llama.build(device="cpu", dtype=torch.bfloat16).model(torch.ones(1, 1, dtype=torch.long))
import llama.checkpoint.hf, safetensors.torch
from llama.checkpoint.sharding import weight_bytes
before = peak()
options = {"max_seq_len": 64, "max_batch_size": 1}  # a small cache
llama = Llama.build(sys.argv[1], **options, device="cpu", dtype=torch.bfloat16)
llama.model(torch.ones(1, 1, dtype=torch.long))  # reads every weight
needed = weight_bytes(llama.model.params, torch.bfloat16)
place = llama.model.tok_embeddings.weight.data_ptr()
with open("/proc/self/maps") as maps:
    lines = [line.split()[0] for line in maps if sys.argv[1] in line]
ends = [[int(end, 16) for end in line.split("-")] for line in lines]
print((peak() - before) / needed, any(first <= place < last for first, last in ends))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("is_tied", [False, True])
def test_loading_takes_little_more_memory_than_the_weights(is_tied: bool, tmp_path: Path) -> None:
    """Also where every token reads an output that is the embedding, which is copied from the file.

    A failure means that weights stay mapped beside their copies.
    """
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 5}
    if is_tied:
        sizes["vocab_size"] = 32768
    config = {**SIZES, **sizes, "num_key_value_heads": 8, "tie_word_embeddings": is_tied}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config))
    model.config.save_pretrained(tmp_path)
    config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": is_tied}
    change(tmp_path, "config.json", **config)
    tensors = {
        n: torch.full(t.shape, 0.01, dtype=torch.bfloat16)
        for n, t in model.state_dict().items()
        if not (is_tied and n.startswith("lm_head"))
    }
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    # A first process may compile code, which takes as much memory whatever the weights' size.
    for _ in range(2):
        done = forked("-c", MEMORY, str(tmp_path))
        assert done.returncode == 0, done.stderr
    ratio, embedding_is_mapped = done.stdout.split()
    # 1.06; 1.23 if the pages of queries and keys, which are copied, stayed.
    assert float(ratio) < 1.15
    assert embedding_is_mapped == str(not is_tied)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory that is whole, in one file and in several."""
    paths = {name: tmp_path_factory.mktemp("saved") / name for name in ("single", "sharded")}
    write(paths["single"])
    write(paths["sharded"], max_shard_size="100KB")
    return paths


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


class Harmful:
    """Unpickled without care it would make a directory."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def harmful(path: Path) -> None:
    (path / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Harmful(path / "ran")}, path / "pytorch_model.bin")


def config(**values: object) -> Callable[[Path], None]:
    return lambda path: change(path, "config.json", **values)


def weights(**tensors: torch.Tensor | None) -> Callable[[Path], None]:
    return lambda path: change_weights(path, **tensors)


def text(name: str, data: str) -> Callable[[Path], object]:
    return lambda path: (path / name).write_text(data)


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def rope(**values: object) -> Callable[[Path], None]:
    return config(rope_parameters={"rope_theta": 10000.0, **values})


BROKEN: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no weights": (remove("model.safetensors"), FileNotFoundError, "has no weights: expected one"),
    "no tokenizer": (remove("tokenizer.model"), FileNotFoundError, "no tokenizer.model or tokeni"),
    "no JSON": (text("config.json", "{"), ValueError, r"config.json is not JSON"),
    "nested": (text("config.json", "[" * 100_000), ValueError, r"config.json is not JSON"),
    "a list": (text("config.json", "[1]"), ValueError, "holds a list, not an object"),
    "bytes": (lambda p: (p / "config.json").write_bytes(b"\xff\xfe{"), ValueError, "is not JSON"),
    "lacks a key": (config(hidden_size=...), ValueError, "config.json lacks hidden_size$"),
    "lacks keys": (text("config.json", '{"model_type": "llama"}'), ValueError, "lacks hidden_size"),
    "another model": (config(model_type="mixtral"), ValueError, "of model_type 'mixtral': expect"),
    "no model_type": (config(model_type=...), ValueError, "of model_type None: expected 'llama'"),
    "architecture": (config(architectures=["LlamaModel2"]), ValueError, "of architecture .'LlamaM"),
    "attention bias": (
        config(attention_bias=True),
        ValueError,
        r"lacks layers\.0\.attention\.wk\.b",
    ),
    "bias": (config(mlp_bias=True), ValueError, r"lacks layers\.0\.feed_forward\.w1\.bias"),
    "no truth": (config(mlp_bias="no"), ValueError, "mlp_bias is 'no' in .*: expected true or fal"),
    "quantised": (config(quantization_config=["exl2"]), ValueError, "quantization_config .*object"),
    "activation": (config(hidden_act="gelu"), ValueError, "the hidden_act 'gelu': expected 'silu'"),
    "half of llama3": (rope(rope_type="llama3", factor=2.0), ValueError, "low_freq_factor is None"),
    "unknown scaling": (rope(rope_type="su", factor=2.0), ValueError, "is 'su' in .* known kinds"),
    "old dynamic": (
        config(rope_parameters=..., rope_scaling={"type": "dynamic", "factor": 2.0}),
        ValueError,
        "max_seq_len is 512, but beyond 128 tokens this model's dynamic rotary scaling",
    ),
    "partial": (rope(partial_rotary_factor=0.5), ValueError, "a part of each head"),
    "no factor": (rope(rope_type="linear"), ValueError, "rope_scaling's factor is None"),
    "no dim": (config(hidden_size=0), ValueError, "dim is 0 in .*: expected 1 or more"),
    "no layer": (config(num_hidden_layers=0), ValueError, "n_layers is 0 in .*: expected a whole"),
    "half a head": (config(num_attention_heads=7, head_dim=...), ValueError, "don't give heads of"),
    "uneven groups": (
        config(num_key_value_heads=3),
        ValueError,
        "is no multiple of n_kv_heads 3",
    ),
    "absurdly large": (config(hidden_size=10**30), ValueError, "larger than any model's"),
    "far too large": (config(hidden_size=10**6), ValueError, "belongs to another model"),
    "small vocabulary": (config(vocab_size=700), ValueError, r"has the shape \(768, 64\)"),
    "more layers": (config(num_hidden_layers=3), ValueError, r"lacks layers\.2\."),
    "fewer layers": (config(num_hidden_layers=1), ValueError, r"has the unexpected layers\.1\."),
    "other heads": (config(num_key_value_heads=4), ValueError, r"wk.weight in .* has the shape"),
    "untied": (weights(lm_head__weight=None), ValueError, r"lacks output\.weight$"),
    "shape": (weights(model__norm__weight=torch.ones(65)), ValueError, r"norm.weight .*\(65,\)"),
    "flat": (
        weights(model__layers__0__self_attn__q_proj__weight=torch.ones(4096)),
        ValueError,
        r"wq\.weight .* has the shape \(4096,\)",
    ),
    "biases": (
        weights(model__layers__0__self_attn__q_proj__bias=torch.ones(64)),
        ValueError,
        r"has the unexpected layers\.0\.attention\.wq\.bias",
    ),
    "twice": (
        weights(norm__weight=torch.ones(64)),
        ValueError,
        r"model\.norm\.weight twice, under",
    ),
    "two outputs": (weights(score__weight=torch.ones(768, 64)), ValueError, "twice.* one is score"),
    "Meta's names": (
        weights(
            model__layers__0__self_attn__q_proj__weight=None,
            layers__0__attention__wq__weight=torch.ones(64, 64),
        ),
        ValueError,
        r"has the unexpected layers\.0\.attention\.wq\.weight",
    ),
    "integers": (
        weights(lm_head__weight=torch.ones(768, 64, dtype=torch.int8)),
        ValueError,
        "torch.int8.*not a plain floating-point tensor",
    ),
    "8 bits": (
        weights(lm_head__weight=torch.ones(768, 64).to(torch.float8_e4m3fn)),
        ValueError,
        "float8_e4m3fn: it is quantised",
    ),
    "truncated": (
        lambda path: truncate(path / "model.safetensors", 10_000),
        ValueError,
        r"is damaged or no safetensors file \(",
    ),
    "empty": (lambda p: truncate(p / "model.safetensors", 0), ValueError, "is empty: download"),
    "a page": (text("model.safetensors", "<html>" * 99), ValueError, "is a web page: download"),
    "no archive": (
        lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"),
        ValueError,
        "is no checkpoint, which would be a zip archive",
    ),
    "malicious": (harmful, ValueError, "is refused: its pickle names (posix|nt) mkdir"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_and_unsupported_directories_are_refused(
    name: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    harm, kind, message = BROKEN[name]
    path = shutil.copytree(saved["single"], tmp_path / "model")
    harm(path)
    with pytest.raises(kind, match=message) as error:
        Llama.build(path, device="cpu")
    assert type(error.value) in (kind, *kind.__subclasses__())
    assert len(str(error.value).splitlines()) == 1
    assert not (path / "ran").exists()


INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


def where(path: Path) -> dict[str, str]:
    return json.loads((path / INDEX).read_text())["weight_map"]


def indexed(**files: object) -> Callable[[Path], None]:
    """Say that tensors lie in other files."""

    def edit(path: Path) -> None:
        named = {name.replace("__", "."): file for name, file in files.items()}
        change(path, INDEX, weight_map={**where(path), **named})

    return edit


def without_norm(path: Path) -> None:
    """Neither the index nor its file has the tensor."""
    file = path / where(path)[NORM]
    save_file({n: t for n, t in load_file(file).items() if n != NORM}, file)
    change(path, INDEX, weight_map={n: f for n, f in where(path).items() if n != NORM})


FIRST = "model-00001-of-00006.safetensors"
BROKEN_INDEX: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no tensor": (without_norm, ValueError, r"lacks norm\.weight$"),
    "no file": (remove(FIRST), FileNotFoundError, f"index.json names {FIRST}, which is missing"),
    "other file": (indexed(model__norm__weight=FIRST), ValueError, f"{NORM} is in {FIRST}, but it"),
    "unknown tensor": (indexed(extra=FIRST), ValueError, f"says that extra is in {FIRST}, but it"),
    "outside": (indexed(extra="../other/model.safetensors"), ValueError, "to files next to it"),
    "absolute": (indexed(extra="/etc/passwd"), ValueError, "no weight_map from tensors to files"),
    "up": (indexed(extra=".."), FileNotFoundError, r"names \.\., which is missing"),
    "zero": (indexed(extra="a\0b"), FileNotFoundError, r"names a\?b, which is missing"),
    "long": (indexed(extra="a" * 5000), FileNotFoundError, "names aaa.*, which is missing"),
    "number": (indexed(extra=3), ValueError, "no weight_map from tensors to files next to it"),
    "list": (lambda p: change(p, INDEX, weight_map=[FIRST]), ValueError, "no weight_map from"),
    "no map": (text(INDEX, "{}"), ValueError, "no weight_map from tensors to files next to it"),
    "no JSON": (text(INDEX, "weight_map"), ValueError, "index.json is not JSON"),
    "truncated": (lambda path: truncate(path / FIRST, 1000), ValueError, f"{FIRST} is damaged or"),
}


@pytest.mark.parametrize("name", BROKEN_INDEX)
def test_a_broken_index_is_told(name: str, saved: dict[str, Path], tmp_path: Path) -> None:
    harm, kind, message = BROKEN_INDEX[name]
    path = shutil.copytree(saved["sharded"], tmp_path / "model")
    harm(path)
    with pytest.raises(kind, match=message) as error:
        Llama.build(path, device="cpu")
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 600


def test_a_file_that_the_index_does_not_name_is_not_read(
    saved: dict[str, Path], tmp_path: Path
) -> None:
    path = shutil.copytree(saved["sharded"], tmp_path / "model")
    (path / "other.safetensors").write_text("nothing to be read")
    build(path)


def test_a_missing_package_is_named(
    saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"package safetensors: pip install 'llama\[formats\]'"):
        Llama.build(saved["single"], device="cpu")


KEYS = [
    *SIZES,
    *("model_type", "architectures", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling"),
    *("rope_parameters", "tie_word_embeddings", "hidden_act", "attention_bias", "id2label"),
    *("quantization_config", "bos_token_id", "eos_token_id", "mlp_bias", "num_labels", "dtype"),
    *("sliding_window", "torch_dtype", "original_max_position_embeddings"),
]
NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 8, 64, 768, 2**31, 2**63, 10**400, 0.5, 1e-320, 1e300])
WORDS = ["llama", "silu", "default", "linear", "llama3", "factors", "LlamaForCausalLM", "\ud800"]
WORDS += ["mistral", "MistralForCausalLM", "LlamaModel", "yarn", "dynamic", "longrope", "bfloat16"]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    st.integers(),
    st.floats(),
    st.sampled_from(WORDS),
    st.text(max_size=5),
)
ROPE = st.dictionaries(
    st.sampled_from(
        [
            *("rope_type", "type", "rope_theta", "partial_rotary_factor", *LLAMA3),
            *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
            *("attention_factor", "short_factor", "long_factor"),
        ]
    ),
    SCALARS | st.lists(SCALARS, max_size=2),
    max_size=7,
)
VALUES = st.recursive(
    SCALARS | ROPE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@pytest.mark.slow
def test_any_configuration_loads_or_is_refused_with_a_reason(
    saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = json.loads((saved["single"] / "config.json").read_text())
    (tmp_path / "model.safetensors").symlink_to(saved["single"] / "model.safetensors")

    @settings(max_examples=120, deadline=None, database=None)
    @example({"rope_parameters": {"rope_type": [], "factor": {}}})
    @example({"architectures": {"0": 1}})
    @example({"architectures": [[]]})
    @example({"hidden_act": ["silu"], "id2label": [1]})
    @example({"hidden_size": 64, "num_attention_heads": 65, "head_dim": None})
    @example({"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": 10**400}})
    @given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=4))
    def check(values: dict[str, Any]) -> None:
        (tmp_path / "config.json").write_text(json.dumps({**whole, **values}))
        try:
            found = open_hf(tmp_path)
            args = make_args(found.params, found.source, n_words=768)
            found.check(args)
            assert math.isfinite(attention_factor(args))
            rope_factors(args)
        except ValueError as error:
            assert str(error).isprintable() and len(str(error)) < 600

    check()
