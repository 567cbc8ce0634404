"""llama2.c's files: the network and the tokenizer that they were made from."""

import struct
from pathlib import Path

import pytest
import torch
from conftest import make_model

from llama import Tokenizer, Transformer, parallel
from llama.checkpoint.base import Checkpoint
from llama.checkpoint.llama2c import open_llama2c, read_tokenizer
from llama.checkpoint.load import load
from llama.checkpoint.params import make_args

TOKENS = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(1))


def write_model(model: Transformer, path: Path, shared: bool = False) -> Path:
    """A file in the order of llama2.c's own export."""
    args = model.params
    tensors = model.state_dict()
    names = ["tok_embeddings.weight"]
    for kind in (
        *("attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo"),
        *("ffn_norm", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    ):
        names += [f"layers.{i}.{kind}.weight" for i in range(args.n_layers)]
    names.append("norm.weight")
    seq_len, vocab_size = 32, args.vocab_size if shared else -args.vocab_size
    sizes = (args.dim, args.hidden_dim, args.n_layers, args.n_heads, args.kv_heads)
    with path.open("wb") as file:
        file.write(struct.pack("7i", *sizes, vocab_size, seq_len))
        for name in names:
            file.write(tensors[name].numpy().tobytes())
        file.write(torch.full((seq_len, args.head_dim), 7.0).numpy().tobytes())
        if not shared:
            file.write(tensors["output.weight"].numpy().tobytes())
    return path


def network(checkpoint: Checkpoint) -> Transformer:
    parallel.initialize(torch.device("cpu"))
    args = make_args(checkpoint.params, checkpoint.source, 96, 32, 2)
    return load(checkpoint, args, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("params", [{}, {"n_kv_heads": 2}, {"n_layers": 3, "multiple_of": 40}])
@pytest.mark.parametrize("shared", [False, True])
def test_logits_are_those_of_the_source(
    params: dict[str, int], shared: bool, tmp_path: Path
) -> None:
    model = make_model(**params, tie_word_embeddings=shared)
    if shared:
        model.output.weight = model.tok_embeddings.weight
    checkpoint = open_llama2c(write_model(model, tmp_path / "model.bin", shared))
    assert checkpoint.params["tie_word_embeddings"] is shared
    assert checkpoint.files == {}
    torch.testing.assert_close(network(checkpoint)(TOKENS, 0), model(TOKENS, 0), atol=1e-5, rtol=0)


def test_tensors_are_parts_of_the_mapped_file(tmp_path: Path) -> None:
    path = write_model(make_model(), tmp_path / "model.bin")
    for parameter in network(open_llama2c(path)).parameters():
        assert parameter.untyped_storage().nbytes() == path.stat().st_size


def test_what_is_no_first_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    with pytest.raises(FileNotFoundError, match=r"no .*model\.bin: give the path"):
        open_llama2c(path)
    data = write_model(make_model(), path).read_bytes()
    for changed in (data[:-4], data + b"\0"):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=f"has {len(changed)} bytes .* it {len(data)}: it is"):
            open_llama2c(path)
    path.write_bytes(struct.pack("<Ii", 0x616B3432, 2) + data)
    with pytest.raises(ValueError, match=r"of llama2.c's version 2: .* --version 0"):
        open_llama2c(path)
    path.write_bytes(data[:20])
    with pytest.raises(ValueError, match="has 20 bytes, less than llama2"):
        open_llama2c(path)
    path.write_bytes(b"<!doctype html>" + data)
    with pytest.raises(ValueError, match=r"is no file of llama2\.c: dim"):
        open_llama2c(path)


SIZES = (64, 192, 2, 8, 8, 96, 32)


@pytest.mark.parametrize(
    ("position", "value"), [(0, 0), (0, 63), (0, 72), (1, -1), (2, 0), (3, 5), (4, 3), (5, 0)]
)
def test_sizes_that_make_no_model_are_refused(position: int, value: int, tmp_path: Path) -> None:
    sizes = list(SIZES)
    sizes[position] = value
    path = tmp_path / "model.bin"
    path.write_bytes(struct.pack("7i", *sizes) + bytes(100))
    with pytest.raises(ValueError, match=r"as its header reads, make no model"):
        open_llama2c(path)


def write_tokenizer(tokenizer: Tokenizer, path: Path) -> Path:
    """A file as llama2.c makes it of a SentencePiece model."""
    pieces = []
    for i in range(tokenizer.n_words):
        piece = tokenizer.token_piece(i)
        if i in (tokenizer.bos_id, tokenizer.eos_id):
            piece = f"\n{piece}\n"
        text = piece.replace("▁", " ").encode()
        pieces.append(struct.pack("<fI", tokenizer.sp_model.get_score(i), len(text)) + text)
    longest = max(len(piece) - 8 for piece in pieces)
    path.write_bytes(struct.pack("<I", longest) + b"".join(pieces))
    return path


TEXTS = [
    "Hello, world",
    "",
    " ",
    "   three spaces in front, two behind  ",
    "one  two   three",
    "\ttab\r\nline\n\n\nlines",
    "<s> and </s> and <unk> and <0x0A>",
    "Grüße, naïve café, 東京 и Москва, हिन्दी, עברית",
    "🦙🦙 \U0001f1e9\U0001f1ea \ufeff\u200b\u00a0",
    "3.14159 1234567890 x=y**2 !== ≠",
    "def f(x):\n    return {'a': [x for x in range(10)]}\n",
    "▁ is a character",
    "ﬁ ℌ ①",
    *("abc " * n + "the" * n for n in range(1, 30)),
]


def check_same(found: Tokenizer, original: Tokenizer) -> None:
    assert found.n_words == original.n_words
    assert (found.bos_id, found.eos_id) == (original.bos_id, original.eos_id)
    assert found.control_ids == original.control_ids
    for text in TEXTS:
        ids = original.encode(text, bos=True, eos=True)
        assert found.encode(text, bos=True, eos=True) == ids
        assert found.decode(ids) == original.decode(ids)
    generator = torch.Generator().manual_seed(0)
    for length in (1, 5, 50) * 10:
        ids = torch.randint(0, original.n_words, (length,), generator=generator).tolist()
        # Of Code Llama's control pieces, which llama2.c doesn't know, it keeps the spelling only.
        ids = [i for i in ids if i not in original.control_ids.values()]
        assert found.decode(ids) == original.decode(ids)


def test_the_tokenizer_of_llama_2(llama2_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_tokenizer(llama2_tokenizer, tmp_path / "tokenizer.bin")
    check_same(Tokenizer("tokenizer.bin", read_tokenizer(path)), llama2_tokenizer)


def test_a_tokenizer_next_to_the_model_is_used(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_model(make_model(), tmp_path / "model.bin")
    write_tokenizer(tiny_tokenizer, tmp_path / "tokenizer.bin")
    proto = open_llama2c(path).files["tokenizer.model"]
    assert isinstance(proto, bytes)
    check_same(Tokenizer("tokenizer.bin", proto), tiny_tokenizer)
    (tmp_path / "tokenizer.model").write_bytes(b"preferred")
    assert open_llama2c(path).files == {"tokenizer.model": tmp_path / "tokenizer.model"}


def test_damaged_tokenizers_are_refused(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_tokenizer(tiny_tokenizer, tmp_path / "tokenizer.bin")
    data = path.read_bytes()
    for changed in (b"", data[:-1], data[:200], data[4:], data + b"\0", b"\xff" * 50):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"is damaged or no tokenizer of llama2\.c"):
            read_tokenizer(path)
