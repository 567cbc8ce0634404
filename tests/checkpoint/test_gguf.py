"""GGUF files: the network that they hold is the one that was written."""

import functools
import math
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_files import BPE, SIZES, add_byte_level, write_gguf
from hf_files import make_hf, of_paired_tensors, save_hf, write_adapter
from transformers import AutoModelForCausalLM

from llama import Llama, ModelArgs, Transformer, parallel
from llama.checkpoint import apply_adapter, open_checkpoint
from llama.checkpoint.base import Checkpoint, quantized, widened
from llama.checkpoint.gguf import open_gguf
from llama.checkpoint.gguf_codes import codes_of, form_of_kind
from llama.checkpoint.gguf_file import SUPPORTED
from llama.checkpoint.load import load as load_network
from llama.checkpoint.params import make_args
from llama.checkpoint.rounding import make_scheme
from llama.convert import convert
from llama.layers import linear as linear_layers
from llama.layers.quantization import Grouped, StoredWeight
from llama.tokenizers import load_tokenizer

NAMES = {
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


def reference(values: dict[str, torch.Tensor], rope: dict[str, Any], **sizes: Any) -> Any:
    """transformers' network with the same weights."""
    sizes = {**SIZES, **sizes}
    tensors = {}
    for name, value in values.items():
        *layer, part, kind = name.split(".")
        prefix = f"model.layers.{layer[1]}." if layer else ""
        tensors[f"{prefix}{NAMES[part]}.{kind}"] = value
    return of_paired_tensors(
        tensors,
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
        attention_bias="attn_q" in sizes["biased"],
        mlp_bias="ffn_up" in sizes["biased"],
    )


def arguments(ckpt: Checkpoint) -> ModelArgs:
    return make_args(ckpt.params, ckpt.source, -1, 64, 2)


def load(ckpt: Checkpoint, dtype: torch.dtype | None = torch.float32) -> Transformer:
    parallel.initialize(torch.device("cpu"))
    return load_network(ckpt, arguments(ckpt), torch.device("cpu"), dtype)


def assert_same_logits(model: Transformer, network: Any) -> None:
    tokens = torch.randint(0, 60, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = network(tokens).logits
    assert expected.std() > 0.1
    assert (model(tokens, 0) - expected).abs().max() < 1e-4


BIG = {"dim": 256, "hidden_dim": 512, "head_dim": 64, "n_layers": 1}

META = {"attn_q": "attention.wq", "ffn_down": "feed_forward.w2", "attn_norm": "attention_norm"}


def sizes_of(name: str) -> dict[str, Any]:
    """Sizes of a network whose widths are whole blocks of a type."""
    return BIG if gguf.GGML_QUANT_SIZES[Kind[name]][0] > 32 else {}


@pytest.mark.parametrize("name", SUPPORTED)
def test_every_quantisation_gives_the_logits_of_its_weights(tmp_path: Path, name: str) -> None:
    """A failure means that the network isn't the one that a file of this type holds."""
    sizes = sizes_of(name)
    path = tmp_path / "model.gguf"
    values = write_gguf(path, Kind[name], **sizes)
    ckpt = open_gguf(path)
    usual = {"F32": torch.float32, "BF16": torch.bfloat16}
    assert ckpt.dtype == usual.get(name, torch.float16)
    assert set(ckpt.forms.values()) == ({form_of_kind(name)} - {None})
    plain = widened(ckpt, arguments(ckpt)).parts[0]
    for gguf_name, meta_name in META.items():
        read, expected = plain[f"layers.0.{meta_name}.weight"], values[f"blk.0.{gguf_name}.weight"]
        assert torch.allclose(read.float(), expected, rtol=1e-6, atol=1e-7)
    assert_same_logits(load(ckpt), reference(values, {}, **sizes))


MIXED = {"attn_v": Kind.Q6_K, "ffn_down": Kind.Q5_0, "token_embd": Kind.Q3_K, "output": Kind.IQ4_XS}


@pytest.mark.parametrize("tied", [False, True])
def test_a_mixed_file_keeps_each_tensors_own_type(tmp_path: Path, tied: bool) -> None:
    """A failure means that a Q4_K_M file gives another network, or is rounded to one type."""
    path, sizes = tmp_path / "model.gguf", {**BIG, "tied": tied}
    values = write_gguf(path, Kind.Q4_K, kinds=MIXED, **sizes)
    ckpt = open_gguf(path)
    found = {module.removeprefix("layers.0."): form for module, form in ckpt.forms.items()}
    assert found["attention.wv"] == form_of_kind("Q6_K")
    assert found["attention.wq"] == form_of_kind("Q4_K")
    assert found["tok_embeddings"] == form_of_kind("Q3_K")
    assert ("output" in found) != tied
    model = load(ckpt)
    assert_same_logits(model, reference(values, {}, **sizes))
    convert(str(path), str(tmp_path / "converted"))
    converted = open_checkpoint(tmp_path / "converted")
    assert converted.forms == ckpt.forms
    assert_same_logits(load(converted), reference(values, {}, **sizes))


def test_weights_are_decoded_where_kernels_join_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure means that loading takes memory, and the time to clear it, twice."""
    sizes = {**BIG, "tied": False}
    values = write_gguf(tmp_path / "model.gguf", Kind.Q4_K, kinds=MIXED, **sizes)
    joined: list[int] = []
    join = linear_layers._joined

    def counted(parts: list[torch.Tensor]) -> torch.Tensor:
        whole = join(parts)
        assert whole.data_ptr() == parts[0].data_ptr()
        assert torch.equal(whole, torch.cat(parts))
        if len(parts) > 1:
            joined.append(len(parts))
        return whole

    monkeypatch.setattr(linear_layers, "_joined", counted)
    model = load(open_gguf(tmp_path / "model.gguf"))
    assert joined == [2, 2, 2, 2, 2, 2] * model.params.n_layers  # wq and wk, w1 and w3: 3 tensors
    assert_same_logits(model, reference(values, {}, **sizes))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K"])
def test_a_weight_is_decoded_once_and_kept_once(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure means that loading takes several times as long, or that codes stay twice."""
    write_gguf(tmp_path / "model.gguf", Kind[name], **sizes_of(name))
    decoded: list[StoredWeight] = []

    def counted(*arguments: Any) -> StoredWeight:
        decoded.append(codes_of(*arguments))
        return decoded[-1]

    monkeypatch.setattr("llama.checkpoint.gguf.codes_of", counted)
    ckpt = open_gguf(tmp_path / "model.gguf")
    load(ckpt)
    assert len(decoded) == len(ckpt.forms)
    assert not any(decoded)
    [weights] = ckpt.parts
    part = weights["output.scales"]  # of a weight that is read again
    assert torch.equal(weights["output.scales"], part)


def test_types_without_affine_groups_are_widened_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A failure means that a file of 2 bits a weight takes 16 without a reason being given."""
    write_gguf(tmp_path / "mixed.gguf", Kind.Q4_K, kinds={"ffn_up": Kind.IQ2_XS}, **BIG)
    ckpt = open_gguf(tmp_path / "mixed.gguf")
    [message] = [record.getMessage() for record in caplog.records]
    assert "mixed.gguf has 1 weights of the types IQ2_XS" in message and "quantize=" in message
    assert "layers.0.feed_forward.w3" not in ckpt.forms
    args = arguments(ckpt)
    rounded = quantized(ckpt, args, make_scheme("int4", 32))
    assert set(rounded.forms.values()) == {Grouped(group_size=32)}
    caplog.clear()
    write_gguf(tmp_path / "plain.gguf", Kind.Q4_K, **BIG)
    open_gguf(tmp_path / "plain.gguf")
    assert not caplog.records


def test_an_adapter_is_merged_into_widened_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A failure means that adapters can't be merged into the files that most people have."""
    values = write_gguf(tmp_path / "model.gguf", Kind.Q4_1)
    network = reference(values, {})
    merged = write_adapter(network, tmp_path / "lora", {"target_modules": ["q_proj", "down_proj"]})
    ckpt = apply_adapter(open_gguf(tmp_path / "model.gguf"), tmp_path / "lora")
    assert not ckpt.forms and "its weights are widened to merge" in caplog.text
    assert_same_logits(load(ckpt), merged)
    convert(str(tmp_path / "model.gguf"), str(tmp_path / "int8"), quantize="int8")
    with pytest.raises(ValueError, match="is quantised, and an adapter can't be merged"):
        apply_adapter(open_checkpoint(tmp_path / "int8"), tmp_path / "lora")


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_1", "Q8_0", "Q2_K", "Q4_K", "Q6_K"])
def test_ranks_have_parts_of_the_codes(tmp_path: Path, name: str) -> None:
    """A failure means that processes read each other's groups of a quantised file."""
    write_gguf(tmp_path / "model.gguf", Kind[name], **BIG)
    ckpt = open_gguf(tmp_path / "model.gguf")
    args = arguments(ckpt)
    for module in ("layers.0.attention.wo", "layers.0.feed_forward.w1"):
        form = ckpt.forms[module]
        whole = {part: ckpt.rank_part(f"{module}.{part}", args, 0, 1) for part in form.dtypes()}
        halves = [
            form.dequantize(
                {part: ckpt.rank_part(f"{module}.{part}", args, rank, 2) for part in whole}
            )
            for rank in range(2)
        ]
        dim = 1 if module.endswith("wo") else 0
        assert torch.equal(torch.cat(halves, dim), form.dequantize(whole))


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


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({}, {}),
        ({"yarn_beta_fast": 0.5, "yarn_beta_slow": 0.05}, {"beta_fast": 0.5, "beta_slow": 0.05}),
        ({"yarn_attn_factor": 1.5}, {"attention_factor": 1.5}),
        ({"attn_factor": 1.25}, {"attention_factor": 1.25 * (0.1 * math.log(4) + 1)}),
    ],
    ids=str,
)
def test_yarn_scaling(tmp_path: Path, keys: dict[str, float], rope: dict[str, float]) -> None:
    """A file of a model that yarn stretched would be refused, or rotated otherwise."""

    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(16)
        for key, value in keys.items():
            writer.add_float32(f"llama.rope.scaling.{key}", value)

    values = write_gguf(tmp_path / "model.gguf", change=change)
    assert_same_logits(load(open_gguf(tmp_path / "model.gguf")), reference(values, YARN | rope))


