"""Sound checkpoints and adapters of the other formats, and the damage that is theirs alone."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import json_mutations
import torch
from mutations import (
    ODD_INTS,
    Files,
    Special,
    _content,
    _save,
    any_bytes,
    damage,
    malicious,
    pickle_bombs,
    pickle_bytes,
    pickle_calls,
    tensor_names,
    tensor_values,
    zip_headers,
)
from safetensors.torch import save

from llama.generation import TINY

Mutator = Callable[[random.Random, Files, Path], str]

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


# GGUF.

_SIZES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def gguf_bases(folder: Path) -> dict[str, Files]:
    """Files of random weights: a byte-level vocabulary, and SentencePiece's."""
    import gguf
    from gguf_files import BPE, add_byte_level, write_gguf

    spm = Path(TINY / "tokenizer.model").read_bytes()
    vocab = len(BPE["vocab"]) + 1
    kinds = gguf.GGMLQuantizationType

    def byte_level(writer: Any) -> None:
        add_byte_level(writer, "smollm")
        writer.add_chat_template(TEMPLATE)

    def pieces(writer: Any) -> None:
        from sentencepiece import SentencePieceProcessor

        model = SentencePieceProcessor(model_proto=spm)
        ids = range(model.vocab_size())
        types = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 1 for i in ids]
        types = [6 if model.is_byte(i) else kind for i, kind in zip(ids, types, strict=True)]
        writer.add_tokenizer_model("llama")
        writer.add_token_list([model.id_to_piece(i) for i in ids])
        writer.add_token_scores([model.get_score(i) for i in ids])
        writer.add_token_types(types)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)

    paths = {name: folder / f"{name}.gguf" for name in ("bytes", "pieces", "quantised")}
    write_gguf(paths["bytes"], kinds.F16, byte_level, vocab_size=vocab, n_layers=1)
    write_gguf(paths["pieces"], kinds.F32, pieces, vocab_size=VOCAB, n_layers=1)
    sizes = {"dim": 256, "hidden_dim": 256, "head_dim": 64, "vocab_size": vocab, "n_layers": 1}
    write_gguf(paths["quantised"], kinds.Q4_K, byte_level, **sizes)
    return {name: {"model.gguf": path.read_bytes()} for name, path in paths.items()}


