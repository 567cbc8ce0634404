"""GGUF files that tests write: random weights, vocabularies trained on the spot."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers import pre_tokenizers

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
    "biased": (),
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
        found |= {f"blk.{i}.{name}.bias": block[name][:1] for name in sizes["biased"]}
    found["output_norm.weight"] = (dim,)
    if not sizes["tied"]:
        found["output.weight"] = (sizes["vocab_size"], dim)
    return found


# A scale that gives weights of a tenth, and where blocks hold float16 scales.
SCALES: dict[str, tuple[float, ...]] = {
    "Q4_0": (2e-2, 0),
    "Q4_1": (2e-2, 0, 2),
    "Q5_0": (1e-2, 0),
    "Q5_1": (1e-2, 0, 2),
    "Q8_0": (1e-3, 0),
    "Q2_K": (3e-3, 80, 82),
    "Q3_K": (1e-3, 108),
    "Q4_K": (2e-4, 0, 2),
    "Q5_K": (1e-4, 0, 2),
    "Q6_K": (5e-5, 208),
    "IQ4_NL": (1e-3, 0),
    "IQ4_XS": (5e-5, 0),
    "TQ1_0": (0.1, 52),
    "TQ2_0": (0.1, 64),
    "IQ1_S": (2e-2, 0),
    "IQ1_M": (2e-2,),
    "IQ2_XXS": (2e-3, 0),
    "IQ2_XS": (2e-3, 0),
    "IQ2_S": (2e-3, 0),
    "IQ3_XXS": (1e-3, 0),
    "IQ3_S": (5e-4, 0),
    "MXFP4": (3e-2,),
    "NVFP4": (3e-2,),
}


def random_blocks(
    kind: Kind,
    shape: tuple[int, ...],
    rng: np.random.Generator,
    scales: Callable[[tuple[int, ...]], np.ndarray] | None = None,
) -> np.ndarray:
    """Bytes of any quantisation: most can't be made from numbers in Python."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (shape[0], shape[1] // block, size), dtype=np.uint8)
    usual, *places = SCALES[kind.name]
    for at in map(int, places):
        one = (*blocks.shape[:2], 1)
        scale = rng.uniform(0.5, 1.5, one) * usual if scales is None else scales(one)
        blocks[..., at : at + 2] = scale.astype(np.float16).view(np.uint8)
    if kind == Kind.IQ1_M:  # four bits of the scale in each of four words
        blocks[..., 49::2] = blocks[..., 49::2] & 15 | np.uint8([0x00, 0x20, 0x40, 0x20])
    elif kind == Kind.MXFP4:  # powers of two
        blocks[..., 0] = rng.integers(121, 125, blocks.shape[:2])
    elif kind == Kind.NVFP4:
        blocks[..., :4] = rng.integers(16, 30, (*blocks.shape[:2], 4))
    return blocks.reshape(shape[0], -1)


def write_gguf(
    path: Path,
    kind: Kind = Kind.F32,
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    without: str | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    architecture: str = "llama",
    kinds: dict[str, Kind] | None = None,
    **sizes: Any,
) -> dict[str, torch.Tensor]:
    """Write a file with random weights; gives what they are worth in float32.

    Matrices are of one kind, but for those of some modules, by name, that ``kinds`` gives others.
    """
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
        else:
            stored = (kinds or {}).get(name.split(".")[-2], kind)
            if stored.name.endswith(("_0", "_1", "F16", "F32")):
                plain = rng.normal(0, 0.15, shape).astype(np.float32)
                data = gguf.quants.quantize(plain, stored)
            else:
                data = random_blocks(stored, shape, rng)
        writer.add_tensor(name, data, raw_dtype=stored)
        values[name] = torch.from_numpy(gguf.quants.dequantize(data, stored).copy()).view(shape)
    for name, data in (tensors or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


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
