"""Recognition of paths that can't be opened: a sentence for each says what to do about it.

Nothing here runs where a checkpoint opens: ``clear_errors`` asks after an error.
"""

import contextlib
import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from llama.checkpoint.file_kinds import (
    MAX_FILES,
    contents_kind,
    explain_heads,
    foreign_kind,
    missing_bytes,
    read_head,
    safetensors_header,
    tensor_names,
    unread_kind,
)
from llama.checkpoint.folders import (
    TEXTS,
    TOKENIZERS,
    WEIGHTS,
    Folder,
    explain_partial,
    explain_without_weights,
)
from llama.checkpoint.hf_config import EXPECTED_TYPES
from llama.errors import listed, printable

_CONFIGS = ("config.json", "params.json", "generation_config.json")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DOWNLOAD = "download it first (hf download {0} --local-dir {1}) and give that directory"


@contextlib.contextmanager
def clear_errors(explain: Callable[[Any], str | None], what: Any) -> Iterator[None]:
    """Let an error say what a path or files are, where ``explain`` recognises them.

    Args:
        explain: ``explain_path``, ``explain_adapter`` or ``explain_texts``.
        what: its argument.

    Raises:
        FileNotFoundError, ValueError: as the block, with a sentence that says more.
    """
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        sentence = None
        with contextlib.suppress(OSError, ValueError):  # the first error tells enough
            sentence = explain(what)
        if sentence is None:
            raise
        sentence = printable(sentence, 1000)
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(sentence) from error
        raise ValueError(sentence) from error


def explain_texts(files: Mapping[str, Path | bytes]) -> str | None:
    """Return which of the files beside weights are something else than their names say."""
    paths = [file for file in files.values() if isinstance(file, Path)]
    return explain_heads(paths)


def explain_adapter(path: Path) -> str | None:
    """Return what a path that should be an adapter's directory is; None if it isn't recognised."""
    if not path.exists():
        return _explain_missing(path, "adapter")
    if path.is_file():
        return f"{path} is a file: give the adapter's directory, {path.parent}"
    folder = Folder(path)
    if "adapter_config.json" not in folder.files:
        found = "a checkpoint" if folder.weights else "no adapter"
        more = "give that as ckpt_dir" if folder.weights else "give the directory that PEFT wrote"
        return f"{path} is {found}, since it has no adapter_config.json: {more}"
    names = folder.match("adapter_*")
    return explain_heads([path / name for name in names]) or explain_partial(folder)


def explain_path(path: Path) -> str | None:
    """Return what a path that can't be opened is and what to do; None if it isn't recognised."""
    if path.is_dir():
        return _explain_directory(Folder(path))
    if path.is_file():
        return _explain_file(path)
    return None if path.exists() else _explain_missing(path, "checkpoint")


def _explain_directory(folder: Folder) -> str | None:
    if not folder.files and not folder.folders and not folder.dangling:
        return (
            f"{folder.path} is empty and has no weights: download the checkpoint into it, or check "
            "the path"
        )
    texts = [folder.path / name for name in (*_CONFIGS, *_INDEXES, *TEXTS)]
    first = folder.weights[0] if folder.weights else None
    is_hf = first is not None and first.suffix in (".safetensors", ".bin")
    checks = [lambda: explain_heads([*folder.weights, *texts]), lambda: _explain_adapter(folder)]
    if is_hf or first is None:  # other formats' weights don't go by config.json
        checks.append(lambda: _explain_family(folder))
    checks += [lambda: _explain_contents(folder), lambda: _explain_unfinished(folder)]
    if found := next((sentence for check in checks if (sentence := check())), None):
        return found
    if first is None:
        return explain_without_weights(folder)
    if not is_hf or "config.json" in folder.files:
        return None
    return f"{folder.path} has {first.name} but no config.json: download that too"


def _explain_adapter(folder: Folder) -> str | None:
    if not folder.is_adapter:
        return None
    config = folder.json("adapter_config.json")
    base = config.get("base_model_name_or_path")
    known = f", which is {printable(base)}" if isinstance(base, str) and base else ""
    kind = config.get("peft_type")
    kind = f" ({printable(kind)})" if isinstance(kind, str) else ""
    return (
        f"{folder.path} is an adapter{kind} alone: give the checkpoint that it was trained on"
        f"{known}, and this directory as adapter="
    )


def _explain_family(folder: Folder) -> str | None:
    config = folder.json("config.json")
    kind, names = config.get("model_type"), config.get("architectures")
    # hf.py says which variants of these two aren't read, and why.
    if not isinstance(kind, str) or kind in ("llama", "mistral", ""):
        return None
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    which = printable(names[0]) if names else "model"
    return (
        f"{folder.path / 'config.json'} is of model_type {printable(repr(kind))}: expected "
        f"{EXPECTED_TYPES}; load this {which} with transformers"
    )


def _explain_contents(folder: Folder) -> str | None:
    """Return which weight file holds something else than weights.

    Where weights are read, opening them tells a training checkpoint, so that its error is left to
    stand; only names that no known weights have count here.
    """
    for path in (folder.weights or folder.other_weights)[:MAX_FILES]:
        kind = unread_kind(tensor_names(path)) if folder.weights else contents_kind(path)
        if kind is not None:
            return f"{path} is {kind.what}: {kind.remedy}"
    return None


