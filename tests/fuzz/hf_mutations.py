"""Sound Hugging Face directories, and damage of their JSON, templates and safetensors files."""

import json
import random
import struct
from pathlib import Path
from typing import Any

import json_mutations
import torch
from mutations import ODD_INTS, Files, Special, _content, _save, any_bytes
from safetensors.torch import save

from llama.generation import TINY

DIM, HIDDEN, HEADS, KV_HEADS, LAYERS, VOCAB = 32, 48, 4, 2, 2, 768
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": DIM,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": DIM // HEADS,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": [2],
}
GENERATION = {"eos_token_id": [2, 3], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
LAYER_SHAPES = {
    "self_attn.q_proj": (DIM, DIM),
    "self_attn.k_proj": (DIM // 2, DIM),
    "self_attn.v_proj": (DIM // 2, DIM),
    "self_attn.o_proj": (DIM, DIM),
    "mlp.gate_proj": (HIDDEN, DIM),
    "mlp.up_proj": (HIDDEN, DIM),
    "mlp.down_proj": (DIM, HIDDEN),
    "input_layernorm": (DIM,),
    "post_attention_layernorm": (DIM,),
}


def hf_tensors(vocab: int = VOCAB) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, DIM),
        "model.norm.weight": (DIM,),
        "lm_head.weight": (vocab, DIM),
    }
    for i in range(LAYERS):
        shapes |= {f"model.layers.{i}.{n}.weight": shape for n, shape in LAYER_SHAPES.items()}
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def hf_bases() -> dict[str, Files]:
    """Directories as transformers writes them: one file, parts with an index, PyTorch's."""
    from json_tokenizers import byte_level

    spm = (TINY / "tokenizer.model").read_bytes()
    tokenizer = byte_level()
    vocab = len(tokenizer["model"]["vocab"]) + len(tokenizer["added_tokens"])
    added = {str(t["id"]): t for t in tokenizer["added_tokens"]}
    tensors = hf_tensors()
    names = [f"model-{i + 1:05d}-of-00002.safetensors" for i in range(2)]
    small = hf_tensors(vocab)
    halves = [dict(list(small.items())[i::2]) for i in range(2)]
    weight_map = {name: file for file, half in zip(names, halves, strict=True) for name in half}
    size = sum(t.nbytes for t in small.values())
    dump = json_mutations.dump
    return {
        "single": {
            "config.json": dump(CONFIG),
            "model.safetensors": save(tensors, {"format": "pt"}),
            "tokenizer.model": spm,
            "tokenizer_config.json": dump(
                {
                    "tokenizer_class": "LlamaTokenizer",
                    "bos_token": "<s>",
                    "eos_token": {"content": "</s>", "lstrip": False, "special": True},
                    "legacy": False,
                    "added_tokens_decoder": {"2": {"content": "</s>", "special": True}},
                    "chat_template": TEMPLATE,
                }
            ),
            "special_tokens_map.json": dump({"bos_token": "<s>", "eos_token": "</s>"}),
            "added_tokens.json": dump({"</s>": 2}),
            "generation_config.json": dump(GENERATION),
        },
        "parts": {
            "config.json": dump({**CONFIG, "vocab_size": vocab}),
            **{n: save(half, {"format": "pt"}) for n, half in zip(names, halves, strict=True)},
            "model.safetensors.index.json": dump(
                {"metadata": {"total_size": size}, "weight_map": weight_map}
            ),
            "tokenizer.json": dump(tokenizer),
            "tokenizer_config.json": dump(
                {
                    "tokenizer_class": "PreTrainedTokenizerFast",
                    "bos_token": "<|begin_of_text|>",
                    "eos_token": "<|eot_id|>",
                    "added_tokens_decoder": added,
                }
            ),
            "added_tokens.json": dump({t["content"]: t["id"] for t in added.values()}),
            "chat_template.jinja": TEMPLATE.encode(),
            "generation_config.json": dump(GENERATION),
        },
        "pytorch": {
            "config.json": dump({**CONFIG, "rope_scaling": None, "attention_bias": False}),
            "pytorch_model.bin": _save({n: t.bfloat16() for n, t in tensors.items()}),
            "tokenizer.model": spm,
        },
    }


# JSON.


def _json_names(files: Files) -> list[str]:
    return sorted(n for n, c in files.items() if n.endswith(".json") and isinstance(c, bytes))


def json_values(rng: random.Random, files: Files, marker: Path) -> str:
    name = rng.choice(_json_names(files))
    data, done = json_mutations.change(rng, json.loads(_content(files, name)))
    files[name] = json_mutations.dump(data)
    return f"{name}: {done}"


def config_values(rng: random.Random, files: Files, marker: Path) -> str:
    name = next(n for n in files if n in ("config.json", "adapter_config.json", "params.json"))
    data, done = json_mutations.change(rng, json.loads(_content(files, name)))
    files[name] = json_mutations.dump(data)
    return f"{name}: {done}"


def json_texts(rng: random.Random, files: Files, marker: Path) -> str:
    name = rng.choice(_json_names(files))
    files[name], done = json_mutations.odd_text(rng, _content(files, name))
    return f"{name}: {done}"


def tokenizer_json(rng: random.Random, files: Files, marker: Path) -> str:
    """Parts of a tokenizer.json that a program interprets: patterns, merges, pipelines."""
    if "tokenizer.json" not in files:
        return json_values(rng, files, marker)
    data = json.loads(_content(files, "tokenizer.json"))
    regex = {"Regex": rng.choice(json_mutations.REGEXES)}
    split = {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}
    huge = rng.choice((10**5, 2**31, 2**63))
    parts: dict[str, Any] = {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, data["pre_tokenizer"]]},
        "normalizer": rng.choice(
            (
                {"type": "Replace", "pattern": regex, "content": "x" * 1000},
                {"type": "Replace", "pattern": {"String": ""}, "content": "xx"},
                {"type": "Prepend", "prepend": "▁" * 10**5},
                {"type": "Precompiled", "precompiled_charsmap": "AAAA" * 100},
                {"type": "Nmt"},
            )
        ),
        "decoder": rng.choice(
            (
                {"type": "Strip", "content": "x", "start": huge, "stop": huge},
                {"type": "Replace", "pattern": regex, "content": "y"},
                {"type": "WordPiece", "prefix": "##", "cleanup": True},
                {"type": "CTC"},
            )
        ),
        "post_processor": rng.choice(
            (
                {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
                {"type": "RobertaProcessing", "sep": ["a", huge], "cls": ["b", -1]},
                {"type": "BertProcessing", "sep": ["a", 1], "cls": ["b", 2]},
            )
        ),
        "truncation": {"max_length": 0, "strategy": "LongestFirst", "stride": huge},
        "padding": {"strategy": {"Fixed": huge}, "direction": "Left", "pad_id": 0},
        "added_tokens": [*data["added_tokens"], {"id": huge, "content": "a", "special": False}],
        "model": rng.choice(
            (
                {**data["model"], "merges": [["a", "nothing"]]},
                {**data["model"], "merges": ["a"]},
                {**data["model"], "dropout": 0.5},
                {**data["model"], "vocab": {}},
                {**data["model"], "vocab": {**data["model"]["vocab"], "new": huge}},
                {**data["model"], "vocab": dict.fromkeys(data["model"]["vocab"], 1)},
                {"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]]},
                {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "[UNK]"},
            )
        ),
    }
    key = rng.choice(sorted(parts))
    data[key] = parts[key]
    files["tokenizer.json"] = json_mutations.dump(data)
    return f"tokenizer.json: {key} {json.dumps(parts[key])[:60]}"


def templates(rng: random.Random, files: Files, marker: Path) -> str:
    """Chat templates that would run code, never end or fill the memory."""
    shell = f"touch {marker}"
    texts = (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('" + shell + "').read() }}",
        "{{ self.__init__.__globals__.__builtins__.open('" + str(marker) + "', 'w') }}",
        "{{ messages.__class__.__base__ }}",
        "{{ raise_exception.__globals__['os'].system('" + shell + "') }}",
        "{% import 'os' as os %}{{ os.system('" + shell + "') }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{% for i in range(9999) %}{% for j in range(9999) %}x{% endfor %}{% endfor %}",
        "{{ 'x' * 10 ** 10 }}",
        "{{ 10 ** 10 ** 9 }}",
        "{{ 'x' | center(10 ** 10) }}",
        "{{ '%0999999999d' % 1 }}",
        "{{ '{:>999999999}'.format('x') }}",
        "{{ messages | tojson(indent=10 ** 9) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set a = [1] %}{% for i in range(99) %}{% set a = a + a %}{% endfor %}{{ a }}",
        "{% set ns = namespace(a='x') %}{% for i in range(99) %}{% set ns.a = ns.a ~ ns.a %}"
        "{% endfor %}{{ ns.a }}",
        "{% if %}",
        "{{",
        "{{ nothing.at.all }}",
        "{{ messages[10 ** 9] }}",
        "{{ raise_exception('no\n\x1b[2J') }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% if true %}" * 3000 + "{% endif %}" * 3000,
        "{{ 1" + " + 1" * 10**4 + " }}",
        "x" * 10**6,
        "",
        "\ud800".encode("utf-8", "surrogatepass").decode("latin1"),
    )
    text = rng.choice(texts)
    if "chat_template.jinja" in files and rng.random() < 0.7:
        content = text.encode()
        files["chat_template.jinja"] = content if rng.random() < 0.9 else content + b"\xff"
    else:
        name = "tokenizer_config.json"
        config = json.loads(_content(files, name)) if name in files else {}
        lists = ([{"name": "default", "template": text}], [text], {"default": text}, text)
        config["chat_template"] = rng.choice(lists)
        files["tokenizer_config.json"] = json_mutations.dump(config)
    return f"template {ascii(text)[:60]}"


