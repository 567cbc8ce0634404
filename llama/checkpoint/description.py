"""A checkpoint's description, as an object of JSON and as lines of text; no weight is read."""

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from llama.args import ModelArgs
from llama.chat.formats import FORMATS, choose_chat
from llama.checkpoint import open_checkpoint
from llama.checkpoint.adapter_config import PROMPT_KINDS
from llama.checkpoint.base import Checkpoint, text_files, vocabulary_size
from llama.checkpoint.file_kinds import (
    missing_bytes,
    quantisation,
    safetensors_header,
    tensor_names,
)
from llama.checkpoint.folders import Folder
from llama.checkpoint.gguf import split_paths
from llama.checkpoint.hf_names import META_NAMES
from llama.checkpoint.identity import identify
from llama.checkpoint.load import choose_dtype
from llama.checkpoint.params import make_args
from llama.checkpoint.pretrained import fit_tokenizer
from llama.checkpoint.recognition import clear_errors, explain_adapter, explain_texts
from llama.checkpoint.rounding import is_made_here
from llama.checkpoint.sharding import (
    cache_bytes,
    check_model_parallel_size,
    form_of,
    full_shapes,
    parameter_count,
    weight_bytes,
)
from llama.errors import listed, printable, short
from llama.logits.recommended import recommended_sampling
from llama.sampling import SamplingParams
from llama.tokenizer import BaseTokenizer
from llama.tokenizers import chat_templates, load_tokenizer

ERRORS = (ImportError, MemoryError, OSError, ValueError)
"""Those of opening a checkpoint."""

_KEYS = (
    *(
        "path",
        "format",
        "family",
        "model",
        "parameters",
        "shape",
        "dtypes",
        "quantization",
        "files",
    ),
    *("tokenizer", "chat_format", "sampling", "adapters", "adapter", "memory"),
)
_SHAPE = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size")
_TOKENIZERS = {"Tokenizer": "sentencepiece", "JsonTokenizer": "tokenizers"}
_HALVES = ("BF16", "F16", "bfloat16", "float16")
# The numbers of a config.json that tell a network's size, whatever its family.
_CONFIG_NUMBERS = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "hidden_dim",
    "vocab_size": "vocab_size",
}
_DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def describe(path: Path, max_seq_len: int = 512, max_batch_size: int = 8) -> dict[str, Any]:
    """Return a checkpoint's or an adapter's description, an object of JSON.

    Args:
        path: a checkpoint of any format, an adapter's directory, or anything else.
        max_seq_len: positions of the cache to count the memory for.
        max_batch_size: sequences in the cache to count the memory for.

    Returns:
        The keys that docs/formats.md lists; None for what is unknown. ``warnings`` has what was
        logged and what is odd, ``problems`` why the checkpoint can't be used.
    """
    found: dict[str, Any] = dict.fromkeys(_KEYS)
    found |= {"path": printable(str(path), 1000), "warnings": [], "problems": []}
    with _recorded(found["warnings"]):
        try:
            if path.is_dir() and Folder(path).is_adapter:
                found |= {"format": "adapter", "adapter": describe_adapter(path)}
                found["problems"] += _adapter_problems(path)
            else:
                _describe_checkpoint(found, path, max_seq_len, max_batch_size)
        except ERRORS as error:
            found["problems"].append(printable(str(error), 1000))
            if found["format"] is None and path.is_dir():
                _describe_unread(found, Folder(path))
    return found