def _read_gguf(data: bytes) -> tuple[list[list[Any]], list[list[Any]], bytes]:
    """Keys with their types and values, tensors' entries, and the data behind them."""
    at = 24
    n_tensors, n_values = struct.unpack_from("<QQ", data, 8)

    def number(code: str) -> Any:
        nonlocal at
        at += struct.calcsize(f"<{code}")
        return struct.unpack_from(f"<{code}", data, at - struct.calcsize(f"<{code}"))[0]

    def text() -> bytes:
        nonlocal at
        size = number("Q")
        at += size
        return data[at - size : at]

    def value(kind: int) -> Any:
        if kind == 8:
            return text()
        if kind == 9:
            inner, count = number("I"), number("Q")
            return inner, [value(inner) for _ in range(count)]
        return number(_SIZES[kind])

    values = []
    for _ in range(n_values):
        key, kind = text(), number("I")
        values.append([key, kind, value(kind)])
    tensors = []
    for _ in range(n_tensors):
        name = text()
        shape = [number("Q") for _ in range(number("I"))]
        tensors.append([name, shape, number("I"), number("Q")])
    return values, tensors, data[-(-at // 32) * 32 :]


def _write_gguf(values: list[list[Any]], tensors: list[list[Any]], body: bytes) -> bytes:
    def number(code: str, value: Any) -> bytes:
        if code not in "fd?" and isinstance(value, int):
            value %= 256 ** struct.calcsize(f"<{code}")
            return value.to_bytes(struct.calcsize(f"<{code}"), "little")
        return struct.pack(f"<{code}", value)

    def packed(kind: int, value: Any) -> bytes:
        if kind == 8:
            return number("Q", len(value)) + value
        if kind == 9:
            inner, items = value
            return (
                number("I", inner)
                + number("Q", len(items))
                + b"".join(packed(inner, item) for item in items)
            )
        return number(_SIZES.get(kind, "Q"), value)

    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
    for key, kind, value in values:
        out += number("Q", len(key)) + key + number("I", kind) + packed(kind, value)
    for name, shape, kind, offset in tensors:
        out += number("Q", len(name)) + name + number("I", len(shape))
        out += b"".join(number("Q", n) for n in shape) + number("I", kind) + number("Q", offset)
    return out + bytes(-len(out) % 32) + body


def gguf_values(rng: random.Random, files: Files, marker: Path) -> str:
    """Other values, types and keys of the metadata."""
    values, tensors, body = _read_gguf(_content(files, "model.gguf"))
    done = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        entry = rng.choice(values)
        key, kind, value = entry
        change = rng.choice(("value", "value", "value", "kind", "drop", "repeat", "rename", "add"))
        done.append(f"{change} {key.decode(errors='replace')[:40]}")
        if change == "drop":
            values.remove(entry)
        elif change == "repeat":
            values.append(list(entry))
        elif change == "rename":
            entry[0] = rng.choice((b"", b"\xff", key.upper(), b"x" * 10**5, b"general.alignment"))
        elif change == "add":
            values.append(list(rng.choice(_MORE_KEYS)))
        elif change == "kind":
            kind = rng.choice((4, 5, 6, 7, 8, 10, 12))
            entry[1:] = [kind, rng.choice((b"", b"llama", b"\xff\n\x1b[2J")) if kind == 8 else 1]
        elif kind == 8:
            texts = (b"", b"llama", b"gpt2", b"\xff", b"\0", b"x" * 10**5, b"default", b"\n\x1b[2J")
            entry[2] = rng.choice(texts)
        elif kind == 9:
            entry[2] = _odd_array(rng, *value)
        elif kind in (6, 12):
            entry[2] = rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e-38, 3e38))
        elif kind == 7:
            entry[2] = not value
        else:
            entry[2] = rng.choice(ODD_INTS)
    files["model.gguf"] = _write_gguf(values, tensors, body)
    return f"gguf values: {', '.join(done)}"


_MORE_KEYS = (
    (b"llama.expert_count", 4, 8),
    (b"llama.rope.scaling.type", 8, b"yarn"),
    (b"llama.rope.scaling.factor", 6, float("nan")),
    (b"llama.rope.scaling.original_context_length", 4, 0),
    (b"split.count", 2, 65535),
    (b"general.alignment", 4, 2**31),
    (b"tokenizer.ggml.eot_token_id", 4, 2**32 - 1),
    (b"tokenizer.ggml.add_bos_token", 7, False),
    (b"tokenizer.chat_template", 8, b"{{ 'x' * 10 ** 10 }}"),
    (b"tokenizer.chat_template", 8, b"{{ ''.__class__.__mro__ }}"),
    (b"tokenizer.ggml.token_type", 9, (5, [3] * 10)),
)


def _odd_array(rng: random.Random, kind: int, items: list[Any]) -> tuple[int, list[Any]]:
    items = list(items)
    change = rng.choice(("empty", "cut", "repeat", "shuffle", "same", "odd"))
    if change == "empty":
        return kind, []
    if change == "cut":
        return kind, items[: rng.randrange(len(items) + 1)]
    if change == "repeat":
        return kind, items * rng.choice((2, 20))
    if change == "shuffle":
        rng.shuffle(items)
        return kind, items
    if change == "same":
        return kind, items[:1] * len(items)
    for at in rng.sample(range(len(items)), min(len(items), rng.choice((1, 5)))):
        if kind == 8:
            odd: Any = (b"", b"\xff\xfe", b"a b c", b"a" * 10**5, b"<s>", b"\0", b"<0x00>", b" ")
        else:
            odd = (0, 1, 3, 6) if kind in _SIZES and kind not in (6, 12) else (0.0, float("nan"))
        items[at] = rng.choice(odd)
    return kind, items


