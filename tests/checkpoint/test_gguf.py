"""GGUF files: the network and the tokenizer they hold are those that were written."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from conftest import data_tokenizer
from gguf import GGMLQuantizationType as Kind
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llama import Tokenizer, Transformer, parallel
from llama.args import make_args
from llama.checkpoint import open_checkpoint
from llama.checkpoint.base import Checkpoint
from llama.checkpoint.gguf import open_gguf
from llama.checkpoint.gguf_file import open_file
from llama.checkpoint.load import load as load_network
from llama.generation import TINY
from llama.tokenizers import load_tokenizer
from llama.tokenizers.gguf_tokenizer import tokenizer_files

SIZES = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 16,
    "hidden_dim": 96,
    "vocab_size": 60,
    "rope_theta": 5000.0,
    "tied": False,
}


def shapes(sizes: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """A file's tensors by their names."""
    dim, hidden = sizes["dim"], sizes["hidden_dim"]
    q, kv = (sizes[name] * sizes["head_dim"] for name in ("n_heads", "n_kv_heads"))
    block = {
        "attn_q": (q, dim),
        "attn_k": (kv, dim),
        "attn_v": (kv, dim),
        "attn_output": (dim, q),
        "ffn_gate": (hidden, dim),
        "ffn_down": (dim, hidden),
        "ffn_up": (hidden, dim),
        "attn_norm": (dim,),
        "ffn_norm": (dim,),
    }
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (sizes["vocab_size"], dim)}
    for i in range(sizes["n_layers"]):
        found |= {f"blk.{i}.{name}.weight": shape for name, shape in block.items()}
    found["output_norm.weight"] = (dim,)
    if not sizes["tied"]:
        found["output.weight"] = (sizes["vocab_size"], dim)
    return found


