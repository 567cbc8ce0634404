"""A checkpoint's description and the verification of its files."""

import contextlib
import hashlib
import re
import sys
import zipfile
from pathlib import Path

import torch

from llama.args import ModelArgs
from llama.checkpoint import open_checkpoint
from llama.checkpoint.base import vocabulary_size
from llama.checkpoint.meta import find_shards, find_tokenizer
from llama.checkpoint.params import make_args
from llama.checkpoint.sharding import cache_bytes, parameter_count, weight_bytes
from llama.cli import progress
from llama.errors import printable
from llama.logits.recommended import recommended_sampling
from llama.tokenizer import BaseTokenizer
from llama.tokenizers import load_tokenizer

# (dim, n_layers) -> the size's name
_SIZES = {
    (4096, 32): "7B",
    (5120, 40): "13B",
    (6656, 60): "33B",
    (8192, 48): "34B",
    (8192, 80): "65B or 70B",
}
_LLAMA3_SIZES = {
    (2048, 16): "1B",
    (3072, 28): "3B",
    (4096, 32): "8B",
    (8192, 80): "70B",
    (16384, 126): "405B",
}
_LLAMA3_VOCABULARY = 128_000  # ids and more; fine-tuned models add a few
_PUBLISHED_NAME = re.compile(
    r"llama-2-\d+b(-chat)?|CodeLlama-\d+b(-Python|-Instruct)?|\d+b_(pre_trained|instruction_tuned)"
    r"|(Meta-)?Llama-?3(\.\d)?-\d+B(-Instruct)?(-MP\d+)?"
)
_WEIGHT_FILES = ("consolidated.*.pth", "*.safetensors", "pytorch_model*.bin", "*.gguf")


def inspect(ckpt_dir: str, max_seq_len: int = 512, max_batch_size: int = 8) -> None:
    """Print a checkpoint's description and the memory it needs, then verify all of its files.

    Exits with status 1 if a file is damaged or missing, or can't be read. ``python -m
    llama.checkpoint reshard`` writes a checkpoint in another number of files.

    Args:
        ckpt_dir: a checkpoint of any format.
        max_seq_len: positions of the cache to count the memory for.
        max_batch_size: sequences in the cache to count the memory for.
    """
    directory = Path(str(ckpt_dir))
    try:
        _describe(directory, max_seq_len, max_batch_size)
        has_sums = any(directory.glob("consolidated.*.pth"))
        problems = verify(directory) if has_sums else []
    except (ImportError, MemoryError, OSError, ValueError) as error:
        problems = [str(error)]
    for problem in problems:
        print(f"PROBLEM: {problem}")
    if problems:
        sys.exit(1)
    if not has_sums:
        print("this format has no checksums: only names, shapes and tokenizer could be checked")
    elif not (directory / "checklist.chk").is_file():
        print("no checklist.chk: only the weight files could be checked, by their own checksums")
    print("no damage found")


def _describe(directory: Path, max_seq_len: int, max_batch_size: int) -> None:
    checkpoint = open_checkpoint(directory)
    vocabulary = vocabulary_size(checkpoint)
    tokenizer = None
    with contextlib.suppress(FileNotFoundError):
        tokenizer = load_tokenizer(checkpoint.files, vocabulary)
    n_words = tokenizer.n_words if tokenizer else vocabulary
    args = make_args(checkpoint.params, checkpoint.source, n_words, max_seq_len, max_batch_size)
    checkpoint.check(args)
    stored = {t.dtype for part in checkpoint.parts for name in part for t in part.mapped(name)}
    dtypes = sorted(
        str(dtype).removeprefix("torch.") if dtype.is_floating_point else "quantised"
        for dtype in stored
    )
    paths = [directory] if directory.is_file() else _weight_files(directory)
    count = parameter_count(args)
    print(f"model        {identify(directory, args, tokenizer)}")
    print(f"parameters   {count:,} in {', '.join(dtypes)}")
    print(
        f"shape        dim {args.dim}, {args.n_layers} layers, {args.n_heads} heads, "
        f"{args.kv_heads} key/value heads, hidden size {args.hidden_dim}, "
        f"vocabulary {args.vocab_size}"
    )
    print(
        f"files        {len(paths)} of {sum(p.stat().st_size for p in paths) / 1e9:.2f} GB in all"
    )
    print(f"tokenizer    {f'{tokenizer.n_words} pieces' if tokenizer else 'none'}")
    if tokenizer is not None:
        ends = [tokenizer.token_piece(i) for i in sorted(tokenizer.stop_ids)]
        print(f"ends         {printable(' '.join(ends), 200) or 'none'}")
    print(f"sampling     {recommended_sampling(checkpoint.files, directory) or 'none recommended'}")
    weights = weight_bytes(args, torch.bfloat16, 1, checkpoint.scheme)
    cache = cache_bytes(args, torch.bfloat16)
    print(
        f"memory       {weights / 1e9:.2f} GB of weights and {cache / 1e9:.2f} GB of cache at "
        f"max_batch_size={max_batch_size}, max_seq_len={max_seq_len}, both in "
        f"bfloat16{'' if checkpoint.scheme is None else ' but for ' + checkpoint.scheme.name}"
    )