def _explain_unfinished(folder: Folder) -> str | None:
    """Return which weight files are missing or shorter than the index or their headers say."""
    if any(missing_bytes(path) for path in folder.weights[:MAX_FILES]):
        return None  # the error of opening it says so
    if folder.weights and not fnmatch(folder.weights[0].name, "*-*-of-*"):
        return None  # nor does an index count where one file has all weights
    lost = [name for name in folder.dangling if fnmatch(name, "*.safetensors") or ".bin" in name]
    if lost:
        return (
            f"{folder.path} has {listed([printable(name) for name in lost])} as a link to nothing: "
            "the download is unfinished; run it again"
        )
    for index in _INDEXES:
        if index in folder.files:
            return _explain_index(folder, index)
    return _explain_numbered(folder)


def _explain_index(folder: Folder, index: str) -> str | None:
    """Return which of the files that an index names are missing or too short."""
    wanted = folder.json(index).get("weight_map")
    values = wanted.values() if isinstance(wanted, dict) else ()
    names = {name for name in values if isinstance(name, str) and "/" not in name}
    missing = sorted(names - {*folder.files})
    if missing:
        others = f", as {len(missing) - 1} more of {len(names)} files are" * (len(missing) > 1)
        return (
            f"{folder.path / index} names {printable(missing[0])}, which is missing{others}: the "
            "download is unfinished; run it again"
        )
    metadata = folder.json(index).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    size = sum((folder.path / name).stat().st_size for name in names)
    if type(total) is not int or not 0 < size < total < 1 << 50:
        return None
    return (
        f"{folder.path} holds {size:,} of the {total:,} bytes of weights that {index} announces: "
        "the download is unfinished; run it again"
    )


def _explain_numbered(folder: Folder) -> str | None:
    """Return which of the parts that a file's name counts are missing, or that the index is."""
    for name in folder.match("model-*-of-*.safetensors", "pytorch_model-*-of-*.bin"):
        match = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.(\w+)", name)
        if match is None:
            continue
        stem, total, ending = match[1], int(match[2]), match[3]
        there = len(folder.match(f"{stem}-?????-of-{match[2]}.{ending}"))
        if there < total:
            return (
                f"{folder.path} has {there} of {total} weight files {printable(stem)}-*: the "
                "download is unfinished; run it again"
            )
        index = f"{printable(stem)}.{ending}.index.json"
        return f"{folder.path} lacks {index}, which names its {total} weight files: download it"
    return None


def _explain_file(path: Path) -> str | None:
    """Return what a file is that isn't a checkpoint of its own."""
    if kind := foreign_kind(path) or contents_kind(path):
        return f"{path} is {kind.what}: {kind.remedy}"
    name, parent = path.name, path.parent
    if name == "adapter_config.json" or name.startswith("adapter_model"):
        return f"{path} is a file of an adapter: give the base's path, and {parent} as adapter="
    if name in TOKENIZERS or path.suffix == ".model":
        return f"{path} is a tokenizer alone: give it as tokenizer_path, and weights as ckpt_dir"
    if how_much := missing_bytes(path):
        return f"{path} is damaged or no whole file ({how_much}): download it again"
    if name in Folder(parent).whole_files:  # its own error tells more
        return None
    weights = any(fnmatch(name, pattern) for group in WEIGHTS[:3] for pattern in group)
    is_weights = weights or safetensors_header(path) is not None or _is_torch(path)
    if not is_weights and name not in (*_CONFIGS, *_INDEXES, *TEXTS, "checklist.chk"):
        return None
    if Folder(parent).is_checkpoint:
        return f"{path} is one file of a checkpoint: give its directory, {parent}"
    return (
        f"{path} is one file of a checkpoint, and what belongs to it isn't beside it: download "
        "all of its files and give their directory"
    )


def _is_torch(path: Path) -> bool:
    return path.suffix in (".pt", ".pth", ".bin", ".ckpt") and read_head(path, 4).startswith(b"PK")


def _explain_missing(path: Path, what: str) -> str | None:
    """Return why a path may not exist."""
    if path.is_symlink():
        return f"{path} is a link to nothing: download the {what} again, or check the path"
    text = re.sub(r"^https?:/+(?:huggingface\.co|hf\.co)/", "", str(path))
    parts = text.split("/")
    is_page = text != str(path) or text.startswith(("http:", "https:"))
    if is_page and len(parts) > 1 and not text.startswith("http"):
        name = "/".join(parts[:2])
        return f"{path} is an address: {_DOWNLOAD.format(name, parts[1])}"
    if is_page:
        return f"{path} is an address: download the {what}'s files and give their directory"
    near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, near[:1000], 1, 0.8)
    start = f"no {what} {'directory ' * (what == 'checkpoint')}at {path}: "
    if close:
        return f"{start}check the path; there is {path.parent / printable(close[0])}"
    if _HUB_NAME.fullmatch(text) and not path.parent.is_dir():
        return (
            f"{start}if it is a model's name on Hugging Face's hub, "
            f"{_DOWNLOAD.format(text, parts[1])}"
        )
    return None
