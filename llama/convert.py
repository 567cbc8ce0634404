"""A checkpoint of any format, written in Meta's or Hugging Face's: ``python -m llama.convert``."""

import sys
from dataclasses import replace
from pathlib import Path

from llama.checkpoint import apply_adapter, open_checkpoint
from llama.checkpoint.base import Weights, quantized, vocabulary_size
from llama.checkpoint.params import make_args
from llama.checkpoint.save import save
from llama.checkpoint.sharding import check_model_parallel_size, quantized_count, stored_bytes
from llama.cli import dtype_of, progress, run
from llama.layers.quantization import make_scheme


def convert(
    in_path: str,
    out_dir: str,
    to: str = "meta",
    model_parallel_size: int = 1,
    dtype: str | None = None,
    adapter: str | tuple[str, ...] = (),
    quantize: str | None = None,
    group_size: int | None = None,
) -> None:
    """Write a checkpoint in another format, with all that belongs to its tokenizer.

    Args:
        in_path: a directory in Meta's or Hugging Face's layout, a GGUF file or one of llama2.c.
        out_dir: where to write; must not exist.
        to: meta or hf.
        model_parallel_size: how many consolidated.*.pth files to write (meta only).
        dtype: float32, bfloat16 or float16; by default every tensor stays as it is stored, and
            quantised ones become float16, and merged ones what the base is.
        adapter: a LoRA adapter to merge in, or several separated by commas.
        quantize: int8 or int4, for weights of 8 or about 4.5 bits (meta only).
        group_size: how many weights share a scale in int4: 32, 64 (by default), 128 or 256.

    Raises:
        FileExistsError: ``out_dir`` is there already.
        ValueError: an argument is wrong, or as in ``llama.checkpoint.open_checkpoint``.
    """
    if to not in ("meta", "hf"):
        raise ValueError(f"to is {to!r}: expected 'meta' or 'hf'")
    torch_dtype = dtype_of(dtype)
    if to == "hf" and model_parallel_size != 1:
        raise ValueError("model_parallel_size is for Meta's layout: leave it out with --to hf")
    if to == "hf" and quantize is not None:
        raise ValueError("quantize is for Meta's layout: leave it out with --to hf")
    if quantize is None and group_size is not None:
        raise ValueError("group_size is for --quantize int4: say so, or leave it out")
    target = Path(str(out_dir))
    source = open_checkpoint(Path(str(in_path)))
    for directory in [adapter] if isinstance(adapter, str) else adapter:
        source = apply_adapter(source, Path(directory))
    args = make_args(source.params, source.source, n_words=vocabulary_size(source))
    kept = source.dtype if source.in_float32 else None
    wanted = torch_dtype or kept
    if quantize is not None:
        scheme = make_scheme(quantize, group_size, source.scheme)
        check_model_parallel_size(args, model_parallel_size, scheme)
        count = quantized_count(args, scheme)
        with progress(count, "quantising", "weights") as show:
            source = quantized(source, args, scheme, show)
            # All of it now, so that no file rounds a weight again.
            source = replace(source, parts=[Weights.of(dict(source.parts[0]))])
    with progress(stored_bytes(args, wanted or source.dtype, source.scheme), "writing") as show:
        if to == "meta":
            save(
                source.parts,
                args,
                target,
                model_parallel_size,
                source.files,
                wanted,
                show,
                source.scheme,
            )
        else:
            if source.scheme is not None:
                raise ValueError(f"{in_path} is quantised: convert the original weights to hf")
            from llama.checkpoint.save_hf import save_hf

            save_hf(source, args, target, wanted, show)
    print(f"wrote {target}", file=sys.stderr)


if __name__ == "__main__":
    run(convert, "llama.convert")
