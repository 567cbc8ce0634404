"""llama.cpp's GGUF files: hyper-parameters, weights of any usual quantisation, tokenizer."""

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint.base import Checkpoint, Weights
from llama.checkpoint.gguf_codes import codes_of, form_of_kind
from llama.checkpoint.gguf_file import PLAIN, SUPPORTED, Stored, mapped, open_file, read
from llama.checkpoint.sharding import form_of
from llama.errors import printable
from llama.layers.quantization import Form, StoredWeight
from llama.logits.recommended import gguf_sampling
from llama.tokenizers.gguf_tokenizer import tokenizer_files

logger = logging.getLogger(__name__)

# A file's name of a module, without its layer's ``blk.N.``, and Meta's.
META_NAMES = {
    "token_embd": "tok_embeddings",
    "output_norm": "norm",
    "output": "output",
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
    "attn_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
}
_LINEAR = tuple(name for name in META_NAMES.values() if not name.endswith("norm"))
_NAME = re.compile(r"(blk\.(?:0|[1-9][0-9]*)\.|)(\w+)\.(weight|bias)")
# The modules that have biases together, by the parameter that says so.
_BIASED = {
    "attention_bias": ("attention.wq", "attention.wk", "attention.wv", "attention.wo"),
    "mlp_bias": ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
}
_DERIVED = (".attn_rot_embd.weight", "rope_freqs.weight")  # the second is read as rope_scaling

# Hyper-parameters by their keys in a file, without the architecture's name.
_KEYS = {
    "embedding_length": "dim",
    "block_count": "n_layers",
    "attention.head_count": "n_heads",
    "feed_forward_length": "hidden_dim",
    "attention.layer_norm_rms_epsilon": "norm_eps",
}
_OPTIONAL_KEYS = {
    "attention.head_count_kv": "n_kv_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
# Keys that describe other networks, and the values with which they don't.
_UNSUPPORTED_KEYS = {
    "expert_count": (0,),
    "attention.scale": (0,),
    "attention.sliding_window": (0,),
    "attention.causal": (True,),
    "pooling_type": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "rope.scaling.yarn_ext_factor": (1, -1),  # -1 stands for 1
}


def open_gguf(path: Path) -> Checkpoint:
    """Map a GGUF file, or all parts of one that is split.

    Quantised weights keep their codes, which come into their form when they are read. A warning
    tells of those of types that aren't made of affine groups: they are widened to float32.

    Raises:
        FileNotFoundError: the file or one of its parts is missing.
        ImportError: the package ``gguf`` isn't installed.
        MemoryError: no address space is left to map it.
        ValueError: it is no GGUF file, damaged, or of an unknown network or quantisation.
    """
    paths = split_paths(path)
    metadata, stored = open_file(paths[0])
    if metadata.get("split.count", 0) not in (0, len(paths)):
        raise ValueError(
            f"{path} is one of {_short(metadata['split.count'])} parts, which its name doesn't "
            "say: expected names as model-00001-of-00002.gguf"
        )
    for other in paths[1:]:
        stored |= open_file(other)[1]
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"{paths[0]} holds the architecture {_short(architecture)}: known is 'llama' only"
        )
    tensors = _renamed(stored, str(paths[0]))
    params = _params(metadata, stored, str(paths[0]))
    biased = {key: _missing_biases(tensors, modules) for key, modules in _BIASED.items()}
    params |= {key: True for key, missing in biased.items() if missing is not None}
    zeros = {name: shape for missing in biased.values() for name, shape in (missing or {}).items()}
    reader = _Reader(tensors, zeros)
    weights = Weights(reader.shapes, reader.read, reader.mapped)
    reader.places = weights.places
    text = tokenizer_files(metadata, str(paths[0]))
    if sampling := gguf_sampling(metadata):
        ends = json.loads(text.get("generation_config.json", b"{}"))
        text["generation_config.json"] = json.dumps({**ends, **sampling}).encode()
    files: dict[str, Path | bytes] = dict(text)
    names = [str(paths[0])]
    is_widened = _warn_of_widened(tensors, reader.forms, names[0])
    dtype = _main_dtype(tensors)
    kinds = {name: reader.stored_as(name).kind for name in reader.shapes if name not in zeros}
    return Checkpoint(
        names[0], params, [weights], names, dtype, files, is_widened, kinds, reader.forms
    )