# safetensors.


def _split_safetensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def safetensors_header(rng: random.Random, files: Files, marker: Path) -> str:
    """Shapes, types, places and names in the header; its length."""
    names = sorted(n for n, c in files.items() if n.endswith(".safetensors") and type(c) is bytes)
    if not names:
        return any_bytes(rng, files, marker)
    name = rng.choice(names)
    header, body = _split_safetensors(_content(files, name))
    key = rng.choice([k for k in header if k != "__metadata__"])
    entry = header[key]
    kind = rng.choice(
        ("shape", "dtype", "place", "drop", "rename", "add", "metadata", "alias", "json", "length")
    )
    length = None
    if kind == "shape":
        n = rng.choice((*ODD_INTS, 10**400))
        entry["shape"] = rng.choice(([n], [n, 0], [n, n], [], [1] * 99, "x", None, [1, -1], [2.5]))
    elif kind == "dtype":
        kinds = ("F64", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "F4", "Q4", "", None, 7)
        entry["dtype"] = rng.choice(kinds)
    elif kind == "place":
        n = rng.choice(ODD_INTS)
        entry["data_offsets"] = rng.choice(([0, n], [n, n], [n, 0], [], None, "x", [0, len(body)]))
    elif kind in ("drop", "rename", "add"):
        moved = header[key] if kind == "add" else header.pop(key)
        if kind != "drop":
            ends = ("qweight", "weight_scale", "bias", "lora_A.weight", "weight.absmax", "inv_freq")
            new = ("", "\0", "\n\x1b[2J", "x" * 10**5, "\ud800", f"{key}.{rng.choice(ends)}")
            header[rng.choice((*new, f"module.{key}", f"_orig_mod.{key}", key.upper()))] = moved
    elif kind == "metadata":
        header["__metadata__"] = rng.choice(({"format": "mlx"}, {"format": 3}, [], "x", {"a": {}}))
    elif kind == "alias":
        first = next(e for k, e in header.items() if k != "__metadata__")
        header = {k: first for k in header if k != "__metadata__"}
    elif kind == "json":
        header, _ = json_mutations.change(rng, header)
    else:
        length = rng.choice((*ODD_INTS, 99, len(body)))
    packed = json_mutations.dump(header)
    if rng.random() < 0.1:
        packed = rng.choice((b"", b"[]", b"{}", b"[" * 10**5, packed + b" " * 10**5, packed[:-1]))
    size = (len(packed) if length is None else length) % 2**64
    files[name] = struct.pack("<Q", size) + packed + body
    return f"safetensors {kind} {ascii(key)[:40]} in {name}"