def _weight_files(directory: Path) -> list[Path]:
    paths = (sorted(directory.glob(pattern)) for pattern in _WEIGHT_FILES)
    return next((group for group in paths if group), [])


def identify(directory: Path, args: ModelArgs, tokenizer: BaseTokenizer | None) -> str:
    """Return the model's family and size, as far as they are known; "unknown" otherwise.

    Judges by the folder's name, the shape and the tokenizer.
    """
    is_llama3 = args.vocab_size >= _LLAMA3_VOCABULARY
    sizes = _LLAMA3_SIZES if is_llama3 else _SIZES
    size = sizes.get((args.dim, args.n_layers), "unknown size")
    name = directory.resolve().name
    if _PUBLISHED_NAME.fullmatch(name):
        return f"{name} by its folder's name ({size} by its shape)"
    if size == "unknown size":
        return "unknown"
    if is_llama3:
        return f"{_llama3_version(args, size)} {size}"
    if args.rope_theta == 1e6 or (tokenizer and tokenizer.prefix_id is not None):
        return f"Code Llama {size.removeprefix('65B or ')}"
    if size == "65B or 70B":
        return "LLaMA 65B" if args.kv_heads == args.n_heads else "Llama 2 70B"
    return f"LLaMA {size}" if size == "33B" else f"LLaMA or Llama 2 {size}"


def _llama3_version(args: ModelArgs, size: str) -> str:
    if args.rope_scaling is None:
        return "Llama 3"
    if size in ("1B", "3B"):
        return "Llama 3.2"
    return "Llama 3.1 or 3.3" if size == "70B" else "Llama 3.1"


def verify(directory: Path) -> list[str]:
    """Return the problems of a checkpoint's files: damaged tensor bytes load without an error.

    Checks MD5 sums where Meta's ``checklist.chk`` and ``tokenizer_checklist.chk`` give them, and
    the checksums (CRC-32) that each weight file carries.
    """
    problems = _check_list(directory / "checklist.chk")
    with contextlib.suppress(FileNotFoundError):
        tokenizer = find_tokenizer(directory)
        problems += _check_list(tokenizer.parent / "tokenizer_checklist.chk")
    for path in find_shards(directory):
        try:
            damaged = _damaged_entry(path)
        except Exception as error:  # damage can raise any error
            problems.append(f"{path} can't be read: {error}")
        else:
            if damaged:
                problems.append(f"{path} is damaged in {damaged}")
    return problems


def _check_list(checklist: Path) -> list[str]:
    if not checklist.is_file():
        return []
    problems = []
    for line in checklist.read_text(encoding="utf-8", errors="replace").splitlines():
        expected, _, name = line.strip().partition(" ")
        name = name.strip().removeprefix("*").removeprefix("./")
        path = checklist.parent / name
        if not line.strip():
            continue
        if not re.fullmatch(r"[0-9a-f]{32}", expected) or not name or "/" in name:
            problems.append(f"{checklist} has the line {line!r}, which is no checksum")
        elif name == "orig_params.json" and not path.exists():
            continue  # Llama 3.2's checklists name it, and no download has it
        elif not path.is_file():
            problems.append(f"{path} is missing, but {checklist.name} names it")
        elif _md5(path) != expected:
            problems.append(f"{path} differs from its checksum in {checklist.name}")
    return problems


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file, _checking(path) as show:
        while block := file.read(1 << 22):
            digest.update(block)
            show(file.tell())
    return digest.hexdigest()


def _damaged_entry(path: Path) -> str | None:
    """Return the first entry of a zip archive whose bytes don't have its checksum."""
    # As ``ZipFile.testzip``, which doesn't report its progress.
    done = 0
    with zipfile.ZipFile(path) as archive, _checking(path) as show:
        for entry in archive.infolist():
            try:
                with archive.open(entry) as file:
                    while block := file.read(1 << 22):
                        done += len(block)
                        show(done)
            except zipfile.BadZipFile:
                return entry.filename
    return None


def _checking(path: Path) -> progress:
    return progress(path.stat().st_size, f"checking {path.name}")