def gguf_tensors(rng: random.Random, files: Files, marker: Path) -> str:
    """Other shapes, types, places and names of tensors."""
    values, tensors, body = _read_gguf(_content(files, "model.gguf"))
    entry = rng.choice(tensors)
    change = rng.choice(("shape", "kind", "place", "name", "drop", "repeat", "swap"))
    what = f"gguf tensors: {change} {entry[0].decode()}"
    if change == "shape":
        n = rng.choice(ODD_INTS)
        entry[1] = rng.choice(([n], [n, n], [n, 0], [], [1] * 9, entry[1][::-1], [*entry[1], 2]))
    elif change == "kind":
        entry[2] = rng.choice((*range(40), 99, 2**31))
    elif change == "place":
        entry[3] = rng.choice((*ODD_INTS, 32, len(body)))
    elif change == "name":
        names = (b"", b"\xff", b"x" * 10**5, b"rope_freqs.weight", entry[0].replace(b"w", b"b"))
        entry[0] = rng.choice((*names, b"\n\x1b[2J", entry[0].replace(b".weight", b".bias")))
    elif change == "drop":
        tensors.remove(entry)
    elif change == "repeat":
        tensors.append(list(entry))
    else:
        other = rng.choice(tensors)
        entry[0], other[0] = other[0], entry[0]
    files["model.gguf"] = _write_gguf(values, tensors, body)
    return what


def gguf_numbers(rng: random.Random, files: Files, marker: Path) -> str:
    """Counts in the header that the file doesn't hold, and the version."""
    data = bytearray(_content(files, "model.gguf"))
    offset, code = rng.choice(((4, "<I"), (8, "<Q"), (16, "<Q")))
    value = rng.choice((0, 1, 2, 10**6, 10**9, 2**31, 2**32 - 1))
    struct.pack_into(code, data, offset, value)
    files["model.gguf"] = bytes(data)
    return f"gguf header: {offset} = {value}"


def gguf_bytes(rng: random.Random, files: Files, marker: Path) -> str:
    """Damage of the part that is parsed."""
    data = _content(files, "model.gguf")
    end = len(data) - len(_read_gguf(data)[2])
    head, kind = damage(rng, data[:end])
    files["model.gguf"] = head + data[end:]
    return f"{kind} the header of model.gguf"


# Adapters.

_BASE = {"dim": 192, "hidden": 512, "heads": 8, "kv_heads": 4, "layers": 4, "vocab": 768}


def adapter_bases() -> dict[str, Files]:
    """Adapters of the embedded model, as PEFT writes them."""
    generator = torch.Generator().manual_seed(0)

    def random_tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    dim, kv = _BASE["dim"], _BASE["dim"] // _BASE["heads"] * _BASE["kv_heads"]
    lora, dora = {}, {}
    for i in range(_BASE["layers"]):
        for module, width in (("q_proj", dim), ("v_proj", kv)):
            name = f"base_model.model.model.layers.{i}.self_attn.{module}"
            lora[f"{name}.lora_A.weight"] = random_tensor(4, dim)
            lora[f"{name}.lora_B.weight"] = random_tensor(width, 4)
            dora[f"{name}.lora_magnitude_vector"] = random_tensor(width).abs() + 1
    saved = {"base_model.model.lm_head.weight": random_tensor(_BASE["vocab"], dim)}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/base",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {},
        "alpha_pattern": {"q_proj": 4},
        "modules_to_save": None,
        "use_rslora": False,
        "bias": "none",
    }
    virtual = {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": 3,
        "token_dim": dim,
        "num_layers": _BASE["layers"],
        "num_attention_heads": _BASE["heads"],
        "num_transformer_submodules": 1,
        "base_model_name_or_path": "org/base",
    }
    prompts = {"prompt_embeddings": random_tensor(3, dim)}
    prefix = {"prompt_embeddings": random_tensor(3, 2 * _BASE["layers"] * kv)}
    dump = json_mutations.dump
    found: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {
        "lora": (config, lora),
        "dora": ({**config, "use_dora": True}, lora | dora),
        "saved": ({**config, "modules_to_save": ["lm_head"]}, lora | saved),
        "prompt": ({**virtual, "peft_type": "PROMPT_TUNING"}, prompts),
        "prefix": ({**virtual, "peft_type": "PREFIX_TUNING", "num_attention_heads": 4}, prefix),
    }
    bases: dict[str, Files] = {
        name: {"adapter_config.json": dump(c), "adapter_model.safetensors": save(tensors)}
        for name, (c, tensors) in found.items()
    }
    bases["pytorch"] = {"adapter_config.json": dump(config), "adapter_model.bin": _save(lora)}
    return bases