def test_yarn_stretches_the_length_that_a_file_names_if_it_names_one_only(tmp_path: Path) -> None:
    """A yarn file without the length before it was stretched would be refused."""

    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_context_length(16)

    values = write_gguf(tmp_path / "model.gguf", change=change)
    assert_same_logits(load(open_gguf(tmp_path / "model.gguf")), reference(values, YARN))


ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
FEED_FORWARD = ("ffn_gate", "ffn_down", "ffn_up")


@pytest.mark.parametrize(
    "biased", [ATTENTION, FEED_FORWARD, (*ATTENTION, *FEED_FORWARD), ATTENTION[:3]], ids=str
)
def test_biases(tmp_path: Path, biased: tuple[str, ...]) -> None:
    """A file of a network with biases would be refused, or its queries' be added in a wrong order.

    Some files have biases for queries, keys and values only.
    """
    values = write_gguf(tmp_path / "model.gguf", biased=biased)
    if biased == ATTENTION[:3]:
        values |= {f"blk.{i}.attn_output.bias": torch.zeros(64) for i in range(2)}
    network = reference(values, {}, biased=biased)
    model = load(open_gguf(tmp_path / "model.gguf"))
    assert any(name.endswith("bias") for name in model.state_dict())
    assert_same_logits(model, network)