@contextlib.contextmanager
def _recorded(messages: list[str]) -> Iterator[None]:
    """Add what the library's loggers warn of to a list."""

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = printable(record.getMessage(), 1000)
            if message not in messages:
                messages.append(message)

    handler, logger = Recorder(logging.WARNING), logging.getLogger("llama")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _describe_checkpoint(
    found: dict[str, Any], path: Path, max_seq_len: int, max_batch_size: int
) -> None:
    checkpoint = open_checkpoint(path)
    vocabulary = vocabulary_size(checkpoint)
    found["format"] = checkpoint.format
    found["files"] = _files(path, checkpoint)
    found["dtypes"] = _shares(_stored_sizes(checkpoint))
    found["quantization"] = _quantisation(checkpoint, found["dtypes"])
    tokenizer = None
    try:
        with clear_errors(explain_texts, checkpoint.files):
            tokenizer = load_tokenizer(checkpoint.files, vocabulary)
    except FileNotFoundError:
        found["warnings"].append("there is no tokenizer: give one as tokenizer_path")
    except ERRORS as error:
        found["problems"].append(printable(str(error), 1000))
    args = make_args(checkpoint.params, checkpoint.source, vocabulary, max_seq_len, max_batch_size)
    checkpoint.check(args)
    if tokenizer is not None:
        fit_tokenizer(tokenizer, args.vocab_size, checkpoint.source)
    found["family"] = "llama"
    found["model"] = identify(path, args, tokenizer)
    found["parameters"] = parameter_count(args)
    found["shape"] = _shape(args, checkpoint)
    found["adapters"] = _adapters(checkpoint, args)
    found["memory"] = _memory(checkpoint, args)
    if tokenizer is not None:
        found["tokenizer"] = _tokenizer(tokenizer)
        found["chat_format"] = _chat_format(tokenizer, checkpoint)
        found["warnings"] += _oddities(path, args, tokenizer, found)
        try:
            found["sampling"] = _sampling(checkpoint, path)
        except ERRORS as error:
            found["problems"].append(printable(str(error), 1000))


def _sampling(checkpoint: Checkpoint, path: Path) -> dict[str, Any]:
    """Return the recommended sampling by names of ``SamplingParams``, whose values make sense.

    Raises:
        ValueError: they don't.
    """
    try:
        recommended = recommended_sampling(checkpoint.files, path)
    except (AttributeError, RecursionError) as error:
        raise ValueError(
            "generation_config.json is no object of JSON: download it again"
        ) from error
    if recommended:
        recommended.apply(SamplingParams(sampling="checkpoint"))
    return dict(recommended.values)


def _files(path: Path, checkpoint: Checkpoint) -> dict[str, int]:
    """Return the number of weight files and of their bytes."""
    if path.is_dir():
        paths = Folder(path).weights
    else:
        paths = split_paths(path) if path.suffix == ".gguf" else [path]
    return {"count": len(paths), "bytes": sum(each.stat().st_size for each in paths)}


def _stored_sizes(checkpoint: Checkpoint) -> Counter[str]:
    """Return how many of the weights' numbers have which stored type."""
    sizes: Counter[str] = Counter()
    for part in checkpoint.parts:
        for name, shape in part.shapes.items():
            kind = checkpoint.kinds.get(name)
            form = form_of(checkpoint.forms, name)
            if kind and form:
                per_byte = 2 if form.name == "int4" else 1
                shape = (*shape, per_byte) if name.endswith(".weight") else (0,)
            dtypes = {str(t.dtype).removeprefix("torch.") for t in part.mapped(name)}
            sizes[kind or " + ".join(sorted(dtypes)) or "unknown"] += prod(shape)
    return sizes


def _shares(sizes: Counter[str]) -> dict[str, float]:
    total = sum(sizes.values())
    return {kind: round(n / total, 4) for kind, n in sizes.most_common()} if total else {}


def _quantisation(checkpoint: Checkpoint, dtypes: dict[str, float]) -> str | None:
    if checkpoint.forms and not checkpoint.kinds:
        return _form_names(checkpoint)
    kinds = {*checkpoint.kinds.values()} - {"F32", "F16", "BF16"}
    return ", ".join(kind for kind in dtypes if kind in kinds) or None


def _form_names(checkpoint: Checkpoint) -> str:
    sizes = {form: getattr(form, "group_size", 0) for form in checkpoint.forms.values()}
    names = (form.name + f", in groups of {n}" * bool(n) for form, n in sizes.items())
    return "; ".join(dict.fromkeys(names))