def adapter_patterns(rng: random.Random, files: Files, marker: Path) -> str:
    """Patterns of modules, and settings of adapters that change what is calculated."""
    config = json.loads(_content(files, "adapter_config.json"))
    regex = rng.choice(json_mutations.REGEXES)
    settings: dict[str, Any] = {
        "rank_pattern": {regex: rng.choice((4, 2, 0, 10**9))},
        "alpha_pattern": {regex: rng.choice((4, 0, -1, 1e300))},
        "target_modules": rng.choice((regex, [regex] * 100, "all-linear")),
        "modules_to_save": [rng.choice(("lm_head", "embed_tokens", "norm", regex))],
        "r": rng.choice(ODD_INTS),
        "lora_alpha": rng.choice((*ODD_INTS, 1e300)),
        "peft_type": rng.choice(("LORA", "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "IA3")),
        "task_type": rng.choice(("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", None)),
        "num_virtual_tokens": rng.choice(ODD_INTS),
        "init_lora_weights": rng.choice(("pissa", "olora", "loftq", True)),
        "trainable_token_indices": rng.choice(([0, 1], [10**9], {"embed_tokens": [-1]}, "x")),
        "auto_mapping": {"base_model_class": "os.system", "parent_library": "os"},
        "layer_replication": [[0, 2], [1, 3]],
        "use_rslora": True,
        "use_dora": True,
    }
    keys = rng.sample(sorted(settings), rng.choice((1, 2)))
    files["adapter_config.json"] = json_mutations.dump(config | {k: settings[k] for k in keys})
    return f"adapter settings: {', '.join(keys)}"


# PyTorch's files inside the other formats: what Meta's files have, under another name.


def _in_torch_file(mutator: Mutator) -> Mutator:
    def mutate(rng: random.Random, files: Files, marker: Path) -> str:
        name = next((n for n, c in files.items() if n.endswith(".bin") and type(c) is bytes), None)
        if name is None:
            return safetensors_header(rng, files, marker) if _is_hf(files) else "nothing"
        inner: Files = {"x.pth": files[name]}
        what = mutator(rng, inner, marker)
        files[name] = inner["x.pth"]
        return what.replace("x.pth", name)

    return mutate


def _is_hf(files: Files) -> bool:
    return any(name.endswith(".safetensors") for name in files)


_TORCH = tuple(
    map(
        _in_torch_file,
        (
            pickle_bytes,
            pickle_calls,
            pickle_bombs,
            malicious,
            tensor_names,
            tensor_values,
            zip_headers,
        ),
    )
)
MUTATORS: dict[str, tuple[Mutator, ...]] = {
    "hf": (
        *(any_bytes, special_files, renamed, json_texts, json_texts),
        *(json_values, json_values, json_values, config_values, config_values, config_values),
        *(tokenizer_json, tokenizer_json, templates, templates),
        *(safetensors_header, safetensors_header, safetensors_header, index_values, *_TORCH[:3]),
        *_TORCH[3:],
    ),
    "gguf": (
        *(any_bytes, gguf_bytes, gguf_bytes, special_files, renamed, gguf_numbers),
        *(gguf_values, gguf_values, gguf_values, gguf_values, gguf_tensors, gguf_tensors),
    ),
    "adapter": (
        *(any_bytes, special_files, renamed, json_texts, json_values, config_values, config_values),
        *(adapter_patterns, adapter_patterns, adapter_patterns),
        *(safetensors_header, safetensors_header, safetensors_header, *_TORCH),
    ),
}


def make_bases(kind: str, folder: Path) -> dict[str, Files]:
    """The sound checkpoints of a format, or adapters."""
    if kind == "gguf":
        return gguf_bases(folder)
    return hf_bases() if kind == "hf" else adapter_bases()


def mutate(
    kind: str, rng: random.Random, number: int, bases: dict[str, Files], marker: Path
) -> tuple[str, Files]:
    """One mutation of a format's bases: what was done, and the files."""
    base = rng.choice(sorted(bases))
    files = dict(bases[base])
    mutators = MUTATORS[kind]
    what = mutators[number % len(mutators)](rng, files, marker)
    return f"{base}: {what}".encode("ascii", "replace").decode(), files