def random_blocks(kind: Kind, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Bytes of a K-quantisation, which can't be made from numbers in Python."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (shape[0], shape[1] // block, size), dtype=np.uint8)
    usual, *places = {  # a scale that gives weights of a tenth, and where blocks hold scales
        "Q2_K": (3e-3, 80, 82),
        "Q3_K": (1e-3, 108),
        "Q4_K": (2e-4, 0, 2),
        "Q5_K": (1e-4, 0, 2),
        "Q6_K": (5e-5, 208),
    }[kind.name]
    for at in places:
        scale = rng.uniform(0.5, 1.5, blocks.shape[:2] + (1,)) * usual
        blocks[..., at : at + 2] = scale.astype(np.float16).view(np.uint8)
    return blocks.reshape(shape[0], -1)


def write_gguf(
    path: Path,
    kind: Kind = Kind.F32,
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    without: str | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    architecture: str = "llama",
    **sizes: Any,
) -> dict[str, torch.Tensor]:
    """Write a file with random weights; gives what they are worth in float32."""
    sizes = {**SIZES, **sizes}
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=sizes.pop("per_file", 0))
    writer.add_embedding_length(sizes["dim"])
    writer.add_block_count(sizes["n_layers"])
    writer.add_head_count(sizes["n_heads"])
    writer.add_head_count_kv(sizes["n_kv_heads"])
    writer.add_feed_forward_length(sizes["hidden_dim"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(sizes["rope_theta"])
    if sizes["head_dim"] != sizes["dim"] // sizes["n_heads"]:
        writer.add_key_length(sizes["head_dim"])
        writer.add_value_length(sizes["head_dim"])
    writer.add_rope_dimension_count(sizes["head_dim"])
    writer.add_vocab_size(sizes["vocab_size"])
    change(writer)
    rng = np.random.default_rng(1)
    values = {}
    for name, shape in shapes(sizes).items():
        if name == without:
            continue
        if len(shape) == 1:
            data, stored = rng.uniform(0.5, 1.5, shape).astype(np.float32), Kind.F32
        elif kind.name.endswith("_K"):
            data, stored = random_blocks(kind, shape, rng), kind
        else:
            plain = rng.normal(0, 0.15, shape).astype(np.float32)
            data, stored = gguf.quants.quantize(plain, kind), kind
        writer.add_tensor(name, data, raw_dtype=stored)
        values[name] = torch.from_numpy(gguf.quants.dequantize(data, stored).copy()).view(shape)
    for name, data in (tensors or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def reference(values: dict[str, torch.Tensor], rope: dict[str, Any], **sizes: Any) -> Any:
    """transformers' network with the same weights; its rotary pairs lie half a head apart."""
    sizes = {**SIZES, **sizes}
    config = LlamaConfig(
        hidden_size=sizes["dim"],
        intermediate_size=sizes["hidden_dim"],
        num_hidden_layers=sizes["n_layers"],
        num_attention_heads=sizes["n_heads"],
        num_key_value_heads=sizes["n_kv_heads"],
        head_dim=sizes["head_dim"],
        vocab_size=sizes["vocab_size"],
        rms_norm_eps=1e-5,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": sizes["rope_theta"], **rope},
        tie_word_embeddings=sizes["tied"],
    )
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    state = {}
    for name, value in values.items():
        *layer, part, _ = name.split(".")
        if part in ("attn_q", "attn_k"):
            pairs = value.view(-1, sizes["head_dim"] // 2, 2, value.shape[1])
            value = pairs.transpose(1, 2).reshape(value.shape)
        prefix = f"model.layers.{layer[1]}." if layer else ""
        state[f"{prefix}{names[part]}.weight"] = value
    if sizes["tied"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    network = LlamaForCausalLM(config).eval()
    network.load_state_dict(state)
    return network


def load(ckpt: Checkpoint, dtype: torch.dtype | None = torch.float32) -> Transformer:
    parallel.initialize(torch.device("cpu"))
    args = make_args(ckpt.params, ckpt.source, -1, 64, 2)
    return load_network(ckpt, args, torch.device("cpu"), dtype)


def assert_same_logits(model: Transformer, network: Any) -> None:
    tokens = torch.randint(0, 60, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = network(tokens).logits
    assert expected.std() > 0.1
    assert (model(tokens, 0) - expected).abs().max() < 1e-4


PLAIN = ("F32", "F16", "BF16")
K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
BIG = {"dim": 256, "hidden_dim": 512, "head_dim": 64, "n_layers": 1}


@pytest.mark.parametrize("name", [*PLAIN, "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", *K_QUANTS])
def test_every_quantisation_gives_the_logits_of_its_weights(tmp_path: Path, name: str) -> None:
    sizes = BIG if name in K_QUANTS else {}
    path = tmp_path / "model.gguf"
    values = write_gguf(path, Kind[name], **sizes)
    ckpt = open_gguf(path)
    usual = {"F32": torch.float32, "BF16": torch.bfloat16}
    assert ckpt.dtype == usual.get(name, torch.float16)
    layer = {"attn_q": "attention.wq", "ffn_down": "feed_forward.w2", "attn_norm": "attention_norm"}
    for gguf_name, meta_name in layer.items():  # bit for bit
        read = ckpt.parts[0][f"layers.0.{meta_name}.weight"].float()
        assert torch.equal(read, values[f"blk.0.{gguf_name}.weight"])
    assert_same_logits(load(ckpt), reference(values, {}, **sizes))


@pytest.mark.parametrize(
    "sizes", [{"n_kv_heads": 4}, {"n_kv_heads": 1, "tied": True}, {"head_dim": 24}], ids=str
)
def test_every_shape_gives_the_logits_of_its_weights(tmp_path: Path, sizes: dict[str, Any]) -> None:
    values = write_gguf(tmp_path / "model.gguf", **sizes)
    assert_same_logits(load(open_gguf(tmp_path / "model.gguf")), reference(values, {}, **sizes))


def test_transformers_reads_the_same_network_from_the_same_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", Kind.F16)
    network = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    assert_same_logits(load(open_gguf(tmp_path / "model.gguf")), network)


def linear(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


@pytest.mark.parametrize(
    "change", [linear, lambda writer: writer.add_float32("llama.rope.scale_linear", 4.0)]
)
def test_linear_scaling(tmp_path: Path, change: Callable[[gguf.GGUFWriter], None]) -> None:
    values = write_gguf(tmp_path / "model.gguf", change=change)
    network = reference(values, {"rope_type": "linear", "factor": 4.0})
    assert_same_logits(load(open_gguf(tmp_path / "model.gguf")), network)


def test_frequency_factors_are_llama_3s_scaling(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    plain = 5000.0 ** -(torch.arange(0, 16, 2, dtype=torch.float32) / 16)
    values = write_gguf(tmp_path / "plain.gguf")
    network = reference(values, scaling)
    factors = plain / network.model.rotary_emb.inv_freq
    assert factors.unique().numel() > 2
    path = tmp_path / "model.gguf"
    values = write_gguf(path, tensors={"rope_freqs.weight": factors.numpy()})
    assert_same_logits(load(open_gguf(path)), network)


def test_weights_stay_mapped_and_quantised_ones_become_half_precision(tmp_path: Path) -> None:
    write_gguf(tmp_path / "plain.gguf", Kind.F16)
    ckpt = open_gguf(tmp_path / "plain.gguf")
    model = load(ckpt, torch.float16)
    mapped = ckpt.mapped("output.weight")[0]
    assert model.output.weight.data_ptr() == mapped.data_ptr()
    write_gguf(tmp_path / "q8.gguf", Kind.Q8_0)
    ckpt = open_gguf(tmp_path / "q8.gguf")
    assert ckpt.mapped("output.weight")[0].nbytes == 60 * 64 * 34 // 32
    assert load(ckpt, None).output.weight.dtype in (torch.float16, torch.bfloat16, torch.float32)


def test_a_split_file_is_read_from_any_of_its_parts(tmp_path: Path) -> None:
    values = write_gguf(tmp_path / "model.gguf", per_file=8)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [part.name for part in parts[:2]] == [
        "model-00001-of-00003.gguf",
        "model-00002-of-00003.gguf",
    ]
    for part in parts[:2]:
        assert_same_logits(load(open_gguf(part)), reference(values, {}))
    assert open_checkpoint(tmp_path).names == open_gguf(parts[0]).names
    renamed = parts[0].rename(tmp_path / "other.gguf")
    with pytest.raises(ValueError, match=r"other.gguf is one of 3 parts"):
        open_gguf(renamed)
    with pytest.raises(FileNotFoundError, match=r"no GGUF file .*00001-of-00003.gguf next to"):
        open_gguf(parts[1])


WRONG = {
    "architecture": ({"architecture": "qwen2"}, "holds the architecture 'qwen2': known is 'llama'"),
    "missing": ({"without": "blk.1.ffn_up.weight"}, "lacks layers.1.feed_forward.w3.weight"),
    "experts": (
        {"change": lambda writer: writer.add_expert_count(8)},
        "llama.expert_count = 8: no such network",
    ),
    "bias": ({"tensors": {"blk.0.attn_q.bias": np.zeros(64, np.float32)}}, "no biases"),
    "fused": (
        {"tensors": {"blk.0.attn_qkv.weight": np.zeros((4, 4), np.float32)}},
        "has the unexpected blk.0.attn_qkv.weight",
    ),
    "quantisation": (
        {"tensors": {"rope_freqs.weight": np.zeros(8, np.int32)}},
        "rope_freqs.weight in the type I32: known are F32, F16, BF16, Q8_0",
    ),
    "yarn": (
        {"change": lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)},
        "llama.rope.scaling.type = 'yarn'",
    ),
    "partial": (
        {"change": lambda writer: writer.add_value_length(8)},
        "llama.attention.value_length = 8: expected the size of all of a head, 16",
    ),
    "heads": (
        {"change": lambda writer: writer.add_array("tokenizer.ggml.tokens", ["a", "b"])},
        r"token_embd|tok_embeddings.weight in .* has the shape \(60, 64\)",
    ),
    "freqs": (
        {"tensors": {"rope_freqs.weight": np.ones(3, np.float32)}},
        "rope_scaling's factors in .* expected 8 numbers",
    ),
    "tokenizer": (
        {"change": lambda writer: writer.add_tokenizer_model("bert")},
        "tokenizer of the kind 'bert'",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_llama_is_refused_in_one_sentence(tmp_path: Path, wrong: str) -> None:
    options, message = WRONG[wrong]
    write_gguf(tmp_path / "model.gguf", **options)
    with pytest.raises(ValueError, match=message) as caught:
        load(open_gguf(tmp_path / "model.gguf"))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_wrong_shape_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    data = (tmp_path / "model.gguf").read_bytes()
    name = b"blk.1.ffn_gate.weight"
    at = data.index(name) + len(name) + 4  # after the number of dimensions
    assert struct.unpack_from("<QQ", data, at) == (64, 96)
    swapped = data[:at] + struct.pack("<QQ", 96, 64) + data[at + 16 :]
    (tmp_path / "model.gguf").write_bytes(swapped)
    with pytest.raises(ValueError, match=r"layers.1.feed_forward.w1.weight .*\(64, 96\)"):
        load(open_gguf(tmp_path / "model.gguf"))


def claim(data: bytes, at: int, number: int) -> bytes:
    return data[:at] + struct.pack("<Q", number) + data[at + 8 :]


def test_a_damaged_file_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path)
    data = path.read_bytes()
    key = data.index(b"general.architecture")
    broken = {
        "no GGUF file: it begins with b'PK": b"PK\x03\x04" + data[4:],
        "no GGUF file: it begins with b''": b"",
        "version 1: expected version 2 or 3": data[:4] + struct.pack("<I", 1) + data[8:],
        "for big-endian machines": data[:4] + struct.pack(">I", 3) + data[8:],
        "is damaged or incomplete .*or is there twice": claim(data, 8, 1 << 60),
        "damaged or incomplete": claim(data, 16, 1 << 60),
        "bytes are announced after": claim(data, key - 8, 1 << 62),
        "doesn't fit": data[:-200],
        "no type has the number 99": data[: key + 20] + struct.pack("<I", 99) + data[key + 24 :],
    }
    for message, content in broken.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            open_gguf(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no GGUF file"):
        open_gguf(tmp_path / "other.gguf")
    array = struct.pack("<QQQ", 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 6, 1 << 40)
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + array)
    with pytest.raises(ValueError, match="a list of 1,099,511,627,776 is announced"):
        open_gguf(path)


def test_no_damage_of_the_header_gives_another_error(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    sizes = {"n_layers": 1, "vocab_size": len(BPE["vocab"]) + 1}
    write_gguf(path, change=lambda writer: add_byte_level(writer, "smollm"), **sizes)
    data = path.read_bytes()
    header = data.index(b"output.weight") + 60
    rng = random.Random(0)
    opened = 0
    for trial in range(250):
        changed = bytearray(data)
        for _ in range(rng.randint(1, 2)):
            changed[rng.randrange(header)] = rng.choice([0, 1, 8, 9, 127, 255, rng.randrange(256)])
        path.write_bytes(changed if trial % 3 else changed[: rng.randrange(header)])
        try:
            ckpt = open_gguf(path)
            load_tokenizer(ckpt.files)
            ckpt.check(make_args(ckpt.params, ckpt.source, -1))
            opened += 1
        except ValueError as error:
            assert "\n" not in str(error)
    assert 0 < opened < 250


# Tokenizers.

TEXT = (
    "Once upon a time there were 12345 words; it's what they've said: don't!\n\n  Two  spaces,\tas"
    "\r\n and déjà vu — 你好，世界 (½) HelloWorld x_1 == 'y' <|im_start|> 👩‍💻 ﬁ e\u0301\n"
)


def train(splitter: Any = None) -> tokenizers.Tokenizer:
    """A byte-level vocabulary of its own."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = splitter or pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|bos|>", "<|im_end|>", "<|eot_id|>"],
        show_progress=False,
    )
    corpus = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    model.train_from_iterator([corpus, TEXT * 3], trainer)
    return model


BPE = json.loads(train().to_str())["model"]


def add_byte_level(writer: gguf.GGUFWriter, rule: str | None, **ids: int) -> None:
    tokens = [*BPE["vocab"], "<tool>"]
    writer.add_tokenizer_model("gpt2")
    if rule is not None:
        writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 4), 4])
    writer.add_token_merges([" ".join(pair) for pair in BPE["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, value in ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}", value)


def byte_level_file(path: Path, rule: str | None, **ids: int) -> dict[str, Any]:
    """A file without weights; gives its metadata."""
    sizes = {"n_layers": 0, "vocab_size": len(BPE["vocab"]) + 1}
    write_gguf(path, change=lambda writer: add_byte_level(writer, rule, **ids), **sizes)
    return open_file(path)[0]


DIGITS = pre_tokenizers.Digits(individual_digits=True)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize(
    "rule",
    ["llama-bpe", "falcon3", "smaug-bpe", "tekken", "gpt-2", "smollm", "refact"],
)
def test_byte_level_ids_are_those_of_transformers(tmp_path: Path, rule: str) -> None:
    metadata = byte_level_file(tmp_path / "model.gguf", rule)
    tokenizer = load_tokenizer(tokenizer_files(metadata))
    expected = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf").backend_tokenizer
    if rule in ("smollm", "starcoder", "refact"):  # which transformers doesn't tell from GPT-2's
        expected.pre_tokenizer = pre_tokenizers.Sequence([DIGITS, GPT2])

    @settings(max_examples=60, deadline=None, database=None)
    @given(st.text(max_size=60) | st.text("aZé 1½9'sltm\r\n\t.,=/你ﬁ", max_size=40))
    def check(text: str) -> None:
        assume(not any(piece in text for piece in tokenizer.control_ids))  # here they are text
        ids = tokenizer.encode(text, bos=False, eos=False)
        assert ids == expected.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text

    check()
    plain = TEXT.replace("<|im_start|>", "")
    assert tokenizer.encode(plain, bos=False, eos=False) == expected.encode(plain).ids


def splits(metadata: dict[str, Any], text: str) -> list[str]:
    data = json.loads(tokenizer_files(metadata)["tokenizer.json"])
    data["pre_tokenizer"]["pretokenizers"].pop()  # the one that writes bytes as letters
    model = tokenizers.Tokenizer.from_str(json.dumps(data))
    return [piece for piece, _ in model.pre_tokenizer.pre_tokenize_str(text)]


def test_the_rules_that_transformers_does_not_know(tmp_path: Path) -> None:
    metadata = byte_level_file(tmp_path / "model.gguf", "deepseek-coder")
    assert splits(metadata, "ab  cd?!12\n你好") == ["ab", " ", " cd", "?!", "1", "2", "\n", "你好"]
    metadata["tokenizer.ggml.pre"] = "seed-coder"
    assert splits(metadata, "a.b 12?!\n") == ["a", ".b", " ", "1", "2", "?!", "\n"]
    metadata["tokenizer.ggml.pre"] = "default"
    assert splits(metadata, "it's 12345 a<=b") == [
        "it",
        "'",
        "s",
        " ",
        "123",
        "45",
        " a",
        "<=",
        "b",
    ]
    metadata["tokenizer.ggml.pre"] = "qwen2"
    tokenizer = load_tokenizer(tokenizer_files(metadata))
    assert splits(metadata, "don't 12\n") == ["don", "'t", " ", "1", "2", "\n"]
    decomposed = tokenizer.encode("e\u0301", bos=False, eos=False)
    assert decomposed == tokenizer.encode("\u00e9", bos=False, eos=False)


def test_a_token_is_taken_whole_where_the_rule_says_so(tmp_path: Path) -> None:
    metadata = byte_level_file(tmp_path / "model.gguf", "llama-bpe")
    metadata["tokenizer.ggml.tokens"][-1] = "zqzq"  # no merge makes it
    metadata["tokenizer.ggml.token_type"][-1] = 1
    last = len(BPE["vocab"])
    assert load_tokenizer(tokenizer_files(metadata)).encode("zqzq", False, False) == [last]
    metadata["tokenizer.ggml.pre"] = "smaug-bpe"
    assert load_tokenizer(tokenizer_files(metadata)).encode("zqzq", False, False) != [last]


def test_special_tokens_of_a_byte_level_tokenizer(tmp_path: Path) -> None:
    metadata = byte_level_file(tmp_path / "model.gguf", "llama-bpe", padding_token_id=2)
    metadata["tokenizer.chat_template"] = "{{ bos_token }}"
    files = tokenizer_files(metadata)
    assert json.loads(files["tokenizer_config.json"]) == {
        "bos_token": "<|bos|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|eot_id|>",
        "add_bos_token": True,
        "add_eos_token": False,
        "chat_template": "{{ bos_token }}",
    }
    assert json.loads(files["generation_config.json"]) == {"eos_token_id": [1, 2]}
    tokenizer = load_tokenizer(files)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (0, 1, True)
    assert tokenizer.stop_ids == {1, 2}
    assert tokenizer.encode_rendered("<|bos|>a<|im_end|>")[::2] == [0, 1]
    assert tokenizer.encode("<|bos|>", bos=False, eos=False) != [0]
    assert tokenizer.encode("<tool>", bos=False, eos=False) == [len(BPE["vocab"])]
    data = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    assert data.encode("a").ids[0] == 0  # transformers too begins with it
    metadata["tokenizer.ggml.pre"] = "smollm"
    metadata["tokenizer.ggml.add_eos_token"] = True
    config = json.loads(tokenizer_files(metadata)["tokenizer_config.json"])
    assert (config["add_bos_token"], config["add_eos_token"]) == (False, True)


def test_wrong_tokenizers_are_refused_in_one_sentence(tmp_path: Path) -> None:
    good = byte_level_file(tmp_path / "model.gguf", "smollm")
    for key, value, message in (
        ("pre", "command-r", "tokenizer.ggml.pre = 'command-r': known rules are dbrx, deepseek"),
        ("pre", None, "no tokenizer.ggml.pre: known rules"),
        ("merges", ["Ġ zqzqzq"], "merges 'Ġ zqzqzq', which isn't among its tokens"),
        ("merges", 3, "lacks the list tokenizer.ggml.merges"),
        ("token_type", [1, 1], "tokens, but tokenizer.ggml.token_type lists 2"),
        ("eos_token_id", 100000, "eos_token_id = 100000, but tokens 0 to"),
        ("tokens", ["a"] * (len(BPE["vocab"]) + 1), "has the token 'a' twice"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenizer_files({**good, f"tokenizer.ggml.{key}": value})
    assert tokenizer_files({}) == {}


def sentencepiece_file(path: Path, original: Tokenizer) -> dict[str, Any]:
    """A file as llama.cpp's converter writes a SentencePiece model; gives its metadata."""
    model = original.sp_model

    def kind(i: int) -> int:
        checks = (model.is_unknown, model.is_control, model.is_unused, model.is_byte)
        found = [number for number, check in zip((2, 3, 5, 6), checks, strict=True) if check(i)]
        return found[0] if found else 1

    def add(writer: gguf.GGUFWriter) -> None:
        ids = range(original.n_words)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([model.id_to_piece(i) for i in ids])
        writer.add_token_scores([model.get_score(i) for i in ids])
        writer.add_token_types([kind(i) for i in ids])
        writer.add_bos_token_id(original.bos_id)
        writer.add_eos_token_id(original.eos_id)

    write_gguf(path, change=add, n_layers=0, vocab_size=original.n_words, dim=4, head_dim=4)
    return open_file(path)[0]


@pytest.mark.parametrize("name", ["tiny", "llama2", "codellama", "codellama-70b-instruct"])
def test_sentencepiece_ids_are_the_originals(tmp_path: Path, name: str) -> None:
    tiny = name == "tiny"
    original = Tokenizer(TINY / "tokenizer.model") if tiny else data_tokenizer(name)
    files = tokenizer_files(sentencepiece_file(tmp_path / "model.gguf", original))
    tokenizer = load_tokenizer(files)
    for attribute in ("n_words", "bos_id", "eos_id", "pad_id", "control_ids", "stop_ids"):
        assert getattr(tokenizer, attribute) == getattr(original, attribute)

    @settings(max_examples=150, deadline=None, database=None)
    @given(st.text(max_size=80) | st.text("ab \n\t▁<s>/PREMIDSUFÉ你0123", max_size=40))
    def check(text: str) -> None:
        ids = tokenizer.encode(text, bos=True, eos=True)
        assert ids == original.encode(text, bos=True, eos=True)
        assert tokenizer.encode_infilling(text) == original.encode_infilling(text)
        assert tokenizer.decode(ids) == original.decode(ids)
        assert tokenizer.decode_infilling(ids) == original.decode_infilling(ids)

    check()
    config = json.loads(files["tokenizer_config.json"])
    assert config["bos_token"] == "<s>" and config["eos_token"] == "</s>"
    assert config["legacy"] and config["add_bos_token"] and not config["add_eos_token"]


def test_options_of_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    original = Tokenizer(TINY / "tokenizer.model")
    metadata = sentencepiece_file(tmp_path / "model.gguf", original)
    metadata |= {
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.eot_token_id": 300,
    }
    files = tokenizer_files(metadata)
    tokenizer = load_tokenizer(files)
    assert tokenizer.encode("a tree", False, False) == original.encode_infilling("a tree")
    assert tokenizer.stop_ids == {original.eos_id, 300} and not tokenizer.add_bos
    # llama.cpp writes the spaces of added tokens as such, and may mark an end as an added token.
    metadata["tokenizer.ggml.tokens"][-2:] = [" < a >", "<|end|>"]
    metadata["tokenizer.ggml.token_type"][-2:] = [4, 4]
    last = original.n_words - 1
    metadata["tokenizer.ggml.eos_token_id"] = last
    tokenizer = load_tokenizer(tokenizer_files(metadata))
    assert tokenizer.encode("x < a >", False, False)[-1] == last - 1
    assert tokenizer.eos_id == last and tokenizer.encode("<|end|>", False, False) != [last]
    metadata["tokenizer.ggml.token_type"][10] = 1
    with pytest.raises(ValueError, match="has 255 tokens for the 256 bytes"):
        tokenizer_files(metadata)