def _shape(args: ModelArgs, checkpoint: Checkpoint) -> dict[str, Any]:
    shape = {name: getattr(args, name) for name in _SHAPE} | {"n_kv_heads": args.kv_heads}
    trained = checkpoint.params.get("max_seq_len")
    return {
        **shape,
        "max_seq_len": trained if type(trained) is int else None,
        "rope_theta": args.rope_theta,
        "rope_scaling": args.rope_scaling and args.rope_scaling["rope_type"],
        "tie_word_embeddings": args.tie_word_embeddings,
        "labels": args.labels,
    }


def _tokenizer_kind(tokenizer: BaseTokenizer) -> str:
    """Return the name of the library or the format that a tokenizer comes from."""
    name = type(tokenizer).__name__
    return _TOKENIZERS.get(name, name.removesuffix("Tokenizer").lower())


def _tokenizer(tokenizer: BaseTokenizer) -> dict[str, Any]:
    def piece(i: int) -> str | None:
        return printable(tokenizer.token_piece(i)) if 0 <= i < tokenizer.n_words else None

    return {
        "kind": _tokenizer_kind(tokenizer),
        "pieces": tokenizer.n_words,
        "bos": piece(tokenizer.bos_id),
        "eos": piece(tokenizer.eos_id),
        "pad": piece(tokenizer.pad_id),
        "special": [printable(text) for text in list(tokenizer.control_ids)[:1000]],
        "ends": [piece(i) for i in sorted(tokenizer.stop_ids)],
    }


def _chat_format(tokenizer: BaseTokenizer, checkpoint: Checkpoint) -> dict[str, Any]:
    templates = chat_templates(checkpoint.files)
    chat = choose_chat(None, checkpoint.files, tokenizer)
    return {
        "name": chat.name if chat.name in FORMATS else "template",
        "templates": [printable(name) for name in templates],
    }


def _adapters(checkpoint: Checkpoint, args: ModelArgs) -> dict[str, Any]:
    """Return the adapters that fit: their kinds, and the modules that they can change."""
    hf_names = {meta: hf.rpartition(".")[2] for hf, meta in META_NAMES.items() if hf != "score"}
    modules = {}
    for name, shape in full_shapes(args).items():
        module = name.removeprefix("layers.0.").removesuffix(".weight")
        if len(shape) == 2 and module in hf_names and name.endswith(".weight"):
            modules[hf_names[module]] = {"in": shape[1], "out": shape[0], "max_rank": min(shape)}
    kinds = ["LORA", *PROMPT_KINDS] if args.n_outputs else ["LORA"]
    if args.labels is not None:  # a classifier takes no keys and values in front
        kinds = [kind for kind in kinds if kind != "PREFIX_TUNING"]
    is_mergeable = not any(map(is_made_here, checkpoint.forms.values()))
    return {"kinds": kinds, "mergeable": is_mergeable, "modules": modules}


def _memory(checkpoint: Checkpoint, args: ModelArgs) -> dict[str, Any]:
    """Return the bytes of weights and cache of each process, by the number of processes."""
    dtype = choose_dtype(checkpoint.dtype, "cuda", fast_bf16=True)  # as on today's GPUs
    processes = {}
    for n in range(1, min(args.n_heads, 128) + 1):
        with contextlib.suppress(ValueError):  # the network can't be divided so
            check_model_parallel_size(args, n, checkpoint.forms)
            processes[str(n)] = {
                "weights": weight_bytes(args, dtype, n, checkpoint.forms),
                "cache": cache_bytes(args, dtype, n),
            }
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "max_seq_len": args.max_seq_len,
        "max_batch_size": args.max_batch_size,
        "quantization": _form_names(checkpoint) or None,
        "processes": processes,
    }


