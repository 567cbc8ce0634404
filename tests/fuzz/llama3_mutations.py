"""Sound directories of Meta's Llama 3, and damage of what they have of their own."""

import json
import random
from pathlib import Path
from typing import Any

import json_mutations
import torch
from mutations import ODD_INTS, Files, Tensors, _content, _load, _save, _shard

from llama import ModelArgs, Transformer, parallel
from llama.checkpoint.sharding import split_dim

PARAMS: dict[str, Any] = {
    "dim": 32,
    "n_layers": 1,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 576,
    "ffn_dim_multiplier": 1.3,
    "multiple_of": 32,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
}


def llama3_bases() -> dict[str, Files]:
    """Directories of one file and of two, whose embedding is cut by the vocabulary."""
    from tiktoken_files import small_tiktoken

    parallel.initialize(torch.device("cpu"))
    model = Transformer(ModelArgs(**PARAMS, max_batch_size=1, max_seq_len=8))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    bases: dict[str, Files] = {}
    for name, parts, scaled in (("one", 1, False), ("scaled", 1, True), ("two", 2, True)):
        params = {**PARAMS, "use_scaled_rope": True} if scaled else PARAMS
        bases[name] = {
            "params.json": json_mutations.dump(params),
            "tokenizer.model": small_tiktoken(),
        }
        for part in range(parts):
            tensors = {}
            for key, parameter in model.named_parameters():
                weight = parameter.detach()
                dim = 0 if key.startswith("tok_embeddings") else split_dim(key)
                piece = weight if dim is None else weight.chunk(parts, dim)[part]
                tensors[key] = piece.contiguous().clone()
            bases[name][f"consolidated.{part:02d}.pth"] = _save(tensors)
    return bases


def pieces(rng: random.Random, files: Files, marker: Path) -> str:
    """Lines of the vocabulary: pieces, ids, their order and number."""
    lines = _content(files, "tokenizer.model").splitlines()
    kind = rng.choice(("drop", "most", "repeat", "many", "shuffle", "id", "piece", "line", "long"))
    at = rng.randrange(len(lines))
    if kind == "drop":
        del lines[at]
    elif kind == "most":
        lines = lines[: rng.choice((0, 1, 255, 256))]
    elif kind == "repeat":
        lines.append(lines[at])
    elif kind == "many":
        lines += [b"%s %d" % (b"QUFB", i) for i in range(len(lines), 10**5)]
    elif kind == "shuffle":
        rng.shuffle(lines)
    elif kind == "id":
        ids = (*(b"%d" % n for n in ODD_INTS), b"x", b"", b"1.5", b"9" * 5000, b"\xd9\xa1")
        lines[at] = lines[at].split()[0] + b" " + rng.choice(ids)
    elif kind == "piece":
        texts = (b"", b"=", b"====", b"Q", b"\xff\xfe", b"QQ==\0", b"A" * 4 * 10**5, b"Q\x1b[2J")
        lines[at] = rng.choice(texts) + b" %d" % at
    elif kind == "line":
        lines[at] = rng.choice((b"", b" ", b"a b c", b"\0", b"\xff" * 99, b"<html>", b"{"))
    else:
        lines = [b"A" * 10**7 + b" 0"]
    ends = rng.choice((b"\n", b"\n", b"\r\n", b"\r", b"\n\n"))
    files["tokenizer.model"] = ends.join(lines)
    return f"tiktoken's pieces: {kind} {at}"


def settings(rng: random.Random, files: Files, marker: Path) -> str:
    """Keys that Llama 3's params.json has, or those of other models of its kind."""
    params = json.loads(_content(files, "params.json"))
    odd: tuple[Any, ...] = (*ODD_INTS, True, False, None, "x", [], {}, 0.5, float("nan"))
    keys = ("use_scaled_rope", "rope_theta", "attention_bias", "mlp_bias", "rope_scaling", "labels")
    keys += ("quantization_args", "lora_args", "moe_args", "vision_chunk_size", "head_dim")
    keys += ("tie_word_embeddings", "ffn_dim_multiplier", "multiple_of", "max_seq_len")
    done = []
    for _ in range(rng.choice((1, 1, 2))):
        key = rng.choice(keys)
        params[key] = rng.choice(odd)
        if key == "rope_scaling" and rng.random() < 0.8:
            params[key] = rope_scaling(rng)
        done.append(f"{key} {ascii(params[key])[:60]}")
    files["params.json"] = json_mutations.dump(params)
    return f"params.json: {', '.join(done)}"


def rope_scaling(rng: random.Random) -> dict[str, Any]:
    """A scaling of any kind with odd numbers."""
    numbers = (1.0, 2.0, 8, 64, 0, -1, 1e-300, 1e308, float("nan"), 2**31, 2**63, "x", None, True)
    kind = rng.choice(("linear", "llama3", "yarn", "dynamic", "longrope", "factors", "x", 3))
    lists = ([1.0] * 4, [], [0.0] * 4, [float("inf")] * 4, [1.0] * 10**5, "x", [None] * 4)
    names = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "truncate"),
        "dynamic": ("factor",),
        "longrope": ("factor", "attention_factor"),
    }.get(str(kind), ())
    scaling: dict[str, Any] = {"rope_type": kind}
    scaling |= {name: rng.choice(numbers[:4]) for name in names}
    if kind in ("llama3", "yarn", "dynamic", "longrope"):
        scaling["original_max_position_embeddings"] = rng.choice((64, *numbers))
    if kind == "longrope":
        scaling |= {name: rng.choice(lists) for name in ("short_factor", "long_factor")}
    if kind == "factors":
        scaling["factors"] = rng.choice(lists)
    if rng.random() < 0.5:
        scaling[rng.choice(sorted(scaling))] = rng.choice(numbers)
    return scaling


def cuts(rng: random.Random, files: Files, marker: Path) -> str:
    """Tensors cut along another dimension or in uneven parts, and biases."""
    name = _shard(rng, files)
    tensors: Tensors = _load(_content(files, name))
    key = rng.choice(("tok_embeddings.weight", "output.weight", rng.choice(sorted(tensors))))
    kind = rng.choice(("rows", "columns", "half", "more", "tied", "bias", "wrapped", "other"))
    t = tensors[key]
    if kind == "rows":
        tensors[key] = t[: rng.randrange(len(t) + 1)].clone()
    elif kind == "columns":
        tensors[key] = t[..., : rng.randrange(t.shape[-1] + 1)].clone()
    elif kind == "half":
        tensors[key] = t.chunk(2, -1)[0].clone()
    elif kind == "more":
        tensors[key] = torch.cat((t, t))
    elif kind == "tied":
        tensors["output.weight"] = tensors["tok_embeddings.weight"]
    elif kind == "bias":
        tensors[key.replace("weight", "bias")] = torch.zeros(rng.choice((0, 1, len(t))))
    elif kind == "wrapped":
        wrapper = rng.choice(("module.", "_orig_mod.", "model.", "module._orig_mod.", ".", "model"))
        tensors = {wrapper + n: t for n, t in tensors.items()}
        if rng.random() < 0.3:
            tensors[key] = t
    else:
        others = [n for n in files if n.endswith(".pth")]
        files[name] = files[rng.choice(others)]
        return f"{name} is another part"
    files[name] = _save(tensors)
    return f"{kind} of {key} in {name}"
