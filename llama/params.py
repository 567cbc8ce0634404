"""``params.json``: a checkpoint's hyper-parameters, and whether they can be."""

import dataclasses
import json
from pathlib import Path

from llama.model import ModelArgs

# Far above any model, far below what would overflow in an intermediate result.
_LARGEST = 2**31 - 1


def read_args(
    ckpt_dir: Path, n_words: int, max_seq_len: int = 512, max_batch_size: int = 8
) -> ModelArgs:
    """The hyper-parameters in ``params.json``, with the size of the cache.

    Args:
        n_words: the tokenizer's vocabulary, which a ``vocab_size`` of -1 stands for.

    Raises:
        FileNotFoundError: there is no ``params.json``.
        ValueError: it is malformed, or holds a key or value that nobody knows.
    """
    for name, size in (("max_seq_len", max_seq_len), ("max_batch_size", max_batch_size)):
        if type(size) is not int or size < 1:
            raise ValueError(f"{name} is {size!r}: expected a whole number above 0")
    path = ckpt_dir / "params.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: a checkpoint needs its hyper-parameters")
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(params, dict):
        raise ValueError(f"{path} holds a {type(params).__name__}, not an object of parameters")
    known = [field.name for field in dataclasses.fields(ModelArgs)]
    unknown = sorted(set(params) - set(known))
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise ValueError(
            f"{path} has the unknown key{'s' * (len(unknown) > 1)} "
            f"{', '.join(map(_short, unknown[:5]))}{more}: known are {', '.join(known)}"
        )
    args = ModelArgs(**{**params, "max_seq_len": max_seq_len, "max_batch_size": max_batch_size})
    _check(args, path)
    if args.vocab_size == -1:
        args.vocab_size = n_words
    if n_words > args.vocab_size:
        raise ValueError(
            f"the tokenizer has {n_words} pieces, but {path} gives the model a vocabulary of "
            f"{args.vocab_size}: this is another model's tokenizer"
        )
    return args


def _check(args: ModelArgs, path: Path) -> None:
    for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of"):
        value = getattr(args, name)
        if (name, value) in (("n_kv_heads", None), ("vocab_size", -1)):
            continue
        if type(value) is not int or not 1 <= value <= _LARGEST:
            raise ValueError(
                f"{name} is {_short(value)} in {path}: expected a whole number above 0"
            )
    for name in ("norm_eps", "rope_theta", "ffn_dim_multiplier"):
        value = getattr(args, name)
        if name == "ffn_dim_multiplier" and value is None:
            continue
        if type(value) not in (int, float) or not 0 < value <= _LARGEST:
            raise ValueError(f"{name} is {_short(value)} in {path}: expected a number above 0")
    if args.dim % args.n_heads or args.head_dim % 2:
        raise ValueError(
            f"dim {args.dim} and n_heads {args.n_heads} in {path} don't give heads of an even size"
        )
    if args.n_heads % args.kv_heads:
        raise ValueError(
            f"n_heads {args.n_heads} is no multiple of n_kv_heads {args.kv_heads} in {path}"
        )


def _short(value: object) -> str:
    if isinstance(value, int) and abs(value) > _LARGEST:
        return "larger than any model's"  # Python refuses to print very large ones
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
