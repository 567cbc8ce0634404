"""``config.json`` of Hugging Face's directories, with the keys of ``params.json``."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from llama.checkpoint.params import ROPE_KEYS
from llama.errors import LARGEST, listed, short

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Those of weights that aren't quantised."""

EXPECTED_TYPES = "'llama', or 'mistral' without a sliding window"
"""The model types that are read, for errors."""

# transformers' defaults of keys that a configuration may leave out, by its model_type.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    # Without sliding windows it is a Llama.
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
}
_TRAINED = "original_max_position_embeddings"
_SCALES = ("mscale", "mscale_all_dim")
_ARCHITECTURES = ("Llama", "LLaMA", "Mistral")
_TASKS = ("ForCausalLM", "ForSequenceClassification", "Model")


def hf_params(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the hyper-parameters of ``config.json`` as ``ModelArgs`` names them.

    Raises:
        ValueError: it describes another network, or lacks a key.
    """
    config = {**_check_supported(config, source), **config}
    names = {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "vocab_size": "vocab_size",
        "intermediate_size": "hidden_dim",
    }
    missing = [name for name in names if name not in config]
    if missing:
        raise ValueError(f"{source} lacks {', '.join(missing)}")
    params = {meta: config[hf] for hf, meta in names.items()}
    params["norm_eps"] = config.get("rms_norm_eps", 1e-6)  # LlamaConfig's default
    if config.get("num_key_value_heads") is not None:
        params["n_kv_heads"] = config["num_key_value_heads"]
    if config.get("head_dim") is not None:
        params["head_dim"] = config["head_dim"]
    if type(config["max_position_embeddings"]) is int:
        params["max_seq_len"] = config["max_position_embeddings"]
    params |= _rope_params(config, source)
    tied = config.get("tie_word_embeddings")
    params["tie_word_embeddings"] = False if tied is None else tied
    if type(params["tie_word_embeddings"]) is not bool:  # it is used before make_args checks all
        raise ValueError(
            f"tie_word_embeddings is {short(tied)} in {source}: expected true or false"
        )
    if config["model_type"] == "llama":  # Mistral's network has none, whatever its file says
        for name in ("attention_bias", "mlp_bias"):
            params[name] = False if config.get(name) is None else config[name]
    for name in ("dim", "n_heads", "head_dim"):  # they are used before make_args checks all
        value = params.get(name, 1)
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is {short(value)} in {source}: expected 1 or more")
    return params


def _check_supported(config: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """Return the defaults of a ``config.json``'s model_type.

    Raises:
        ValueError: it describes another network than Llama's.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _DEFAULTS:
        raise ValueError(
            f"{source} is of model_type {short(model_type)}: expected {EXPECTED_TYPES}"
        )
    defaults = _DEFAULTS[model_type]
    window = config.get("sliding_window", defaults.get("sliding_window"))
    if model_type == "mistral" and window is not None:
        raise ValueError(
            f"{source} has a sliding_window of {short(window)}: this network's attention reads all "
            "of a text, as with a sliding_window of null"
        )
    if config.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
        act = short(config["hidden_act"])
        raise ValueError(f"{source} has the hidden_act {act}: expected 'silu'")
    return defaults


def _rope_params(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return ``rope_theta`` and, where frequencies are scaled, ``rope_scaling``."""
    # transformers 5 has in rope_parameters what older versions had in two places.
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{source} has rope_scaling {short(rope)}: expected an object")
    theta = rope.get("rope_theta") or config.get("rope_theta")
    params: dict[str, Any] = {"rope_theta": 10000.0 if theta is None else theta}
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(
            f"{source} rotates a part of each head (partial_rotary_factor) only: this network "
            "rotates all of it"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        _warn_of_unknown(rope, (), "default", source)
    else:
        params["rope_scaling"] = _rope_scaling(kind, rope, config, source)
    return params


def _warn_of_unknown(rope: Mapping[str, Any], known: Iterable[str], kind: str, source: str) -> None:
    # Some have the last one with every kind.
    others = {"type", "rope_type", "rope_theta", "partial_rotary_factor", _TRAINED}
    unknown = sorted(set(rope) - {*known} - others)
    if unknown:
        names = listed([short(name) for name in unknown])
        logger.warning("%s has %s in its %s rotary scaling: ignored", source, names, kind)


def _rope_scaling(
    kind: object, rope: Mapping[str, Any], config: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """Return ``rope_scaling`` as ``ModelArgs`` has it: all that counts, with its defaults."""
    if not isinstance(kind, str) or kind not in ROPE_KEYS or kind == "factors":
        return {"rope_type": kind}  # make_args names the known kinds
    needed, optional = ROPE_KEYS[kind]
    _warn_of_unknown(rope, (*needed, *optional), kind, source)
    scaling = {key: rope[key] for key in (*needed, *optional) if rope.get(key) is not None}
    if any(type(n := scaling.get(k)) in (int, float) and n == 0 for k in _SCALES):
        for name in _SCALES:  # as in transformers both count or none
            scaling.pop(name, None)
    length = config["max_position_embeddings"]
    if _TRAINED in needed:
        outer = config.get(_TRAINED)  # which transformers prefers
        own = scaling.get(_TRAINED, length) if outer is None else outer
        own = scaling[_TRAINED] = length if kind == "dynamic" else own
        known = all(type(n) in (int, float) and 0 < n <= LARGEST for n in (own, length))
        if kind in ("yarn", "longrope") and "factor" not in scaling and known:
            scaling["factor"] = length / own
    return {"rope_type": kind, **{key: scaling.get(key) for key in needed}, **scaling}


def hf_task(config: Mapping[str, Any], source: str) -> str:
    """Return the end of the architecture's name: what the network is for.

    Returns:
        "ForCausalLM", "ForSequenceClassification", or "Model" for a network that may lack a head.
    """
    architectures = config.get("architectures") or ["LlamaForCausalLM"]
    first = architectures[0] if isinstance(architectures, list) else None
    for family in _ARCHITECTURES:
        for task in _TASKS:
            if first == f"{family}{task}":
                return task
    raise ValueError(
        f"{source} is of architecture {short(architectures)}: expected LlamaForCausalLM, "
        "LlamaForSequenceClassification or LlamaModel, or Mistral's"
    )


def hf_labels(config: Mapping[str, Any], n_labels: int) -> list[str]:
    """Return a classifier's classes in the order of the logits."""
    id2label = config.get("id2label")
    names = id2label if isinstance(id2label, dict) else {}
    return [str(names.get(str(i), f"LABEL_{i}")) for i in range(n_labels)]


def hf_dtype(config: Mapping[str, Any], source: str) -> torch.dtype | None:
    """Return the dtype that ``config.json`` gives the weights; None if it doesn't say.

    A warning tells that it names none that weights have here.
    """
    name = config.get("dtype", config.get("torch_dtype"))
    known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    if name is None or name == "auto":
        return None
    dtype = known.get(name.removeprefix("torch.")) if isinstance(name, str) else None
    if dtype is None:
        logger.warning(
            "dtype is %s in %s, which is none of %s: the weights' own is used",
            *(short(name), source, ", ".join(known)),
        )
    return dtype