class _Reader:
    """The tensors of a checkpoint by Meta's names, made when they are read.

    Args:
        tensors: what is stored, by Meta's names of plain tensors.
        zeros: the shapes of those that aren't stored and count as zeros.
    """

    def __init__(self, tensors: Mapping[str, Stored], zeros: Mapping[str, tuple[int, ...]]):
        self._tensors, self._zeros = tensors, zeros
        matrices = {
            name.removesuffix(".weight"): form_of_kind(tensor.kind)
            for name, tensor in tensors.items()
            if len(tensor.shape) == 2
        }
        self.forms = {n: form for n, form in matrices.items() if form and n.endswith(_LINEAR)}
        self.shapes = dict(zeros)
        for name, tensor in tensors.items():
            form = form_of(self.forms, name)
            if form is None:
                self.shapes[name] = tensor.shape
            else:
                module = name.removesuffix("weight")
                parts = form.shapes(tensor.shape[0], tensor.shape[1])
                self.shapes |= {f"{module}{part}": shape for part, shape in parts.items()}
        # The parts of a weight are read one after another: it is decoded once for all, and none is
        # kept that was read.
        self._module = ""
        self._parts: StoredWeight = {}
        self.places: Mapping[str, torch.Tensor] = {}  # as of ``Weights``

    def stored_as(self, name: str) -> Stored:
        """Return the tensor of which a parameter is a part."""
        module = name.rpartition(".")[0]
        return self._tensors[f"{module}.weight" if form_of(self.forms, name) else name]

    def read(self, name: str) -> torch.Tensor:
        if name in self._zeros:
            return torch.zeros(self._zeros[name])
        tensor = self.stored_as(name)
        if not form_of(self.forms, name):
            return read(tensor)
        module, _, part = name.rpartition(".")
        if module != self._module or part not in self._parts:
            self._module = module
            places = {
                part: self.places[key]
                for part in self.forms[module].dtypes()
                if (key := f"{module}.{part}") in self.places
            }
            self._parts = codes_of(tensor.kind, tensor.raw, tensor.shape, places)
        return self._parts.pop(part)

    def mapped(self, name: str) -> Sequence[torch.Tensor]:
        return () if name in self._zeros else (mapped(self.stored_as(name)),)


def _warn_of_widened(tensors: Mapping[str, Stored], forms: Mapping[str, Form], source: str) -> bool:
    """Return whether there are weights of types that no form stores; say what memory they take."""
    widened = [t for name, t in tensors.items() if not form_of(forms, name) and t.kind not in PLAIN]
    if widened:
        logger.warning(
            "%s has %d weights of the types %s, which aren't made of affine groups: they are "
            "widened from %.2f GB to %.2f GB in half precision, or rounded by quantize='int4'",
            *(source, len(widened), ", ".join(sorted({tensor.kind for tensor in widened}))),
            sum(tensor.raw.nbytes for tensor in widened) / 1e9,
            sum(2 * prod(tensor.shape) for tensor in widened) / 1e9,
        )
    return bool(widened)


def split_paths(path: Path) -> list[Path]:
    """Return the paths of all parts of a file, by its name."""
    match = re.fullmatch(r"(.+)-[0-9]{5}-of-([0-9]{5})\.gguf", path.name)
    count = int(match[2]) if match else 1
    paths = [path]
    if match and count > 1:
        names = (f"{match[1]}-{i + 1:05d}-of-{match[2]}.gguf" for i in range(count))
        paths = [path.with_name(name) for name in names]
    for part in paths:
        if not part.is_file():
            context = f" next to {path}, one of its {count} parts" if part != path else ""
            raise FileNotFoundError(f"no GGUF file {part}{context}: check the path or download it")
    return paths


def _renamed(stored: Mapping[str, Stored], source: str) -> dict[str, Stored]:
    """Return the network's tensors under Meta's names, and unknown ones under their own."""
    tensors = {}
    for name, tensor in stored.items():
        if tensor.kind not in SUPPORTED:
            raise ValueError(
                f"{source} has {printable(name)} in the type {tensor.kind}: known are "
                f"{', '.join(SUPPORTED)}; use a file of another quantisation"
            )
        match = _NAME.fullmatch(name)
        if match and match[2] in META_NAMES:
            layer = match[1].replace("blk", "layers")
            tensors[f"{layer}{META_NAMES[match[2]]}.{match[3]}"] = tensor
        elif not name.endswith(_DERIVED):
            tensors[name] = tensor
    return tensors


