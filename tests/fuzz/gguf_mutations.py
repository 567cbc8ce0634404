"""Sound GGUF files, and damage of their metadata, tensors and header."""

import random
import struct
from pathlib import Path
from typing import Any

from hf_mutations import TEMPLATE, VOCAB
from mutations import ODD_INTS, Files, _content, damage

from llama.generation import TINY

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
