"""Convert a checkpoint of any format to Meta's or Hugging Face's: ``python -m llama.convert``."""

import sys
from dataclasses import replace
from pathlib import Path

from llama.args import ModelArgs
from llama.checkpoint import apply_adapter, open_checkpoint
from llama.checkpoint.base import (
    Checkpoint,
    Weights,
    chosen_scheme,
    quantized,
    vocabulary_size,
    widened,
)
from llama.checkpoint.calibration import calibrated
from llama.checkpoint.params import make_args
from llama.checkpoint.pretrained import fit_tokenizer
from llama.checkpoint.save import save_meta
from llama.checkpoint.sharding import check_model_parallel_size, quantized_count, stored_bytes
from llama.cli import dtype_of, progress, run
from llama.tokenizers import load_tokenizer


def convert(
    in_path: str,
    out_dir: str,
    to: str = "meta",
    model_parallel_size: int = 1,
    dtype: str | None = None,
    adapter: str | tuple[str, ...] = (),
    quantize: str | None = None,
    group_size: int | None = None,
    calibrate: str | None = None,
) -> None:
    """Write a checkpoint in another format, with the files of its tokenizer.

    Args:
        in_path: a directory in Meta's or Hugging Face's layout, a GGUF file or one of llama2.c.
        out_dir: the directory to write; must not exist.
        to: meta or hf.
        model_parallel_size: the number of consolidated.*.pth files to write (meta only).
        dtype: float32, bfloat16 or float16; by default every tensor keeps its dtype, or the codes
            that its file has; widened ones become float16, and merged ones get the base's dtype.
        adapter: a LoRA adapter to merge in, or several separated by commas.
        quantize: int8 or int4, for weights of 8 or about 4.8 bits (meta only).
        group_size: weights that share a scale in int4: 32, 64, 128 or 256; by default 64, and
            more bits for the weights that need them most.
        calibrate: a UTF-8 text like those that the network will read: int4 weights are rounded so
            that its outputs for it change little. This takes minutes for a billion weights.

    Raises:
        FileExistsError: ``out_dir`` already exists.
        ValueError: an argument is wrong, or the checkpoint is, as for ``open_checkpoint``.
    """
    if to not in ("meta", "hf"):
        raise ValueError(f"to is {to!r}: expected 'meta' or 'hf'")
    torch_dtype = dtype_of(dtype)
    if to == "hf" and model_parallel_size != 1:
        raise ValueError("model_parallel_size is for Meta's layout: leave it out with --to hf")
    if to == "hf" and quantize is not None:
        raise ValueError("quantize is for Meta's layout: leave it out with --to hf")
    if quantize is None and group_size is not None:
        raise ValueError("group_size is for --quantize int4: add that, or leave it out")
    if calibrate is not None and quantize != "int4":
        raise ValueError("calibrate is for --quantize int4: add that, or leave it out")
    target = Path(str(out_dir))
    source = open_checkpoint(Path(str(in_path)))
    for directory in [adapter] if isinstance(adapter, str) else adapter:
        source = apply_adapter(source, Path(directory))
    args = make_args(source.params, source.source, n_words=vocabulary_size(source))
    target_dtype = torch_dtype or (source.dtype if source.in_float32 else None)
    if quantize is not None:
        scheme = chosen_scheme(source, quantize, group_size)
        forms = scheme.forms(args)
        check_model_parallel_size(args, model_parallel_size, forms)
        count = quantized_count(args, forms)
        with progress(count, "quantising", "weights") as show:
            if calibrate is not None:
                tokens = _tokens(Path(str(calibrate)), source, args)
                source = calibrated(source, args, scheme, tokens, show)
            else:
                source = quantized(source, args, scheme, show)
                # Quantise everything now, so that no file rounds a weight again.
                whole = Weights.of(dict(source.parts[0]))
                source = replace(source, parts=[whole], read_part=None)
    elif to == "hf" or torch_dtype is not None:
        source = widened(source, args)
        target_dtype = torch_dtype or (source.dtype if source.in_float32 else None)
    size = stored_bytes(args, target_dtype or source.dtype, source.forms)
    with progress(size, "writing") as show:
        if to == "meta":
            save_meta(source, args, target, model_parallel_size, target_dtype, show)
        else:
            from llama.checkpoint.save_hf import save_hf

            save_hf(source, args, target, target_dtype, show)
    print(f"wrote {target}", file=sys.stderr)


def _tokens(path: Path, source: Checkpoint, args: ModelArgs) -> list[int]:
    """Return the ids of a text, by a checkpoint's tokenizer."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no text at {path}: give the path of a UTF-8 file to calibrate with"
        )
    tokenizer = load_tokenizer(source.files, args.vocab_size, source.source)
    fit_tokenizer(tokenizer, args.vocab_size, source.source)
    text = path.read_text(encoding="utf-8")
    return tokenizer.encode(text, bos=tokenizer.add_bos, eos=False)


if __name__ == "__main__":
    run(convert, "llama.convert")
