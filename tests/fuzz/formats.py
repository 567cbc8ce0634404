"""The formats that are damaged: their sound checkpoints and their mutators."""

import random
from collections.abc import Callable
from pathlib import Path

import mutations
from adapter_mutations import adapter_bases, adapter_patterns
from gguf_mutations import gguf_bases, gguf_bytes, gguf_numbers, gguf_tensors, gguf_values
from hf_mutations import (
    config_values,
    hf_bases,
    index_values,
    json_texts,
    json_values,
    renamed,
    safetensors_header,
    special_files,
    templates,
    tokenizer_json,
)
from llama3_mutations import cuts, llama3_bases, pieces, settings
from mutations import (
    Files,
    any_bytes,
    file_names,
    malicious,
    odd_values,
    pickle_bombs,
    pickle_bytes,
    pickle_calls,
    tensor_names,
    tensor_values,
    zip_headers,
)

Mutator = Callable[[random.Random, Files, Path], str]

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
    "llama3": (
        *(pieces, pieces, settings, settings, settings, cuts, cuts, any_bytes, special_files),
        *(file_names, odd_values, mutations.odd_text, tensor_names, tensor_values, zip_headers),
        *(pickle_bytes, malicious),
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
    makers: dict[str, Callable[[], dict[str, Files]]] = {
        "meta": mutations.make_bases,
        "llama3": llama3_bases,
        "hf": hf_bases,
        "gguf": lambda: gguf_bases(folder),
        "adapter": adapter_bases,
    }
    return makers[kind]()


def make(
    kind: str, seed: int, number: int, bases: dict[str, Files], marker: Path
) -> tuple[str, Files]:
    """The mutation of a seed and a number.

    Args:
        kind: one of ``FORMATS``.
        bases: its sound checkpoints (``make_bases``).
        marker: a file that appears if code of the checkpoint is executed.

    Returns:
        What was done, and the files.
    """
    if kind == "meta":
        return mutations.make(seed, number, bases, marker)
    rng = random.Random(f"{kind} {seed} {number}")
    base = rng.choice(sorted(bases))
    files = dict(bases[base])
    mutators = MUTATORS[kind]
    what = mutators[number % len(mutators)](rng, files, marker)
    return f"{base}: {what}".encode("ascii", "replace").decode(), files