@pytest.mark.parametrize("rows", [len(BPE["vocab"]) + 9, len(BPE["vocab"]) - 9])
def test_embeddings_of_another_size_than_the_vocabulary(tmp_path: Path, rows: int) -> None:
    """A padded embedding, or one that lacks the last pieces, would be refused."""
    path = tmp_path / "model.gguf"
    change = functools.partial(add_byte_level, rule="smollm")
    values = write_gguf(path, change=change, vocab_size=rows)
    ckpt = open_gguf(path)
    assert_same_logits(load(ckpt), reference(values, {}, vocab_size=rows))
    llama = Llama.build(path, dtype=torch.float32, device="cpu")
    assert llama.model.params.vocab_size == rows
    assert llama.tokenizer.n_words == min(rows, len(BPE["vocab"]) + 1)
    assert llama.text_completion(["once"], max_gen_len=2)[0]["generation"] is not None


def test_config_json_alone_is_no_checkpoint_beside_a_gguf_file(tmp_path: Path) -> None:
    """A GGUF repository's directory, which has the model's config.json, would not load."""
    write_gguf(tmp_path / "model.gguf")
    for config in ("{}", '{"model_type": "mixtral"}'):
        (tmp_path / "config.json").write_text(config)
        assert open_checkpoint(tmp_path).names == [str(tmp_path / "model.gguf")]
    write_gguf(tmp_path / "other.gguf")
    with pytest.raises(ValueError, match=r"several GGUF files.*model.gguf, other.gguf"):
        open_checkpoint(tmp_path)
    save_hf(make_hf(), tmp_path)
    assert open_checkpoint(tmp_path).names == [str(tmp_path)]


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