def _oddities(
    path: Path, args: ModelArgs, tokenizer: BaseTokenizer, found: dict[str, Any]
) -> Iterator[str]:
    """Yield what loads but may surprise."""
    if tokenizer.n_words < args.vocab_size:
        yield (
            f"the embedding has {args.vocab_size:,} rows and the tokenizer {tokenizer.n_words:,} "
            "pieces: the other ids have no text"
        )
    if not tokenizer.stop_ids and args.labels is None:
        yield "no token ends an answer: give stop or max_gen_len"
    if tokenizer.bos_id < 0 and args.labels is None and not found["chat_format"]["templates"]:
        yield "no token begins a sequence"
    folder = Folder(path) if path.is_dir() else None
    if folder is not None and folder.ignored_weights:
        names = listed([printable(each.name) for each in folder.ignored_weights], 3)
        yield f"{names} beside {folder.weights[0].name} is not read"
    if len([kind for kind in found["dtypes"] if kind in _HALVES]) > 1:
        yield f"the weights have several half-precision types: {', '.join(found['dtypes'])}"


def describe_adapter(path: Path) -> dict[str, Any]:
    """Return the description of an adapter's directory by its configuration and its tensors."""
    folder = Folder(path)
    config = folder.json("adapter_config.json")
    files = [path / name for name in folder.match("adapter_model.safetensors", "adapter_model.bin")]
    names = tensor_names(files[0]) if files else {}

    def text(key: str) -> str | None:
        value = config.get(key)
        return (
            None if value is None else printable(value) if isinstance(value, str) else short(value)
        )

    targets = config.get("target_modules")
    targets = targets if isinstance(targets, list) else [targets] if targets else []
    return {
        "kind": text("peft_type"),
        "base": text("base_model_name_or_path"),
        "task": text("task_type"),
        "rank": _number(config.get("r")),
        "alpha": _number(config.get("lora_alpha")),
        "dora": bool(config.get("use_dora")),
        "virtual_tokens": _number(config.get("num_virtual_tokens")),
        "modules": [printable(str(target)) for target in targets[:1000]],
        "tensors": len(names),
        "bytes": files[0].stat().st_size if files else 0,
    }


def _adapter_problems(path: Path) -> Iterator[str]:
    """Yield why an adapter's files can't be used, as far as it shows without its base."""
    folder = Folder(path)
    files = folder.match("adapter_model.safetensors", "adapter_model.bin")
    if not folder.json("adapter_config.json"):
        yield f"{path / 'adapter_config.json'} is no object of JSON: download it again"
    if found := explain_adapter(path):
        yield printable(found, 1000)
    elif not files:
        yield f"{path} has no adapter_model.safetensors: download it"
    elif how_much := missing_bytes(path / files[0]):
        yield f"{path / files[0]} is damaged ({how_much}): download it again"


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) and abs(value) < 1 << 31 else None


def _describe_unread(found: dict[str, Any], folder: Folder) -> None:
    """Add what a directory that can't be opened still says of itself."""
    with contextlib.suppress(*ERRORS):
        config = folder.json("config.json") or folder.json("params.json")
        if isinstance(config.get("model_type"), str):
            found["family"] = printable(config["model_type"])
        shape = {
            meta: _number(config.get(hf, config.get(meta))) for hf, meta in _CONFIG_NUMBERS.items()
        }
        found["shape"] = shape if any(shape.values()) else None
        paths = folder.weights or folder.other_weights
        sizes: Counter[str] = Counter()
        names: dict[str, str] = {}
        for path in paths[:200]:
            names |= tensor_names(path)
            for entry in (safetensors_header(path) or {}).values():
                if isinstance(entry, dict) and isinstance(entry.get("shape"), list):
                    kind = printable(str(entry.get("dtype")), 20)
                    ints = [n for n in entry["shape"] if type(n) is int and 0 < n < 1 << 31]
                    sizes[_DTYPE_NAMES.get(kind, kind)] += prod(ints[:4])
        settings = config.get("quantization_config")
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        found["quantization"] = (
            printable(method) if isinstance(method, str) else quantisation(names)
        )
        found["dtypes"] = _shares(sizes) or None
        found["files"] = {"count": len(paths), "bytes": sum(p.stat().st_size for p in paths)}
        tokenizer = load_tokenizer(text_files(folder.path))
        found["tokenizer"] = {"kind": _tokenizer_kind(tokenizer), "pieces": tokenizer.n_words}
