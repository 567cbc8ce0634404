"""The cost of quantisation: perplexity here and in llama.cpp, of the same weights and text.

    python benchmarks/quality.py                           # the embedded model, on unseen stories
    python benchmarks/quality.py CKPT TEXT_FILE            # any other, on a UTF-8 text
    python benchmarks/quality.py CKPT TEXT_FILE --calibrate OTHER_TEXT    # and calibrated int4

All start from the weights in bfloat16. Bits are averages over all weights of a checkpoint,
including embedding, norms and scales.
"""

import contextlib
import math
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engines
import torch
import weights

from llama import Llama, ModelArgs, cli
from llama.checkpoint import open_checkpoint
from llama.checkpoint.params import make_args
from llama.checkpoint.sharding import parameter_count, weight_bytes
from llama.convert import convert
from llama.generation import TINY
from llama.perplexity import Perplexity, perplexity, summary

sys.path.append(str(Path(__file__).parent.parent / "tools"))

# Arguments of Llama.build.
OURS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama int8": {"quantize": "int8"},
    "llama int4": {"quantize": "int4"},
    "llama int4, groups of 64": {"quantize": "int4", "group_size": 64},
    "llama int4, groups of 32": {"quantize": "int4", "group_size": 32},
    "llama, cache int8": {"kv_cache_dtype": "int8"},
}
THEIRS: dict[str, Callable[[ModelArgs, weights.Tensors, Path], None]] = {
    "llama.cpp": weights.write_gguf,
    "llama.cpp Q8_0": weights.write_quantized_gguf("Q8_0"),
    "llama.cpp Q4_K_M": weights.write_quantized_gguf("Q4_K_M"),
    "llama.cpp Q4_0": weights.write_quantized_gguf("Q4_0"),
    "llama.cpp Q4_0, all weights": weights.write_quantized_gguf("Q4_0", pure=True),
}


def stories(n_chars: int = 100_000) -> str:
    """Return texts like the embedded model's training data, with held-out combinations."""
    from tiny_world import compose

    rng = random.Random("quality")
    parts: list[str] = []
    while sum(map(len, parts)) < n_chars:
        parts.append(compose(rng).text)
    return "\n".join(parts)


def of_llama_cpp(path: Path, tokens: list[int], context: int, stride: int) -> Perplexity:
    """Return llama.cpp's perplexity, in the same windows as ``llama.perplexity``."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(path),
        n_ctx=context,
        n_batch=context,
        n_ubatch=context,
        n_threads=engines.THREADS,
        n_threads_batch=engines.THREADS,
        logits_all=True,
        verbose=False,
    )
    scores: list[float] = []
    show = cli.progress(len(tokens) - 1, "scoring", "tokens")
    for begin in range(0, max(len(tokens) - context, 0) + stride, stride):
        window = tokens[begin : begin + context]
        model.reset()
        model.eval(window)
        logits = torch.from_numpy(model.scores[: len(window) - 1])
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(window[1:])[:, None])[:, 0]
        scores += logprobs.tolist()[len(scores) - begin :]
        show(len(scores))
    return summary(scores)


def main(
    ckpt: str = str(TINY),
    text_file: str | None = None,
    n_tokens: int = 20_480,
    context: int = 512,
    stride: int = 256,
    calibrate: str | None = None,
) -> None:
    """Print a table of perplexities.

    Args:
        ckpt: a checkpoint of any format.
        text_file: UTF-8; stories like the embedded model's by default.
        n_tokens: tokens of the text, at most.
        context, stride: as for ``llama.perplexity``.
        calibrate: another text, for int4 that is calibrated with it.
    """
    text = stories() if text_file is None else Path(text_file).read_text(encoding="utf-8")
    results: dict[str, tuple[Perplexity, float]] = {}
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(sys.stderr):
        path = Path(directory) / "llama"
        convert(ckpt, str(path), dtype="bfloat16")
        tokens: list[int] = []
        ours = {name: (path, options) for name, options in OURS.items()}
        if calibrate is not None:
            out = Path(directory) / "calibrated"
            convert(ckpt, str(out), quantize="int4", calibrate=calibrate)
            ours["llama int4, calibrated"] = out, {}
        for name, (own, options) in ours.items():
            llama = Llama.build(
                own,
                max_seq_len=context,
                max_batch_size=4,
                device="cpu",
                dtype=torch.bfloat16,
                **options,
            )
            if not tokens:
                bos = llama.tokenizer.add_bos
                tokens = llama.tokenizer.encode(text, bos=bos, eos=False)[:n_tokens]
            show = cli.progress(len(tokens) - 1, "scoring", "tokens")
            args = llama.model.params
            size = weight_bytes(args, torch.bfloat16, 1, llama.model.forms)
            value = perplexity(llama, tokens, context, stride, show)
            print(f"{name}: {value.value:.4f}")
            results[name] = value, 8 * size / parameter_count(args)
            del llama
        if "llama.cpp" in engines.installed():
            source = open_checkpoint(path)
            args = make_args(source.params, source.source, n_words=0)
            args.max_seq_len = context
            tensors = {name: source.rank_part(name, args, 0, 1) for name in source.parts[0]}
            for name, write in THEIRS.items():
                file = Path(directory) / name
                write(args, tensors, file)
                bits = 8 * file.stat().st_size / parameter_count(args)
                results[name] = of_llama_cpp(file, tokens, context, stride), bits
                print(f"{name}: {results[name][0].value:.4f}")
    print(f"{len(tokens):,} tokens, context {context}, stride {stride}\n")
    print("| weights | bits a weight | perplexity | of the engine's bfloat16 |")
    print("|---|---|---|---|")
    for name, (value, bits) in results.items():
        baseline = results["llama.cpp" if name.startswith("llama.cpp") else "llama"][0]
        change = 100 * math.log(value.value / baseline.value)
        print(f"| {name} | {bits:.2f} | {value.value:.4f} | {change:+.2f} % |")


if __name__ == "__main__":
    cli.run(main)