def test_plain_weights_stay_mapped_and_quantised_ones_are_read(tmp_path: Path) -> None:
    """A failure means that a file's weights take memory twice."""
    write_gguf(tmp_path / "plain.gguf", Kind.F16)
    ckpt = open_gguf(tmp_path / "plain.gguf")
    model = load(ckpt, torch.float16)
    mapped = ckpt.mapped("output.weight")[0]
    assert model.output.weight.data_ptr() == mapped.data_ptr()
    write_gguf(tmp_path / "q8.gguf", Kind.Q8_0)
    ckpt = open_gguf(tmp_path / "q8.gguf")
    assert ckpt.mapped("output.weight")[0].nbytes == 60 * 64 * 34 // 32
    stored = load(ckpt, None).output.stored()
    assert stored["weight"].dtype == torch.int8 and stored["weight"].shape == (60, 64)


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
    "bias": (
        {"tensors": {"blk.0.attn_norm.bias": np.zeros(64, np.float32)}},
        "has the unexpected layers.0.attention_norm.bias",
    ),
    "short bias": (
        {"tensors": {"blk.0.attn_q.bias": np.zeros(60, np.float32)}},
        r"layers.0.attention.wq.bias in .* has the shape \(60,\)",
    ),
    "fused": (
        {"tensors": {"blk.0.attn_qkv.weight": np.zeros((4, 4), np.float32)}},
        "has the unexpected blk.0.attn_qkv.weight",
    ),
    "quantisation": (
        {"tensors": {"rope_freqs.weight": np.zeros(8, np.int32)}},
        "rope_freqs.weight in the type I32: known are F32, F16, BF16, Q4_0",
    ),
    "longrope": (
        {"change": lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)},
        "llama.rope.scaling.type = 'longrope': known are none, linear, yarn and rope_freqs.weight",
    ),
    "yarn": (
        {"change": lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)},
        "rope_scaling of the kind yarn in .* needs exactly factor, original_max_position_e",
    ),
    "yarn and a table": (
        {
            "change": lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN),
            "tensors": {"rope_freqs.weight": np.ones(8, np.float32)},
        },
        "'yarn' beside rope_freqs.weight",
    ),
    "extrapolation": (
        {"change": lambda writer: writer.add_rope_scaling_yarn_ext_factor(0.5)},
        "llama.rope.scaling.yarn_ext_factor = 0.5",
    ),
    "partial": (
        {"change": lambda writer: writer.add_value_length(8)},
        "llama.attention.value_length = 8: expected the size of all of a head, 16",
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
    shape = data.index(b"blk.0.ffn_up.weight") + 23  # behind the name and the number of dimensions
    no_rows = struct.pack("<QQ", 1 << 63, 0)
    broken = {
        "no GGUF file: it begins with b'PK": b"PK\x03\x04" + data[4:],
        "no GGUF file: it begins with b''": b"",
        "version 1: expected version 2 or 3": data[:4] + struct.pack("<I", 1) + data[8:],
        "for big-endian machines": data[:4] + struct.pack(">I", 3) + data[8:],
        "is damaged or incomplete .*or is listed twice": claim(data, 8, 1 << 60),
        "damaged or incomplete": claim(data, 16, 1 << 60),
        "bytes are announced after": claim(data, key - 8, 1 << 62),
        "doesn't fit": data[:-200],
        "has the shape ": data[:shape] + no_rows + data[shape + 16 :],
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


@pytest.mark.slow
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