def _missing_biases(
    tensors: Mapping[str, Stored], modules: Sequence[str]
) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes of biases that aren't stored although others of these modules' are.

    They count as zeros. None if no bias is stored.
    """
    if not any(name.endswith(tuple(f".{module}.bias" for module in modules)) for name in tensors):
        return None
    weights = [n for n in tensors if n.endswith(tuple(f".{module}.weight" for module in modules))]
    shapes = {n.removesuffix("weight") + "bias": tensors[n].shape[:1] for n in weights}
    return {name: shape for name, shape in shapes.items() if name not in tensors}


def _params(
    metadata: Mapping[str, Any], stored: Mapping[str, Stored], source: str
) -> dict[str, Any]:
    """Return the hyper-parameters with the keys of ``ModelArgs``."""
    values = {key[6:]: value for key, value in metadata.items() if key.startswith("llama.")}
    for key, harmless in _UNSUPPORTED_KEYS.items():
        if values.get(key, harmless[0]) not in harmless:
            raise ValueError(
                f"{source} has llama.{key} = {_short(values[key])}: no such network is known"
            )
    missing = [f"llama.{key}" for key in _KEYS if key not in values]
    if missing:
        raise ValueError(f"{source} lacks {', '.join(missing)}: convert the model again")
    names = {**_KEYS, **_OPTIONAL_KEYS}
    params = {name: values[key] for key, name in names.items() if key in values}
    dim, n_heads = params["dim"], params["n_heads"]
    if type(dim) is int and type(n_heads) is int and n_heads > 0:
        head_dim = params.get("head_dim", dim // n_heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if values.get(key, head_dim) != head_dim:
                raise ValueError(
                    f"{source} has llama.{key} = {_short(values[key])}: expected the size of all "
                    f"of a head, {_short(head_dim)}"
                )
    scaling = _rope_scaling(values, stored, source)
    if scaling is not None:
        params["rope_scaling"] = scaling
    if "context_length" in values:
        params["max_seq_len"] = values["context_length"]
    if "token_embd.weight" in stored:
        params["vocab_size"] = stored["token_embd.weight"].shape[0]
    params["tie_word_embeddings"] = "output.weight" not in stored
    return params


def _rope_scaling(
    values: Mapping[str, Any], stored: Mapping[str, Stored], source: str
) -> dict[str, Any] | None:
    """Return ``rope_scaling`` as ``ModelArgs`` has it; None if frequencies aren't scaled."""
    kind = values.get("rope.scaling.type", "linear")
    table = stored.get("rope_freqs.weight")
    if kind not in ("none", "linear", "yarn") or (kind == "yarn" and table is not None):
        more = " beside rope_freqs.weight" if kind == "yarn" else ""
        raise ValueError(
            f"{source} has llama.rope.scaling.type = {_short(kind)}{more}: known are none, linear, "
            "yarn and rope_freqs.weight"
        )
    factor = values.get("rope.scaling.factor", values.get("rope.scale_linear")) or 1.0
    factor = 1.0 if kind == "none" else factor
    if type(factor) not in (int, float):
        raise ValueError(f"{source} has a scaling factor of {_short(factor)}: expected a number")
    if kind == "yarn":
        return _yarn(values, factor, source)
    if table is not None:
        factors = (read(table).flatten().double() * factor).tolist()
        return {"rope_type": "factors", "factors": factors}
    return None if factor == 1 else {"rope_type": "linear", "factor": factor}


def _yarn(values: Mapping[str, Any], factor: float, source: str) -> dict[str, Any]:
    """Return ``rope_scaling`` of the kind yarn.

    llama.cpp's converter keeps the model's own numbers, of which llama.cpp ignores most;
    transformers computes with them.
    """
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    names = {
        "original_context_length": "original_max_position_embeddings",
        "yarn_attn_factor": "attention_factor",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
    }
    for key, name in names.items():
        if f"rope.scaling.{key}" in values:
            scaling[name] = values[f"rope.scaling.{key}"]
    if "context_length" in values:
        scaling.setdefault("original_max_position_embeddings", values["context_length"])
    growth = values.get("rope.scaling.attn_factor", 1)
    usual = scaling.get("attention_factor", 0.1 * math.log(max(1, factor)) + 1)
    for number in (growth, usual):
        if type(number) not in (int, float):
            raise ValueError(f"{source} has an attn_factor of {_short(number)}: expected a number")
    if growth != 1:
        scaling["attention_factor"] = growth * usual
    return scaling


def _main_dtype(tensors: Mapping[str, Stored]) -> torch.dtype:
    """Return the dtype of most weights, counting quantised ones as float16."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        dtype = PLAIN.get(tensor.kind, torch.float16)
        sizes[dtype] = sizes.get(dtype, 0) + prod(tensor.shape)
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def _short(value: object) -> str:
    return printable(repr(value))
