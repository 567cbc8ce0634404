"""A directory's entries by kind, and the recognition of directories without weights."""

import contextlib
import json
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from llama.checkpoint.file_kinds import explain_heads, foreign_kind, read_head
from llama.errors import listed, printable

_MAX_ENTRIES = 10_000  # of a directory
_PARTIAL = ("*.incomplete", "*.part", "*.partial", "*.crdownload", "*.aria2", "*.download")
_ARCHIVES = ("*.zip", "*.tar", "*.tar.*", "*.tgz", "*.gz", "*.7z", "*.rar", "*.xz")
TOKENIZERS = ("tokenizer.model", "tokenizer.json")
TEXTS = (*TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# The weights that are read, in the order in which they are looked for.
WEIGHTS = (
    ("consolidated.*.pth",),
    ("model.safetensors", "model-*-of-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model-*-of-*.bin"),
    ("*.gguf",),
)
# Files beside weights that end as these do: adapters, Meta's and a trainer's.
_NO_WEIGHTS = (
    "adapter_*",
    "consolidated.*.pth",
    *("training_args.bin", "optimizer.*", "scheduler.*", "rng_state*", "scaler.*"),
)
# Files of other frameworks and tools: names, what they make a directory, and what to do.
_PYTORCH = "get the PyTorch weights (safetensors)"
_FOREIGN = (
    ("model_index.json", "a diffusers pipeline, which makes images", "use the package diffusers"),
    ("tf_model*.h5 *.keras", "of TensorFlow weights", _PYTORCH),
    ("saved_model.pb *.ckpt.index model.ckpt-*", "of TensorFlow weights", _PYTORCH),
    ("flax_model*", "of Flax weights", _PYTORCH),
    ("*.onnx *.onnx_data", "an ONNX model", _PYTORCH),
    ("openvino_model.*", "an OpenVINO model", _PYTORCH),
    ("*.tflite", "a TensorFlow Lite model", _PYTORCH),
    ("*.mlmodel *.mlpackage *.mlmodelc", "a Core ML model", _PYTORCH),
    ("weights.npz weights.*.npz", "of MLX weights", _PYTORCH),
    ("*.nemo", "a NeMo model", _PYTORCH),
    ("*.engine", "of TensorRT engines", _PYTORCH),
    ("shared_vocabulary.*", "a CTranslate2 model", _PYTORCH),
    (
        "lit_model.pth lit_config.json",
        "a LitGPT checkpoint",
        "litgpt convert_from_litgpt converts it",
    ),
    ("*.distcp", "a sharded training checkpoint of FSDP", "merge it (accelerate merge-weights)"),
    (
        "zero_to_fp32.py",
        "a DeepSpeed checkpoint",
        "run its zero_to_fp32.py, which merges the parts",
    ),
    (
        "mp_rank_* latest_checkpointed_iteration.txt",
        "a Megatron checkpoint",
        "convert it to transformers",
    ),
    ("modules.json", "a sentence-transformers model", "use the package sentence-transformers"),
)


@dataclass
class Folder:
    """A directory's entries by kind."""

    path: Path

    @cached_property
    def _entries(self) -> list[Path]:
        return sorted(islice(self.path.iterdir(), _MAX_ENTRIES))

    @cached_property
    def files(self) -> list[str]:
        return [entry.name for entry in self._entries if entry.is_file()]

    @cached_property
    def folders(self) -> list[str]:
        return [entry.name for entry in self._entries if entry.is_dir()]

    @cached_property
    def dangling(self) -> list[str]:
        return [entry.name for entry in self._entries if not entry.exists()]

    def match(self, *patterns: str) -> list[str]:
        """Return the files whose names match one of the patterns."""
        return [name for name in self.files if any(fnmatch(name, p) for p in patterns)]

    @cached_property
    def _groups(self) -> list[list[Path]]:
        """The weight files of each format, the one that is read first."""
        patterns = [*WEIGHTS]
        if self.is_hf_beside_meta:
            patterns.append(patterns.pop(0))
        groups = ([self.path / name for name in self.match(*each)] for each in patterns)
        return [group for group in groups if group]

    @property
    def is_hf_beside_meta(self) -> bool:
        """True where Meta's weight files lack params.json, and a whole HF directory is there."""
        if "params.json" in self.files or "config.json" not in self.files:
            return False
        indexes = ("*.safetensors.index.json", "pytorch_model.bin.index.json")
        return bool(self.match(*WEIGHTS[1], *WEIGHTS[2], *indexes))

    @cached_property
    def weights(self) -> list[Path]:
        """The weight files that are read."""
        return self._groups[0] if self._groups else self.unusual_weights

    @cached_property
    def other_weights(self) -> list[Path]:
        """Weight files under names that aren't looked for."""
        names = self.match("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt")
        return [self.path / n for n in names if not any(fnmatch(n, p) for p in _NO_WEIGHTS)]

    @cached_property
    def unusual_weights(self) -> list[Path]:
        """The weight file of a Hugging Face directory under a name of its own, or its parts.

        Tools that quantise call it, for example, gptq_model-4bit-128g.safetensors.
        """
        is_hf = "config.json" in self.files and not self._groups
        found = self.other_weights if is_hf else []
        for ending in (".safetensors", ".bin", ".pt", ".pth"):
            paths = [path for path in found if path.suffix == ending]
            paths = [p for p in paths if ending == ".safetensors" or read_head(p, 2) == b"PK"]
            if paths:
                models = {re.sub(r"-\d{5}-of-\d{5}$", "", path.stem) for path in paths}
                return paths if len(models) == 1 else []
        return []

    @cached_property
    def whole_files(self) -> list[str]:
        """The files that may be given in place of a Hugging Face directory, for all weights."""
        if "config.json" not in self.files:
            return []
        names = {path.name for path in self.other_weights}
        return [name for name in names if not re.search(r"-\d{5}-of-\d{5}\.\w+$", name)]

    @property
    def ignored_weights(self) -> list[Path]:
        """Weight files that aren't read, since others are there too."""
        return [path for group in self._groups[1:] for path in group]

    @property
    def is_adapter(self) -> bool:
        """True for an adapter's configuration, and no weights of a whole network."""
        return "adapter_config.json" in self.files and not self.weights

    @property
    def is_checkpoint(self) -> bool:
        if "adapter_config.json" in self.files or self.match("*.gguf"):
            return True
        return bool(self.weights) and bool({"config.json", "params.json"} & {*self.files})

    def json(self, name: str) -> dict[str, Any]:
        """Return a JSON file's object; an empty one if it can't be read."""
        try:
            value = json.loads((self.path / name).read_bytes()) if name in self.files else {}
        except (OSError, ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}


def explain_without_weights(folder: Folder) -> str | None:
    return (
        explain_partial(folder)
        or _explain_cache(folder)
        or _explain_foreign(folder)
        or _explain_nested(folder)
        or _explain_rest(folder)
    )


def explain_partial(folder: Folder) -> str | None:
    names = folder.match(*_PARTIAL)
    cache = folder.path / ".cache" / "huggingface" / "download"  # of hf download --local-dir
    if not names and cache.is_dir():
        names = Folder(cache).match("*.incomplete")
    if not names:
        return None
    return (
        f"{folder.path} holds an unfinished download "
        f"({listed([printable(name) for name in names], 3)}): run the download again"
    )


def _explain_cache(folder: Folder) -> str | None:
    """Return what a directory of Hugging Face's cache is, and the snapshot in it."""
    path = folder.path / "snapshots" if "snapshots" in folder.folders else folder.path
    if path.name != "snapshots":
        return None
    snapshots = [path / name for name in Folder(path).folders]
    whole = [each for each in snapshots if Folder(each).is_checkpoint]
    name = path.resolve().parent.name.removeprefix("models--").replace("--", "/")
    where = f"{folder.path} is the folder of {printable(name)} in Hugging Face's cache"
    if whole:
        return f"{where}: give the snapshot in it, {listed([str(each) for each in whole], 3)}"
    return f"{where}, where no snapshot is whole: run the download again"


def _explain_foreign(folder: Folder) -> str | None:
    for patterns, what, remedy in _FOREIGN:
        names = [*folder.files, *folder.folders]
        found = [n for n in names if any(fnmatch(n, pattern) for pattern in patterns.split())]
        if found:
            return f"{folder.path} is {_article(what)} ({printable(found[0])}): {remedy}"
    return None


def _article(what: str) -> str:
    return f"a directory {what}" if what.startswith("of ") else what


def _explain_nested(folder: Folder) -> str | None:
    """Return the checkpoints that lie one level below."""
    paths = (folder.path / name for name in folder.folders[:1000])
    inner = []
    for path in paths:
        with contextlib.suppress(OSError):  # one that may not be listed
            if Folder(path).is_checkpoint:
                inner.append(str(path))
    if len(inner) == 1:
        return f"{folder.path} holds a checkpoint in a directory of its own: give {inner[0]}"
    if inner:
        return f"{folder.path} holds several checkpoints: give one of {listed(inner, 10)}"
    return None


def _explain_rest(folder: Folder) -> str | None:
    """Return what a directory without weights, with files of its own or none, is."""
    path, configs = folder.path, {"config.json", "params.json"} & {*folder.files}
    if archives := folder.match(*_ARCHIVES):
        return f"{path} holds an archive ({printable(archives[0])}): unpack it and give the result"
    if ggml := [n for n in folder.match("*.bin") if foreign_kind(path / n)]:
        return explain_heads([path / ggml[0]])
    if folder.other_weights:
        return _explain_unusual(folder)
    if folder.match("index.html", "index.htm", "*.html"):
        return f"{path} holds a web page, not a model's files: download these from its links"
    if not configs and folder.match(*TOKENIZERS):
        return (
            f"{path} is a tokenizer alone: give a directory with weights, and this tokenizer as "
            "tokenizer_path if that has none"
        )
    if ".git" in folder.folders or "setup.py" in folder.files or "pyproject.toml" in folder.files:
        return (
            f"{path} is a repository without weights: run git lfs pull in it if it is a model's, "
            "or give the directory that a checkpoint was downloaded to"
        )
    return None


def _explain_unusual(folder: Folder) -> str:
    """Return what files are that may hold weights, none of which is read."""
    names = [printable(path.name) for path in folder.other_weights]
    if len(names) > 1 and "config.json" in folder.files:
        return f"{folder.path} has several weight files ({listed(names)}): give the path of one"
    llama2c = ", or give that file if it is llama2.c's" if names[0].endswith(".bin") else ""
    return (
        f"{folder.path} has {names[0]}, but not the config.json of a transformers model: download "
        f"that too{llama2c}"
    )
