"""``params.json``: a checkpoint's hyper-parameters, read and checked."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama.args import ModelArgs
from llama.errors import LARGEST, listed, short


def read_params(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is malformed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: a checkpoint needs its hyper-parameters")
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(params, dict):
        raise ValueError(f"{path} holds a {type(params).__name__}, not an object of parameters")
    return params


def make_args(
    params: Mapping[str, Any],
    source: str,
    n_words: int,
    max_seq_len: int = 512,
    max_batch_size: int = 8,
) -> ModelArgs:
    """Return the hyper-parameters of a checkpoint, with the size of the cache.

    Args:
        params: as in ``params.json``.
        source: where they come from, for errors.
        n_words: the rows of the embedding, which a ``vocab_size`` of -1 stands for.

    Raises:
        ValueError: a key or a value is unknown.
    """
    for name, size in (("max_seq_len", max_seq_len), ("max_batch_size", max_batch_size)):
        if type(size) is not int or size < 1:
            raise ValueError(f"{name} is {size!r}: expected a whole number above 0")
    known = [field.name for field in dataclasses.fields(ModelArgs)]
    unknown = sorted(set(params) - set(known))
    if unknown:
        raise ValueError(
            f"{source} has the unknown key{'s' * (len(unknown) > 1)} "
            f"{listed([short(key) for key in unknown])}: known are {', '.join(known)}"
        )
    _check_numbers(params, source)
    args = ModelArgs(**{**params, "max_seq_len": max_seq_len, "max_batch_size": max_batch_size})
    _check(args, source)
    if args.vocab_size == -1:
        args.vocab_size = n_words
    return args


# Keys with a value that stands for another one.
_DERIVED = {
    "n_kv_heads": None,
    "ffn_dim_multiplier": None,
    "vocab_size": -1,
    "head_dim": -1,
    "hidden_dim": -1,
}


def _check_numbers(params: Mapping[str, Any], source: str) -> None:
    for name, value in params.items():
        default = getattr(ModelArgs, name)
        if name in _DERIVED and value == _DERIVED[name] and type(value) is type(_DERIVED[name]):
            continue
        if type(default) is bool:
            if type(value) is not bool:
                raise ValueError(f"{name} is {short(value)} in {source}: expected true or false")
        elif type(default) is int or name == "n_kv_heads":
            if type(value) is not int or not 1 <= value <= LARGEST:
                raise ValueError(
                    f"{name} is {short(value)} in {source}: expected a whole number above 0"
                )
        elif name in ("norm_eps", "rope_theta", "ffn_dim_multiplier"):
            _check_positive(name, value, source)


def _check_positive(name: str, value: object, source: str) -> None:
    # Far below 1e-30 quotients of two such numbers overflow.
    if type(value) not in (int, float) or not 1e-30 <= value <= LARGEST:  # type: ignore[operator]
        raise ValueError(f"{name} is {short(value)} in {source}: expected a number above 0")


def _check(args: ModelArgs, source: str) -> None:
    if args.head_dim % 2 or (args.head_dim == args.dim // args.n_heads and args.dim % args.n_heads):
        raise ValueError(
            f"dim {args.dim} and n_heads {args.n_heads} in {source} don't give heads of an even "
            "size"
        )
    if args.n_heads % args.kv_heads:
        raise ValueError(
            f"n_heads {args.n_heads} is no multiple of n_kv_heads {args.kv_heads} in {source}"
        )
    if args.labels is not None and not (
        isinstance(args.labels, list) and all(isinstance(label, str) for label in args.labels)
    ):
        raise ValueError(f"labels is {short(args.labels)} in {source}: expected a list of names")
    if args.labels is not None and args.tie_word_embeddings:
        raise ValueError(f"{source} has labels and tie_word_embeddings: a classifier isn't tied")
    if args.rope_scaling is not None:
        _check_rope_scaling(args.rope_scaling, args, source)


# The kinds of rope_scaling, the parameters that they need and those that they may have.
ROPE_KEYS = {
    "linear": (("factor",), ()),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        (),
    ),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "dynamic": (("factor", "original_max_position_embeddings"), ()),
    "longrope": (
        ("factor", "short_factor", "long_factor", "original_max_position_embeddings"),
        ("attention_factor",),
    ),
    "factors": (("factors",), ("attention_factor",)),
}


def _check_rope_scaling(scaling: object, args: ModelArgs, source: str) -> None:
    kind = scaling.get("rope_type") if isinstance(scaling, dict) else None
    if not isinstance(scaling, dict) or not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise ValueError(
            f"rope_scaling is {short(scaling if kind is None else kind)} in {source}: known kinds "
            f"are {', '.join(ROPE_KEYS)}"
        )
    needed, optional = ROPE_KEYS[kind]
    if not {"rope_type", *needed} <= set(scaling) <= {"rope_type", *needed, *optional}:
        more = f", and may have {', '.join(optional)}" if optional else ""
        raise ValueError(
            f"rope_scaling of the kind {kind} in {source} needs exactly {', '.join(needed)}{more}; "
            f"found {short(sorted(map(str, scaling)))}"
        )
    for name, value in scaling.items():
        if name in ("factors", "short_factor", "long_factor"):
            _check_factors(name, value, args.head_dim, source)
        elif name == "truncate":
            if type(value) is not bool:
                raise ValueError(f"truncate is {short(value)} in {source}: expected true or false")
        elif name != "rope_type":
            _check_positive(f"rope_scaling's {name}", value, source)
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ValueError(
            f"rope_scaling in {source} has a high_freq_factor that isn't above its low_freq_factor"
        )
    if kind == "yarn" and scaling.get("beta_fast", 32) < scaling.get("beta_slow", 1):
        raise ValueError(f"rope_scaling in {source} has a beta_fast below its beta_slow")
    # Of these logarithms are divided by.
    base = {"yarn": "rope_theta", "longrope": "original_max_position_embeddings"}.get(kind)
    number = args.rope_theta if base == "rope_theta" else scaling.get(str(base), 2)
    if number <= 1:
        raise ValueError(f"{base} is {number} in {source}: {kind} needs a number above 1")


def _check_factors(name: str, factors: object, head_dim: int, source: str) -> None:
    if not isinstance(factors, list) or len(factors) != head_dim // 2:
        raise ValueError(
            f"rope_scaling's {name} in {source} are {short(factors)}: expected {head_dim // 2} "
            "numbers"
        )
    for factor in factors:
        _check_positive("a factor of rope_scaling", factor, source)
