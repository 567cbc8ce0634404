"""Damaged checkpoints, each from a seed and a number: bytes, JSON, tensors, pickles and zips."""

import io
import json
import os
import pickle
import pickletools
import random
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch._weights_only_unpickler import _get_allowed_globals

from llama import ModelArgs, Transformer, parallel
from llama.checkpoint.sharding import split_dim
from llama.generation import TINY


class Special(Enum):
    """Things that can stand in a file's place."""

    DIRECTORY = "a directory"
    DANGLING = "a dangling symlink"
    LOOP = "a symlink to itself"
    FIFO = "a FIFO"


Files = dict[str, "bytes | Special"]
Tensors = dict[str, Any]
SMALL = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32}
ODD_INTS = (
    0,
    1,
    -1,
    3,
    255,
    2**31 - 1,
    2**31,
    2**32,
    10**9,
    2**62,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
)
ZEROS = 1 << 20  # bytes of one block of a zip bomb


# What is damaged.


def make_bases() -> dict[str, Files]:
    """Sound checkpoints: the embedded one, and small random ones in one file and in two."""
    parallel.initialize(torch.device("cpu"))
    bases = {"tiny": _read_files(TINY)}
    model = Transformer(ModelArgs(**SMALL, vocab_size=768, max_batch_size=1, max_seq_len=8))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    tokenizer = (TINY / "tokenizer.model").read_bytes()
    params = json.dumps({**SMALL, "vocab_size": 768}).encode()
    for name, dtype, parts in (("small", torch.float32, 1), ("split", torch.bfloat16, 2)):
        bases[name] = {"params.json": params, "tokenizer.model": tokenizer}
        for part in range(parts):
            tensors = {}
            for key, parameter in model.named_parameters():
                weight, dim = parameter.detach().to(dtype), split_dim(key)
                piece = weight if dim is None else weight.chunk(parts, dim)[part]
                tensors[key] = piece.contiguous().clone()
            bases[name][f"consolidated.{part:02d}.pth"] = _save(tensors)
    return bases


def _read_files(directory: Path) -> Files:
    wanted = ("params.json", "tokenizer.model")
    paths = [p for p in directory.iterdir() if p.suffix == ".pth" or p.name in wanted]
    return {path.name: path.read_bytes() for path in sorted(paths)}


def write_files(files: Files, directory: Path) -> None:
    """Lay a mutated checkpoint out on disk."""
    directory.mkdir()
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is Special.DIRECTORY:
            path.mkdir()
        elif content is Special.FIFO:
            os.mkfifo(path)
        else:
            path.symlink_to("nowhere" if content is Special.DANGLING else name)


def _shard(rng: random.Random, files: Files) -> str:
    return rng.choice([name for name, c in files.items() if ".pth" in name and type(c) is bytes])


def _content(files: Files, name: str) -> bytes:
    content = files[name]
    assert isinstance(content, bytes)
    return content


# Bytes of any file.


