"""The command that describes a checkpoint and verifies its files."""

import contextlib
import hashlib
import json as json_format
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama.checkpoint.description import ERRORS, describe
from llama.checkpoint.identity import identify as identify
from llama.checkpoint.meta import find_shards, find_tokenizer
from llama.cli import progress
from llama.errors import listed, printable


def inspect(
    ckpt_dir: str,
    max_seq_len: int = 512,
    max_batch_size: int = 8,
    checksums: bool = True,
    json: bool = False,
) -> None:
    """Print what a checkpoint, an adapter or any other path is, and the memory it needs.

    Then verifies the files that have checksums. Exits with status 1 if a file is damaged or
    missing, or can't be read. ``python -m llama.checkpoint reshard`` writes a checkpoint in another
    number of files.

    Args:
        ckpt_dir: a checkpoint of any format, or an adapter's directory.
        max_seq_len: positions of the cache to count the memory for.
        max_batch_size: sequences in the cache to count the memory for.
        checksums: whether to read all weight files and compare their checksums.
        json: whether to print one object of JSON, whose keys docs/formats.md lists.
    """
    path = Path(str(ckpt_dir))
    found = describe(path, max_seq_len, max_batch_size)
    found["checksums"] = None
    if checksums and found["format"] == "meta" and not found["problems"]:
        try:
            found["problems"] += [printable(problem, 1000) for problem in verify(path)]
        except ERRORS as error:
            found["problems"].append(printable(str(error), 1000))
        listed_files = (path / "checklist.chk").is_file()
        found["checksums"] = "all files" if listed_files else "weight files"
    if json:
        print(json_format.dumps(found, indent=2, allow_nan=False))
    else:
        for line in _lines(found):
            print(line)
    if found["problems"]:
        sys.exit(1)


def _lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a description for people."""
    for name, line in (
        ("model", _model),
        ("parameters", _parameters),
        ("shape", _shape),
        ("files", _files),
        ("quantised", lambda found: found["quantization"]),
        ("tokenizer", _tokenizer),
        ("chat format", _chat_format),
        ("ends", _ends),
        ("sampling", _sampling),
        ("adapters", _adapters),
        ("adapter", _adapter),
    ):
        if text := line(found):
            yield f"{name:<12} {text}"
    yield from _memory(found)
    for warning in found["warnings"]:
        yield f"odd          {warning}"
    for problem in found["problems"]:
        yield f"PROBLEM: {problem}"
    if not found["problems"]:
        if found["format"] == "adapter":
            yield "an adapter has no checksums: loading it compares its shapes with its base"
        elif found["format"] != "meta":
            yield "this format has no checksums: only names, shapes and tokenizer could be checked"
        elif found["checksums"] is None:
            yield "checksums were not compared: only names, shapes and tokenizer were checked"
        elif found["checksums"] == "weight files":
            yield "no checklist.chk: only the weight files could be checked, by their own checksums"
        yield "no damage found"


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.2f} MB"


def _model(found: dict[str, Any]) -> str | None:
    family = f"of the family {found['family']}" if found["family"] else None
    return ", ".join(filter(None, (found["model"], family))) or None


def _parameters(found: dict[str, Any]) -> str | None:
    shares = found["dtypes"] or {}
    dtypes = ", ".join(
        kind if share == 1 else f"{share:.1%} {kind}" for kind, share in list(shares.items())[:10]
    )
    if found["parameters"] is None:
        return dtypes and f"in {dtypes}"
    return f"{found['parameters']:,} in {dtypes or 'unknown types'}"


def _shape(found: dict[str, Any]) -> str | None:
    shape = found["shape"]
    if shape is None:
        return None
    labels = shape.get("labels")
    texts = [
        f"dim {shape['dim']}, {shape['n_layers']} layers, {shape['n_heads']} heads, "
        f"{shape['n_kv_heads']} key/value heads, hidden size {shape['hidden_dim']}, "
        f"vocabulary {shape['vocab_size']}"
    ]
    texts += [f"{shape['max_seq_len']} positions"] if shape.get("max_seq_len") else []
    texts += [f"rotary scaling {shape['rope_scaling']}"] if shape.get("rope_scaling") else []
    texts += ["tied embedding"] if shape.get("tie_word_embeddings") else []
    texts += [f"a classifier of {listed([printable(each) for each in labels])}"] if labels else []
    return ", ".join(texts)


def _files(found: dict[str, Any]) -> str | None:
    files = found["files"]
    return files and f"{files['count']} of {_size(files['bytes'])} in all"


def _tokenizer(found: dict[str, Any]) -> str | None:
    tokenizer = found["tokenizer"]
    if tokenizer is None:
        return None if found["model"] is None else "none"
    roles = [f"{role} {tokenizer[role]}" for role in ("bos", "eos", "pad") if tokenizer.get(role)]
    special = [f"{len(tokenizer['special'])} special"] if "special" in tokenizer else []
    return ", ".join([f"{tokenizer['pieces']} pieces of {tokenizer['kind']}", *special, *roles])


def _ends(found: dict[str, Any]) -> str | None:
    ends = (found["tokenizer"] or {}).get("ends")
    return None if ends is None else printable(" ".join(ends), 200) or "none"


def _chat_format(found: dict[str, Any]) -> str | None:
    chat = found["chat_format"]
    return chat and ", ".join(dict.fromkeys([chat["name"], *chat["templates"]]))


def _sampling(found: dict[str, Any]) -> str | None:
    if found["sampling"] is None:
        return None
    values = [f"{name}={value!r}" for name, value in found["sampling"].items()]
    return ", ".join(values) or "none recommended"


def _adapters(found: dict[str, Any]) -> str | None:
    adapters = found["adapters"]
    if adapters is None:
        return None
    modules = (f"{name} {size['in']}→{size['out']}" for name, size in adapters["modules"].items())
    merged = "" if adapters["mergeable"] else " (on call alone: quantised weights take no merging)"
    first, *others = adapters["kinds"]
    return f"{', '.join([*others, first])} of {', '.join(modules)}{merged}"


def _adapter(found: dict[str, Any]) -> str | None:
    adapter = found["adapter"]
    if adapter is None:
        return None
    texts = [f"{adapter['kind']} for {adapter['base'] or 'an unnamed base'}"]
    texts += ["DoRA"] if adapter["dora"] else []
    for name in ("rank", "alpha", "virtual_tokens"):
        texts += [f"{name.replace('_', ' ')} {adapter[name]}"] if adapter[name] is not None else []
    texts += [f"of {listed(adapter['modules'], 20)}"] if adapter["modules"] else []
    texts += [f"{adapter['tensors']} tensors of {_size(adapter['bytes'])}"]
    return ", ".join(texts)


def _memory(found: dict[str, Any]) -> Iterator[str]:
    memory = found["memory"]
    if memory is None:
        return
    scheme = f" but for {memory['quantization']}" if memory["quantization"] else ""
    yield (
        f"memory       at max_batch_size={memory['max_batch_size']}, "
        f"max_seq_len={memory['max_seq_len']}, in {memory['dtype']}{scheme}:"
    )
    for n, sizes in memory["processes"].items():
        each = "1 process:" if n == "1" else f"{n} processes, each:"
        weights, cache = (_size(sizes[name]) for name in ("weights", "cache"))
        yield f"{'':<12} {each:<20} {weights} of weights and {cache} of cache"


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