def index_values(rng: random.Random, files: Files, marker: Path) -> str:
    name = "model.safetensors.index.json"
    if name not in files:
        return json_values(rng, files, marker)
    index = json.loads(_content(files, name))
    where = index["weight_map"]
    key = rng.choice(sorted(where))
    odd = ("../x", "/etc/passwd", "..", "", "\0", "x" * 5000, "config.json", None, 3, [], "\ud800")
    kind = rng.choice(("file", "drop", "add", "size", "map", "loop"))
    if kind == "file":
        where[key] = rng.choice(odd)
    elif kind == "drop":
        del where[key]
    elif kind == "add":
        where[rng.choice(("", "extra", "\n", "x" * 10**5))] = where[key]
    elif kind == "size":
        index["metadata"] = rng.choice(({"total_size": rng.choice(ODD_INTS)}, {}, [], None, "x"))
    elif kind == "map":
        index["weight_map"] = rng.choice(({}, [], None, "x", dict.fromkeys(where, where[key])))
    else:
        files[where[key]] = rng.choice(list(Special))
    files[name] = json_mutations.dump(index)
    return f"index: {kind} {key}"


def special_files(rng: random.Random, files: Files, marker: Path) -> str:
    name = rng.choice(sorted(files))
    odd: tuple[Any, ...] = (*Special, b"", b"\0", b"version https://git-lfs.github.com/spec/v1\n")
    odd += (b"<!DOCTYPE html>", b"PK\3\4" + bytes(99), b"tjgg\3\0\0\0", b"\x1f\x8b" + bytes(99))
    files[name] = content = rng.choice(odd)
    return f"{name} is {content!r:.60}"


def renamed(rng: random.Random, files: Files, marker: Path) -> str:
    """Files under other names, or beside files of other formats."""
    name = rng.choice(sorted(files))
    content = files[name]
    kind = rng.choice(("rename", "copy", "drop", "beside", "only", "below"))
    others = ("model.gguf", "consolidated.00.pth", "pytorch_model.bin", "model.safetensors")
    others += ("params.json", "tokenizer.json", "tokenizer.model", "adapter_config.json", "x.bin")
    if kind in ("rename", "drop"):
        del files[name]
    if kind in ("rename", "copy"):
        files[rng.choice((*others, *files))] = content
    elif kind == "beside":
        beside = ("model.onnx", "model_index.json", "quantize_config.json", "x.incomplete", "a.zip")
        files[rng.choice((*beside, *others))] = rng.choice((b"", b"{}", b"x" * 100, content))
    elif kind == "only":
        files.clear()
        files[name] = content
    elif kind == "below":
        folder = rng.choice(("model", "snapshots/abc", ".git", "a/b/c"))
        moved = {f"{folder}/{n}": c for n, c in files.items() if isinstance(c, bytes)}
        files.clear()
        files.update(moved)
    return f"{kind} {name}"