def damage(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Change bytes here and there, more often near the ends, where formats keep their structure."""
    out = bytearray(data)

    def place() -> int:
        zone = rng.choice((len(out), min(len(out), 8192), min(len(out), 200)))
        at = rng.randrange(zone + 1)
        return at if rng.random() < 0.5 else len(out) - at

    kind = rng.choice(("flip", "overwrite", "truncate", "insert", "zero", "duplicate", "swap"))
    for _ in range(rng.choice((1, 1, 2, 8, 64)) if kind in ("flip", "overwrite") else 1):
        at, length = place(), rng.choice((1, 2, 4, 8, 64, 4096))
        run = bytes(out[at : at + length])
        if kind == "flip" and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == "overwrite":
            out[at : at + length] = rng.choice((rng.randbytes(len(run)), b"\xff" * len(run)))
        elif kind == "truncate":
            del out[at:]
        elif kind == "insert":
            out[at:at] = rng.randbytes(length)
        elif kind == "zero":
            out[at : at + length] = bytes(len(run))
        elif kind == "duplicate":
            out[at:at] = run
        elif kind == "swap":
            to = place()
            other = bytes(out[to : to + len(run)])
            out[at : at + len(other)], out[to : to + len(run)] = other, run[: len(other)]
    return bytes(out), kind


def any_bytes(rng: random.Random, files: Files, marker: Path) -> str:
    name = rng.choice(sorted(files))
    files[name], kind = damage(rng, _content(files, name))
    return f"{kind} {name}"


def weight_bytes(rng: random.Random, files: Files, marker: Path) -> str:
    name = _shard(rng, files)
    files[name], kind = damage(rng, _content(files, name))
    return f"{kind} {name}"


def tokenizer_bytes(rng: random.Random, files: Files, marker: Path) -> str:
    files["tokenizer.model"], kind = damage(rng, _content(files, "tokenizer.model"))
    return f"{kind} tokenizer.model"


# Files and their names.


def special_file(rng: random.Random, files: Files, marker: Path) -> str:
    name = rng.choice(sorted(files))
    files[name] = content = rng.choice([*Special, b"", b"\0", b"version https://git-lfs\n" * 3])
    what = content.value if isinstance(content, Special) else repr(content)
    return f"{name} is {what}"


def file_names(rng: random.Random, files: Files, marker: Path) -> str:
    name = rng.choice(sorted(files))
    others = ("consolidated.01.pth", "consolidated.1.pth", "consolidated.99999999999999.pth")
    target = rng.choice((*others, "consolidated..pth", "consolidated.00.pth", "nothing", *files))
    content = files[name]
    if rng.random() < 0.5:
        del files[name]
    files[target] = content
    return f"{name} {'copied to' if name in files else 'renamed'} {target}"


# params.json.


def odd_values(rng: random.Random, files: Files, marker: Path) -> str:
    params = json.loads(_content(files, "params.json"))
    keys = [*params, "ffn_dim_multiplier", "n_kv_heads", "max_seq_len", "max_batch_size", "unknown"]
    keys += [
        "head_dim",
        "hidden_dim",
        "rope_theta",
        "rope_scaling",
        "tie_word_embeddings",
        "labels",
    ]
    keys += ["attention_bias", "mlp_bias", "use_scaled_rope", "quantization"]
    numbers = (*ODD_INTS, 0.5, -0.0, 1e-300, 1e308, 64.0, 10**300, 10**400, 10**4000, 10**18 + 8)
    others: tuple[Any, ...] = (
        float("nan"),
        float("inf"),
        -float("inf"),
        "64",
        "",
        None,
        True,
        [],
        {},
        [[1]],
    )
    done = []
    for _ in range(rng.choice((1, 1, 2))):
        key = rng.choice(keys)
        value = rng.choice(
            rng.choice((numbers, others, ("x" * 10**6, {"a": {"b": [1]}}, "\ud800")))
        )
        params[key] = value
        done.append(
            f"{key}={str(value)[:20] if type(value) is not int else f'{value:.3g}'[:20]}"
            if not (type(value) is int and value > 10**300)
            else f"{key}=huge"
        )
    if rng.random() < 0.2:
        done.append(f"without {(gone := rng.choice(sorted(params)))}")
        del params[gone]
    files["params.json"] = json.dumps(params).encode()
    return "params.json: " + ", ".join(done).encode("ascii", "replace").decode()


def odd_text(rng: random.Random, files: Files, marker: Path) -> str:
    text = _content(files, "params.json").decode().strip()
    texts: dict[str, str | bytes] = {
        "duplicate key": text[:-1] + ', "dim": 7, "dim": 10000000}',
        "deep list": '{"dim": ' + "[" * 10**5 + "]" * 10**5 + "}",
        "deep object": '{"a":' * 10**5 + "1" + "}" * 10**5,
        "unclosed depth": "[" * 3 * 10**6,
        "not UTF-8": text.encode()[:-1] + b', "\xff\xfe": 1}',
        "BOM": b"\xef\xbb\xbf" + text.encode(),
        "UTF-16": text.encode("utf-16"),
        "5000 digits": text[:-1] + ', "dim": ' + "9" * 5000 + "}",
        "4000 digits": text[:-1] + ', "rope_theta": ' + "9" * 4000 + "}",
        "long exponent": text[:-1] + ', "norm_eps": 1e' + "9" * 4000 + "}",
        "many keys": "{" + ",".join(f'"k{i}": {i}' for i in range(10**5)) + "}",
        "list": f"[{text}]",
        "number": "1",
        "null": "null",
        "NUL": text + "\0",
        "two": text + text,
        "half surrogate key": text[:-1] + ', "\\ud800": 1}',
        "long key": text[:-1] + f', "{"k" * 10**6}": 1}}',
        "control characters in a key": text[:-1] + ', "\\n\\n\\u001b[2J": 1}',
        "empty key": text[:-1] + ', "": 1}',
    }
    kind = rng.choice(sorted(texts))
    content = texts[kind]
    files["params.json"] = content if isinstance(content, bytes) else content.encode()
    return f"params.json: {kind}"


def fitting_bomb(rng: random.Random, files: Files, marker: Path) -> str:
    """Sizes without bytes behind them: few stored numbers, strides of 0, params.json to match."""
    name = _shard(rng, files)
    params = json.loads(_content(files, "params.json"))
    tensors = _load(_content(files, name))
    kind = rng.choice(("vocab_size", "multiple_of", "n_layers", "one tensor"))
    size = rng.choice((10**6, 10**8, 10**9, 2**40, 2**55))
    one = torch.ones(1)
    if kind == "vocab_size":
        params[kind] = size
        for key in ("tok_embeddings.weight", "output.weight"):
            tensors[key] = one.expand(size, tensors[key].shape[1])
    elif kind == "multiple_of":
        params[kind] = size
        for i in range(params["n_layers"]):
            prefix = f"layers.{i}.feed_forward."
            for part in ("w1", "w2", "w3"):
                shape = (params["dim"], size) if part == "w2" else (size, params["dim"])
                tensors[f"{prefix}{part}.weight"] = one.expand(shape)
    elif kind == "n_layers":
        params[kind] = size = min(size, 2000)
        for key in [key for key in tensors if key.startswith("layers.0.")]:
            for i in range(size):
                tensors[key.replace(".0.", f".{i}.", 1)] = tensors[key]
    else:
        key = rng.choice(sorted(tensors))
        tensors[key] = one.expand(tensors[key].shape)
    files["params.json"] = json.dumps(params).encode()
    files[name] = _save(tensors)
    return f"{kind}={size}, and strides of 0 to match, in {name}"


# Tensors.


def _load(data: bytes) -> Tensors:
    return dict(torch.load(io.BytesIO(data), weights_only=True))


def _save(content: object, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def _quantized(t: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)


TENSOR_CHANGES: dict[str, Callable[[torch.Tensor], Any]] = {
    "int": lambda t: t.to(torch.int32),
    "bool": lambda t: t.to(torch.bool),
    "complex": lambda t: t.to(torch.complex64),
    "double": lambda t: t.double(),
    "half": lambda t: t.half(),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "float8 e8m0": lambda t: t.to(torch.float8_e8m0fnu),
    "float4": lambda t: torch.zeros(t.shape, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    "sparse": lambda t: t.to_sparse(),
    "csr": lambda t: t.to_sparse_csr() if t.dim() == 2 else t.to_sparse(),
    "quantized": _quantized,
    "0-dim": lambda t: t.flatten()[0].clone(),
    "empty": lambda t: t.new_empty(0),
    "no rows": lambda t: t[:0].clone(),
    "no columns": lambda t: t[..., :0].clone(),
    "reshaped": lambda t: t.reshape(-1, 2),
    "more dimensions": lambda t: t[None],
    "50 dimensions": lambda t: t.reshape(*[1] * 50, -1),
    "transposed": lambda t: t.t().contiguous().t(),
    "expanded": lambda t: t.flatten()[:1].expand(t.shape),
    "strided": lambda t: torch.stack((t, t), -1)[..., 0],
    "meta": lambda t: t.to("meta"),
    "requires grad": lambda t: t.clone().requires_grad_(),
    "parameter": lambda t: torch.nn.Parameter(t.clone()),
    "buffer": lambda t: torch.nn.Buffer(t.clone()),
    "nested": lambda t: torch.nested.nested_tensor(list(t)),
    "conjugate": lambda t: torch.conj(t.to(torch.complex64)),
    "negative view": lambda t: torch._neg_view(t),
    "conjugate's imaginary part": lambda t: torch.conj(torch.complex(t.float(), t.float())).imag,
    "NaN": lambda t: t * float("nan"),
    "infinite": lambda t: t + float("inf"),
    "huge": lambda t: t.sign() * torch.finfo(t.dtype).max,
    "zero": lambda t: t * 0,
    "storage": lambda t: t.untyped_storage(),
    "None": lambda t: None,
    "list": lambda t: [1.0, 2.0],
    "attributes": lambda t: _with_attribute(t),
}


def _with_attribute(t: torch.Tensor) -> torch.Tensor:
    changed = torch.nn.Parameter(t.clone())
    changed.is_contiguous = 1  # type: ignore[assignment, method-assign]
    changed.shape_of_mind = "odd"  # type: ignore[attr-defined]
    return changed


def tensor_values(rng: random.Random, files: Files, marker: Path) -> str:
    name = _shard(rng, files)
    tensors = _load(_content(files, name))
    keys = rng.sample(sorted(tensors), rng.choice((1, 1, 2, len(tensors))))
    kind = rng.choice(sorted(TENSOR_CHANGES))
    for key in keys:
        try:
            tensors[key] = TENSOR_CHANGES[kind](tensors[key])
        except RuntimeError:  # the change doesn't apply to a tensor of this form
            tensors[key] = tensors[key].to("meta")
    try:
        files[name] = _save(tensors)
    except (RuntimeError, NotImplementedError):  # no such tensor can be stored
        files[name] = _save({})
    return f"{len(keys)} tensors in {name} ({keys[0]}) changed: {kind}"


def tensor_names(rng: random.Random, files: Files, marker: Path) -> str:
    name = _shard(rng, files)
    tensors = _load(_content(files, name))
    key, other = rng.sample(sorted(tensors), 2)
    kind = rng.choice(("drop", "rename", "add", "alias", "swap", "number", "many", "derived"))
    if kind in ("drop", "rename"):
        tensor = tensors.pop(key)
        if kind == "rename":
            tensors[rng.choice(("", "weight", key.upper(), "\0", "a" * 10**6, "\n\n"))] = tensor
    elif kind in ("add", "number", "derived"):
        new: Any = {"add": "layers.-1.x.weight", "number": 7, "derived": "rope.freqs"}[kind]
        tensors[new] = tensors[key]
    elif kind == "alias":
        tensors = dict.fromkeys(tensors, tensors[key])
    elif kind == "swap":
        tensors[key], tensors[other] = tensors[other], tensors[key]
    else:
        tensors |= {f"layers.{i}.extra.weight": tensors[key] for i in range(5000)}
    files[name] = _save(tensors)
    return f"{kind} {key} in {name}"


def containers(rng: random.Random, files: Files, marker: Path) -> str:
    name = _shard(rng, files)
    tensors = _load(_content(files, name))
    linear = torch.nn.Linear(2, 2)
    script = io.BytesIO()
    if (kind := rng.randrange(9)) == 8:
        torch.jit.save(torch.jit.script(linear), script)
    files[name] = (
        _save(tensors, legacy=True),
        _save({"model": tensors}),
        _save(list(tensors.values())),
        _save(next(iter(tensors.values()))),
        _save(linear),
        _save(OrderedDict(tensors)),
        pickle.dumps(tensors),
        json.dumps(list(tensors)).encode(),
        script.getvalue(),
    )[kind]
    forms = "legacy, nested, list, tensor, module, ordered, raw pickle, JSON, TorchScript"
    return f"{name} is another container: {forms.split(', ')[kind]}"


# Pickles inside the zip.


@dataclass
class Call:
    """A callable by name and its arguments, for ``emit``."""

    name: str
    args: tuple[Any, ...]


@dataclass
class Name:
    """A global for ``emit``, ``module name``."""

    name: str


@dataclass
class Stored:
    """A reference to a storage of the file, for ``emit``."""

    args: tuple[Any, ...]


def emit(value: Any) -> bytes:
    """A value as pickle opcodes of protocol 2."""
    if isinstance(value, Name):
        return b"c" + value.name.replace(" ", "\n").encode() + b"\n"
    if isinstance(value, Call):
        return emit(Name(value.name)) + emit(value.args) + b"R"
    if isinstance(value, Stored):
        return emit(value.args) + b"Q"
    if isinstance(value, tuple | list):
        inner = b"".join(emit(v) for v in value)
        return b"(" + inner + b"t" if isinstance(value, tuple) else b"](" + inner + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(emit(part) for item in value.items() for part in item) + b"u"
    return pickle.dumps(value, protocol=2)[2:-1]


def rewrite_zip(
    data: bytes, edit: Callable[[dict[str, bytes]], None], align: bool = True, level: int = 0
) -> bytes:
    """A zip with other entries but a sound structure, stored and aligned as torch does it."""
    with zipfile.ZipFile(io.BytesIO(data)) as source:
        entries = {info.filename: source.read(info) for info in source.infolist()}
    edit(entries)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        for name, content in entries.items():
            info = zipfile.ZipInfo(name)
            if align:
                used = buffer.tell() + 30 + len(name.encode()) + 4
                info.extra = b"FB" + struct.pack("<H", -used % 64) + b"Z" * (-used % 64)
            compression = zipfile.ZIP_DEFLATED if level else zipfile.ZIP_STORED
            target.writestr(info, content, compression, level or None)
    return buffer.getvalue()


def _edit_pickle(files: Files, name: str, change: Callable[[bytes], bytes]) -> None:
    def edit(entries: dict[str, bytes]) -> None:
        for entry in entries:
            if entry.endswith("data.pkl"):
                entries[entry] = change(entries[entry])

    files[name] = rewrite_zip(_content(files, name), edit)


def pickle_bytes(rng: random.Random, files: Files, marker: Path) -> str:
    name = _shard(rng, files)
    kinds = []

    def change(data: bytes) -> bytes:
        data, kind = damage(rng, data)
        kinds.append(kind)
        return data

    _edit_pickle(files, name, change)
    return f"{kinds[0]} data.pkl of {name}"


def _split_ops(data: bytes) -> list[tuple[str, bytes]]:
    ops = list(pickletools.genops(data))
    ends = [pos for _, _, pos in ops[1:]] + [len(data)]
    return [(op.name, data[pos:end]) for (op, _, pos), end in zip(ops, ends, strict=True)]


def pickle_opcodes(rng: random.Random, files: Files, marker: Path) -> str:
    name = _shard(rng, files)
    simple = [op.code.encode("latin1") for op in pickletools.opcodes if op.arg is None]

    def change(data: bytes) -> bytes:
        ops = [raw for _, raw in _split_ops(data)]
        for _ in range(rng.choice((1, 1, 2, 10))):
            at, to = rng.randrange(len(ops)), rng.randrange(len(ops))
            kind = rng.randrange(4)
            if kind == 0 and len(ops) > 2:
                del ops[at]
            elif kind == 1:
                ops.insert(to, ops[at])
            elif kind == 2:
                ops[at], ops[to] = ops[to], ops[at]
            else:
                ops[at] = rng.choice(simple)
        return b"".join(ops)

    _edit_pickle(files, name, change)
    return f"opcodes of data.pkl of {name}"


def pickle_arguments(rng: random.Random, files: Files, marker: Path) -> str:
    name = _shard(rng, files)
    dangerous = ("os system", "builtins eval", "builtins exec", "torch load", "torch.hub load")
    names = [*(n.replace(".", " ", -1) for n in dangerous), *_allowed()]
    done = []

    def change(data: bytes) -> bytes:
        ops = _split_ops(data)
        ints = [i for i, (op, _) in enumerate(ops) if op.startswith(("BININT", "LONG"))]
        texts = [i for i, (op, _) in enumerate(ops) if op == "BINUNICODE"]
        globals_ = [i for i, (op, _) in enumerate(ops) if op == "GLOBAL"]
        for _ in range(rng.choice((1, 1, 2, 4))):
            kind = rng.choice(("int", "text", "global"))
            at = rng.choice({"int": ints, "text": texts, "global": globals_}[kind])
            if kind == "int":
                new: Any = rng.choice((*ODD_INTS, 10**100, 10**6, 10**8, 2.5, None, "x"))
                raw = emit(new)
            elif kind == "text":
                new = rng.choice(("", "cuda:0", "meta", "../0", "1", "10", "data.pkl", "\0", "xla"))
                raw = emit(new)
            else:
                new = rng.choice(names)
                raw = emit(Name(new))
            ops[at] = (kind, raw)
            done.append(f"{kind} {new!r:.40}")
        return b"".join(raw for _, raw in ops)

    _edit_pickle(files, name, change)
    return f"data.pkl of {name}: {', '.join(done)}"


def _allowed() -> list[str]:
    return sorted(" ".join(n.rsplit(".", 1)) for n in _get_allowed_globals() if "." in n)


def pickle_calls(rng: random.Random, files: Files, marker: Path) -> str:
    """Calls that torch's restricted unpickler allows, with odd arguments."""
    name = _shard(rng, files)
    storage = Stored(("storage", Name("torch FloatStorage"), "0", "cpu", 8))
    favourites = [n for n in _allowed() if "rebuild" in n or "Storage" in n or "Tensor" in n]

    def argument(depth: int = 0) -> Any:
        kind = rng.randrange(10 if depth < 2 else 5)
        if kind < 2:
            return rng.choice((*ODD_INTS, 8, 4, 10**8, 2.5))
        if kind < 5:
            return rng.choice((None, True, "cpu", "meta", storage, Name("torch float32"), "x"))
        if kind < 9:
            return tuple(argument(depth + 1) for _ in range(rng.randrange(4)))
        return rng.choice(([], {}, [1] * 5, {"a": 1}))

    called = rng.choice(rng.choice((_allowed(), favourites)))
    value = Call(called, tuple(argument() for _ in range(rng.randrange(1, 8))))
    if rng.random() < 0.3:
        shape = tuple(rng.choice((1, 8, 10**5, 10**9, 2**62)) for _ in range(rng.randrange(1, 4)))
        value = Call(called, rng.choice((shape, (shape,), (storage, 0, shape, (0,) * len(shape)))))
    key = rng.choice(("tok_embeddings.weight", "norm.weight"))

    def change(data: bytes) -> bytes:
        if rng.random() < 0.5:
            return b"\x80\x02" + emit({key: value}) + b"."
        call = emit(key) + emit(value)
        return data[:-2] + call + b"u." if data.endswith(b"u.") else b"\x80\x02" + call + b"0."

    _edit_pickle(files, name, change)
    return f"data.pkl of {name} calls {called} {value.args!r:.120}"


def pickle_bombs(rng: random.Random, files: Files, marker: Path) -> str:
    name = _shard(rng, files)
    deep = rng.choice((9 * 10**5, 3 * 10**6))
    doubled = b"(" + emit("lol") + b"t" + b"".join(b"2\x86" for _ in range(40))
    bombs = {
        "deep tuple": emit("k") + b")" + b"\x85" * deep + b"s",
        "deep tuple as a key": b")" + b"\x85" * deep + emit(1) + b"s",
        "deep list": emit("k") + b"](" * deep + b"e" * deep + b"s",
        "marks": b"(" * deep,
        "doubled tuples": emit("k") + doubled + b"s",
        "doubled tuple as a key": doubled + emit(1) + b"s",
        "claimed long text": b"X" + struct.pack("<I", 2**32 - 1) + b"x",
        "claimed longer text": b"\x8d" + struct.pack("<Q", 2**62) + b"x",
        "claimed long bytes": b"\x8e" + struct.pack("<Q", 2**40) + b"x",
        "claimed bytearray": b"\x96" + struct.pack("<Q", 2**36) + b"x",
        "claimed long int": b"\x8b" + struct.pack("<i", 2**31 - 1) + b"x",
        "claimed frame": b"\x95" + struct.pack("<Q", 2**40),
        "far memo": b"r" + struct.pack("<I", 2**32 - 1),
        "long int": emit("k") + b"\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6 + b"s",
        "many items": b"(" + b"".join(emit(f"k{i}") + b"N" for i in range(10**5)) + b"u",
        "itself": b"q\x01" + emit("k") + b"h\x01s",
        "itself as a key": b"q\x01h\x01" + emit(1) + b"s",
    }
    kind = rng.choice(sorted(bombs))
    _edit_pickle(files, name, lambda data: b"\x80\x02}" + bombs[kind] + b".")
    if upper := rng.random() < 0.3:  # PyTorch finds it all the same

        def rename(entries: dict[str, bytes]) -> None:
            renamed = {key.replace("data.pkl", "DATA.PKL"): c for key, c in entries.items()}
            entries.clear()
            entries.update(renamed)

        files[name] = rewrite_zip(_content(files, name), rename)
    return f"{'DATA.PKL' if upper else 'data.pkl'} of {name} is a bomb: {kind}"


class _Evil:
    def __init__(self, how: int, marker: Path):
        self.how, self.marker = how, marker

    def __reduce__(self) -> Any:
        code = f"open({str(self.marker)!r}, 'w')"
        return ((os.system, (f"touch {self.marker}",)), (exec, (code,)), (eval, (code,)))[self.how]


def malicious(rng: random.Random, files: Files, marker: Path) -> str:
    """Pickles that would leave ``marker`` behind if they were trusted."""
    shell = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w')"
    calls = (
        Call("os system", (shell,)),
        Call("posix system", (shell,)),
        Call("subprocess check_call", (["sh", "-c", shell],)),
        Call("builtins exec", (code,)),
        Call("__builtin__ eval", (code,)),
        Call("builtins open", (str(marker), "w")),
        Call("pathlib Path.touch", (Call("pathlib Path", (str(marker),)),)),
        Call("torch.serialization eval", (code,)),
        Call("torch.serialization os.system", (shell,)),
        Call("torch.jit._script eval", (code,)),
        Call("torch save", (1, str(marker))),
        Call("torch.utils.collect_env run", (shell,)),
        Call("torch._utils exec", (code,)),
        Call("runpy run_path", (str(marker),)),
    )
    call = rng.choice(calls)
    forms = (
        b"}" + emit("x") + emit(call) + b"s",
        emit(call),
        b"(S'" + shell.encode() + b"'\nios\nsystem\n",
        b"(" + emit(Name("os system")) + emit(shell) + b"o",
        emit("os") + emit("system") + b"\x93" + emit((shell,)) + b"R",
        emit(Name("os system")) + emit((shell,)) + b"\x81",
        b"}" + emit({"__setstate__": call}) + b"b",
        emit(Call("torch._tensor _rebuild_from_type_v2", (Name("os system"), (shell,), (), {}))),
        emit(Call("torch._utils _rebuild_parameter", (call, True, {}))),
    )
    pickled = b"\x80\x02" + rng.choice(forms) + b"."
    way = rng.randrange(6)
    name = _shard(rng, files)
    if way < 3:
        _edit_pickle(files, name, lambda data: pickled)
    elif way == 3:
        files[name] = pickled
    elif way == 4:
        files[name] = _save({"x": _Evil(rng.randrange(3), marker)}, legacy=rng.random() < 0.5)
    else:
        name = rng.choice(sorted(files))
        files[name] = pickled
    return f"malicious {name}, way {way}, {call.name}"


# The zip.


def zip_entries(rng: random.Random, files: Files, marker: Path) -> str:
    name = _shard(rng, files)
    done = []

    def edit(entries: dict[str, bytes]) -> None:
        entry, other = rng.sample(sorted(entries), 2)
        if rng.random() < 0.3:
            wanted = rng.choice(("/data.pkl", "/version"))
            entry = next(e for e in entries if e.endswith(wanted))
        kind = rng.choice(("none", "drop", "rename", "swap", "shorten", "empty", "lengthen", "add"))
        done.append(f"{kind} {entry}")
        if kind in ("drop", "rename"):
            content = entries.pop(entry)
            if kind == "rename":
                new = ("../" + entry, entry.upper(), "x/" + entry, "a" * 60000, "constants.pkl")
                entries[rng.choice(new)] = content
        elif kind == "swap":
            entries[entry], entries[other] = entries[other], entries[entry]
        elif kind == "shorten":
            entries[entry] = entries[entry][: rng.randrange(len(entries[entry]) + 1)]
        elif kind == "empty":
            entries[entry] = b""
        elif kind == "lengthen":
            entries[entry] += rng.randbytes(1000)
        elif kind == "add":
            folder = entry.split("/")[0]
            entries[f"{folder}/{rng.choice(('constants.pkl', 'data/99', 'byteorder', 'x'))}"] = b"x"

    align, level = rng.random() < 0.5, rng.choice((0, 0, 0, 9))
    files[name] = rewrite_zip(_content(files, name), edit, align, level)
    return f"zip entries of {name}: {done[0]}, aligned {align}, level {level}"


def zip_headers(rng: random.Random, files: Files, marker: Path) -> str:
    """Absurd offsets, sizes, counts and methods in the zip's own records."""
    name = _shard(rng, files)
    data = bytearray(_content(files, name))
    # Each record's signature, and its fields as (offset, format).
    records = {
        b"PK\3\4": (
            (6, "<H"),
            (8, "<H"),
            (14, "<I"),
            (18, "<I"),
            (22, "<I"),
            (26, "<H"),
            (28, "<H"),
        ),
        b"PK\1\2": (
            (8, "<H"),
            (10, "<H"),
            (16, "<I"),
            (20, "<I"),
            (24, "<I"),
            (28, "<H"),
            (30, "<H"),
            (32, "<H"),
            (38, "<I"),
            (42, "<I"),
        ),
        b"PK\5\6": ((4, "<H"), (8, "<H"), (10, "<H"), (12, "<I"), (16, "<I"), (20, "<H")),
        b"PK\6\6": ((4, "<Q"), (24, "<Q"), (32, "<Q"), (40, "<Q"), (48, "<Q")),
        b"PK\6\7": ((4, "<I"), (8, "<Q"), (16, "<I")),
    }
    places = {}
    for signature in records:
        found, at = [], data.find(signature)
        while at >= 0:
            found.append(at)
            at = data.find(signature, at + 4)
        if found:
            places[signature] = found
    done = []
    for _ in range(rng.choice((1, 1, 2, 5))):
        signature = rng.choice(sorted(places))
        offset, form = rng.choice(records[signature])
        top = 256 ** struct.calcsize(form) - 1
        value = rng.choice((0, 1, 8, 99, top, top - 1, top // 2, 10**9, 5 * 10**9, 10**12)) & top
        at = rng.choice(places[signature]) + offset
        if at + 8 <= len(data):
            struct.pack_into(form, data, at, value)
            done.append(f"{signature[2:].hex()}+{offset}={value}")
    files[name] = bytes(data)
    return f"zip headers of {name}: {', '.join(done)}"


def zip_bomb(rng: random.Random, files: Files, marker: Path) -> str:
    """An entry that inflates to gigabytes of zeros."""
    name = _shard(rng, files)
    blocks = rng.choice((2000, 8000))
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(ZEROS)) + packer.flush(zlib.Z_FULL_FLUSH)
    deflated = block * blocks + packer.flush()
    chosen = []

    def edit(entries: dict[str, bytes]) -> None:
        wanted = rng.choice(("data.pkl", "data/0", "version", "byteorder"))
        chosen.append(next(e for e in entries if e.endswith(f"/{wanted}")))
        entries[chosen[0]] = deflated

    data = bytearray(rewrite_zip(_content(files, name), edit, align=False))
    size = blocks * ZEROS
    for signature, at_method, at_size, at_name in ((b"PK\3\4", 8, 22, 30), (b"PK\1\2", 10, 24, 46)):
        at = data.find(signature)
        while at >= 0:
            if data[at + at_name : at + at_name + len(chosen[0])] == chosen[0].encode():
                struct.pack_into("<H", data, at + at_method, 8)
                struct.pack_into("<I", data, at + at_size, min(size, 2**32 - 2))
            at = data.find(signature, at + 4)
    files[name] = bytes(data)
    return f"{chosen[0]} of {name} inflates to {size >> 20} MiB"


# The tokenizer's protobuf.

Field = tuple[int, int, "int | bytes"]  # number, wire type, value


def _varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def parse_fields(data: bytes) -> list[Field]:
    """The fields of a protobuf message, undamaged."""
    fields: list[Field] = []
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            value |= (data[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if not data[at - 1] & 128:
                return value

    while at < len(data):
        tag = varint()
        wire = tag & 7
        if wire == 0:
            fields.append((tag >> 3, wire, varint()))
            continue
        length = {1: 8, 5: 4}.get(wire) or varint()
        fields.append((tag >> 3, wire, data[at : at + length]))
        at += length
    return fields


def emit_fields(fields: list[Field]) -> bytes:
    out = b""
    parts = []
    for number, wire, value in fields:
        raw = _varint(value) if isinstance(value, int) else value
        length = _varint(len(raw)) if wire == 2 else b""
        parts.append(_varint(number << 3 | wire) + length + raw)
    return out.join(parts)


def _set_field(message: bytes, number: int, wire: int, value: int | bytes) -> bytes:
    kept = [field for field in parse_fields(message) if field[0] != number]
    return emit_fields([*kept, (number, wire, value)])


def tokenizer_pieces(rng: random.Random, files: Files, marker: Path) -> str:
    fields = parse_fields(_content(files, "tokenizer.model"))
    pieces = [i for i, field in enumerate(fields) if field[0] == 1]
    kind = rng.choice(("drop", "all", "most", "repeat", "shuffle", "text", "score", "type", "same"))
    if kind in ("drop", "all", "most"):
        count = {"drop": rng.randrange(1, 5), "all": len(pieces), "most": len(pieces) - 4}[kind]
        gone = set(rng.sample(pieces, count))
        fields = [field for i, field in enumerate(fields) if i not in gone]
    elif kind == "repeat":
        fields += [fields[rng.choice(pieces)]] * rng.choice((1, 10**5))
    elif kind == "shuffle":
        rng.shuffle(fields)
    else:
        for at in rng.sample(pieces, rng.choice((1, 5, len(pieces)))):
            piece = fields[at][2]
            assert isinstance(piece, bytes)
            if kind == "text":
                texts = (
                    b"",
                    b"\xff\xfe",
                    b"\0",
                    b"a" * 10**5,
                    "▁<PRE>".encode(),
                    b"<step>",
                    b"\xe2",
                )
                piece = _set_field(piece, 1, 2, rng.choice(texts))
            elif kind == "score":
                scores = (float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 0.0)
                piece = _set_field(piece, 2, 5, struct.pack("<f", rng.choice(scores)))
            elif kind == "type":
                piece = _set_field(piece, 3, 0, rng.choice((0, 1, 2, 3, 4, 5, 6, 7, -1, 2**31)))
            else:
                piece = fields[pieces[0]][2]
            fields[at] = (1, 2, piece)
    files["tokenizer.model"] = emit_fields(fields)
    return f"tokenizer pieces: {kind}"


def tokenizer_specs(rng: random.Random, files: Files, marker: Path) -> str:
    """The trainer's and the normalizers' settings, among them the compiled character map."""
    fields = parse_fields(_content(files, "tokenizer.model"))
    number = rng.choice((2, 2, 3, 3, 5))
    spec = next((value for n, _, value in fields if n == number), b"")
    assert isinstance(spec, bytes)
    done = []
    for _ in range(rng.choice((1, 1, 2))):
        if number == 2:
            inner = rng.choice((3, 4, 24, 35, 40, 41, 42, 43, 44, 45, 46, 47, 49))
            value: int | bytes = rng.choice((0, 1, 2, 3, 4, 5, -1, 768, 10**6, 2**31 - 1, 2**31))
            if inner >= 44:
                value = rng.choice((b"", b"\xff", b"x" * 10**5))
        else:
            inner = rng.choice((1, 2, 2, 2, 3, 4, 5, 6))
            value = rng.choice((0, 1, 7))
            if inner in (1, 6):
                value = rng.choice((b"nmt_nfkc", b"\xff", b"61\t62\n"))
            elif inner == 2:
                units = rng.choice((0, 1, 256, 1024))
                trie = rng.choice((bytes(4 * units), rng.randbytes(4 * units), b"\xff" * 4 * units))
                claimed = rng.choice((len(trie), 0, 4, 2**31, 2**32 - 4, len(trie) + 4))
                value = struct.pack("<I", claimed) + trie + rng.choice((b"", b"\0", b"ab\0", b"ab"))
        done.append(f"{inner}={value!r:.30}")
        spec = _set_field(spec, inner, 0 if isinstance(value, int) else 2, value)
    fields = [*(field for field in fields if field[0] != number), (number, 2, spec)]
    files["tokenizer.model"] = emit_fields(fields)
    return f"tokenizer spec {number}: {', '.join(done)}"


Mutator = Callable[[random.Random, Files, Path], str]
MUTATORS: tuple[Mutator, ...] = (
    any_bytes,
    weight_bytes,
    weight_bytes,
    tokenizer_bytes,
    tokenizer_bytes,
    special_file,
    file_names,
    odd_values,
    odd_values,
    odd_text,
    fitting_bomb,
    tensor_values,
    tensor_values,
    tensor_values,
    tensor_names,
    containers,
    pickle_bytes,
    pickle_bytes,
    pickle_opcodes,
    pickle_opcodes,
    pickle_arguments,
    pickle_arguments,
    pickle_calls,
    pickle_calls,
    pickle_bombs,
    malicious,
    malicious,
    zip_entries,
    zip_headers,
    zip_headers,
    zip_bomb,
    tokenizer_pieces,
    tokenizer_specs,
)


def make(seed: int, number: int, bases: dict[str, Files], marker: Path) -> tuple[str, Files]:
    """The mutation of a seed and a number.

    Args:
        bases: sound checkpoints (``make_bases``).
        marker: a file that appears if code of the checkpoint is executed.

    Returns:
        What was done, and the files.
    """
    rng = random.Random(f"{seed} {number}")
    base = rng.choice(("tiny", "small", "small", "split", "split"))
    files = dict(bases[base])
    mutator = MUTATORS[number % len(MUTATORS)]
    return f"{base}: {mutator(rng, files, marker)}", files
