"""This library against installed peers: the same random weights, one run, fresh processes.

    pip install -e '.[bench]'
    python benchmarks/speed.py --shape 1.1B --out results.json --plots plots/
    python benchmarks/speed.py --quantized --grow=False    # int8 and int4 of every engine
    python benchmarks/speed.py --device cuda    # on a GPU: see gpu_speed.py

Each engine gets the weights in its own format (bfloat16; CTranslate2 int8, as it has no bfloat16
products on a CPU). Engines alternate for ``repeats`` rounds; the table shows medians. The limits
of the machine, its read bandwidth (a large tensor's sum) and its bfloat16 matrix peak (the better
of PyTorch's two ways to multiply), are measured before, between and after. Then growth.py
measures the cost of larger batches, longer contexts and further turns.
"""

import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engines
import growth
import torch
from gpu_speed import DeviceConfig, compare
from plots import draw_growth, draw_peers
from shapes import SHAPES

from llama import ModelArgs, cli
from llama.checkpoint.base import Checkpoint, Weights
from llama.checkpoint.hf_names import from_interleaved
from llama.checkpoint.save import save
from llama.checkpoint.save_hf import save_hf
from llama.checkpoint.sharding import full_shapes, parameter_count
from llama.convert import convert
from llama.generation import TINY

Tensors = dict[str, torch.Tensor]


def random_weights(args: ModelArgs) -> Tensors:
    return {
        name: torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)
        for name, shape in full_shapes(args).items()
    }


def write_meta(args: ModelArgs, tensors: Tensors, path: Path) -> None:
    save([tensors], args, path, files={"tokenizer.model": TINY / "tokenizer.model"})


def write_hf(args: ModelArgs, tensors: Tensors, path: Path) -> None:
    save_hf(Checkpoint("", {}, [Weights.of(tensors)], [""], torch.bfloat16), args, path)


def write_gguf(
    args: ModelArgs, tensors: Tensors, path: Path, vocabulary: dict[str, Any] | None = None
) -> None:
    """Write a GGUF file; ``vocabulary`` has tokens, scores, types, bos and eos, or is None."""
    import gguf

    from llama.checkpoint.gguf import META_NAMES

    theirs = {ours: name for name, ours in META_NAMES.items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(args.max_seq_len)
    writer.add_embedding_length(args.dim)
    writer.add_block_count(args.n_layers)
    writer.add_feed_forward_length(args.hidden_dim)
    writer.add_head_count(args.n_heads)
    writer.add_head_count_kv(args.kv_heads)
    writer.add_layer_norm_rms_eps(args.norm_eps)
    if args.head_dim != args.dim // args.n_heads:
        writer.add_key_length(args.head_dim)
        writer.add_value_length(args.head_dim)
    writer.add_rope_dimension_count(args.head_dim)
    writer.add_rope_freq_base(args.rope_theta)
    writer.add_vocab_size(args.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab" if vocabulary is None else "llama")
    if vocabulary is not None:
        writer.add_token_list(vocabulary["tokens"])
        writer.add_token_scores(vocabulary["scores"])
        writer.add_token_types(vocabulary["types"])
        writer.add_bos_token_id(vocabulary["bos"])
        writer.add_eos_token_id(vocabulary["eos"])
    for name, tensor in tensors.items():
        stem = name.removesuffix(".weight")
        if stem.startswith("layers."):
            _, number, module = stem.split(".", 2)
            stem = f"blk.{number}.{theirs[module]}"
        else:
            stem = theirs[stem]
        if tensor.dim() == 1:  # llama.cpp wants norms in float32
            writer.add_tensor(f"{stem}.weight", tensor.float().numpy())
        else:
            raw = tensor.view(torch.uint16).numpy()
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(f"{stem}.weight", raw.view("uint8"), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_quantized(name: str) -> Callable[[ModelArgs, Tensors, Path], None]:
    def write(args: ModelArgs, tensors: Tensors, path: Path) -> None:
        convert(str(path.with_name("llama")), str(path), quantize=name)

    return write


def write_quantized_gguf(
    kind: str, pure: bool = False
) -> Callable[[ModelArgs, Tensors, Path], None]:
    """Return a function that writes a quantised GGUF file.

    Args:
        pure: quantise all weights alike; by default llama.cpp gives some of them more bits.
    """

    def write(args: ModelArgs, tensors: Tensors, path: Path) -> None:
        import llama_cpp

        original = path.with_name("llama.cpp")
        if not original.exists():
            write_gguf(args, tensors, original)
        params = llama_cpp.llama_model_quantize_default_params()
        params.pure = pure
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        names = str(original).encode(), str(path).encode()
        if llama_cpp.llama_model_quantize(*names, ctypes.byref(params)):
            raise RuntimeError(f"llama.cpp couldn't write {path}")

    return write


def write_ctranslate2(args: ModelArgs, tensors: Tensors, path: Path) -> None:
    from ctranslate2.specs import common_spec, transformer_spec

    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        args.n_layers,
        args.n_heads,
        activation=common_spec.Activation.SWISH,
        pre_norm=True,
        ffn_glu=True,
        rms_norm=True,
        rotary_dim=0,
        rotary_interleave=False,
        num_heads_kv=args.kv_heads,
    )

    def array(name: str) -> Any:
        tensor = tensors[f"{name}.weight"].float()
        if name.endswith(("wq", "wk")):
            tensor = from_interleaved(tensor, args.head_dim)
        return tensor.numpy()

    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = array("tok_embeddings")
    decoder.layer_norm.gamma = array("norm")
    decoder.projection.weight = array("output")
    for i, layer in enumerate(decoder.layer):
        prefix = f"layers.{i}"
        attention, feed_forward = layer.self_attention, layer.ffn
        attention.layer_norm.gamma = array(f"{prefix}.attention_norm")
        parts = [torch.from_numpy(array(f"{prefix}.attention.w{x}")) for x in "qkv"]
        attention.linear[0].weight = torch.cat(parts).numpy()
        attention.linear[1].weight = array(f"{prefix}.attention.wo")
        feed_forward.layer_norm.gamma = array(f"{prefix}.ffn_norm")
        feed_forward.linear_0.weight = array(f"{prefix}.feed_forward.w1")
        feed_forward.linear_0_noact.weight = array(f"{prefix}.feed_forward.w3")
        feed_forward.linear_1.weight = array(f"{prefix}.feed_forward.w2")
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "t0"
    spec.register_vocabulary([f"t{i}" for i in range(args.vocab_size)])
    spec.validate()
    spec.optimize(quantization="int8")
    path.mkdir()
    spec.save(str(path))


WRITERS: dict[str, Callable[[ModelArgs, Tensors, Path], None]] = {
    "llama": write_meta,
    "llama compiled": lambda args, tensors, path: path.symlink_to(path.with_name("llama")),
    "transformers": write_hf,
    "llama.cpp": write_gguf,
    "llama int8": write_quantized("int8"),
    "llama.cpp Q8_0": write_quantized_gguf("Q8_0"),
    "ctranslate2": write_ctranslate2,
    "llama int4": write_quantized("int4"),
    "llama.cpp Q4_0": write_quantized_gguf("Q4_0"),
}
DEFAULT_PEERS = ("llama compiled", "transformers", "llama.cpp", "ctranslate2")
QUANTIZED_PEERS = ("llama int8", "llama.cpp Q8_0", "ctranslate2", "llama int4", "llama.cpp Q4_0")
# Of a weight, including scales.
BYTES = {"bf16": 2.0, "int8": 1.0, "int4": 0.5625}

LIMITS = """
import json, time, torch
torch.set_num_threads(2)
def median_seconds(function, repeats=7):
    function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 2]
large = torch.ones(1 << 29)
bandwidth = large.nbytes / median_seconds(large.sum)
del large
n = 4096
a, b = torch.randn(n, n).bfloat16(), torch.randn(n, n).bfloat16()
ways = [lambda: torch.nn.functional.linear(a, b)]
if torch.backends.mkldnn.is_available():
    packed = torch.ops.mkldnn._reorder_linear_weight(b, n)
    ways.append(lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], ""))
print(json.dumps({"bandwidth": bandwidth, "peak": 2 * n**3 / min(map(median_seconds, ways))}))
"""


def limits() -> dict[str, float]:
    """Return bytes read and bfloat16 operations per second, measured in a process of its own."""
    done = subprocess.run([sys.executable, "-c", LIMITS], stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout))


def run_worker(engine: str, path: Path) -> dict[str, float] | None:
    command = [sys.executable, engines.__file__, engine, str(path), str(time.time())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"{engine} failed: {last}", file=sys.stderr)
        return None
    return dict(json.loads(done.stdout))


def run_growth(path: Path) -> dict[str, Any]:
    command = [sys.executable, growth.__file__, str(path), "--as_json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout))


def table(shape: str, results: dict[str, Any]) -> str:
    """Return the medians, and their fractions of the machine's limits, as a Markdown table."""
    args = SHAPES[shape]
    per_token = parameter_count(args) - args.vocab_size * args.dim  # of which a token reads one row
    per_prompt = per_token - args.vocab_size * args.dim  # the last position's logits only
    bandwidth, peak = results["limits"]["bandwidth"], results["limits"]["peak"]
    lines = [
        f"{shape}: read bandwidth {bandwidth / 1e9:.1f} GB/s, bf16 peak {peak / 1e9:.0f} Gflop/s",
        "",
        "| engine | prefill tokens/s | of the peak | decode tokens/s | of the bandwidth "
        "| first token | peak memory | prefill: ours is | decode: ours is |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, measured in results["engines"].items():
        prefill, decode = measured["prefill_tokens_per_s"], measured["decode_tokens_per_s"]
        weights = engines.ENGINES[name].weights
        nbytes = per_token * BYTES[weights]
        own = "llama" if weights == "bf16" else f"llama {weights}"
        ours = results["engines"].get(own, results["engines"]["llama"])
        ratios = (ours["prefill_tokens_per_s"] / prefill, ours["decode_tokens_per_s"] / decode)
        lines.append(
            f"| {name} | {prefill:.0f} | {2 * per_prompt * prefill / peak:.2f} | {decode:.1f} "
            f"| {nbytes * decode / bandwidth:.2f} | {measured['first_token_s']:.1f} s "
            f"| {measured['peak_bytes'] / 1e9:.2f} GB | {ratios[0]:.2f} x | {ratios[1]:.2f} x |"
        )
    return "\n".join(lines)


def main(
    shape: str | None = None,
    peers: str | None = None,
    quantized: bool = False,
    repeats: int = 1,
    out: str | None = None,
    plots: str | None = None,
    grow: bool = True,
    *,
    on: DeviceConfig,
) -> None:
    """Measure this library and ``peers``, print tables, write ``out`` as JSON and draw ``plots``.

    With ``device`` everything runs there, and gpu_speed.py does the work.

    Args:
        shape: of the random weights, 1.1B by default, with ``device`` 7B; see shapes.py.
        peers: the engines to compare with, with commas between them; those installed by default.
        quantized: select all engines with int8 or int4 weights; an engine is compared with this
            library's weights of as many bits.
        repeats: rounds, of which the tables show medians.
        out: the JSON file to write.
        plots: the directory for plots.
        grow: whether growth.py runs, too.
    """
    if on.device is not None:
        if quantized or plots is not None:
            raise ValueError("--quantized and --plots are for runs without --device")
        compare(on, shape or "7B", peers, repeats, out)
        return
    shape = shape or "1.1B"
    if peers is None:
        peers = ",".join(QUANTIZED_PEERS if quantized else DEFAULT_PEERS)
    selected = ("llama", *(peers.split(",") if isinstance(peers, str) else peers))
    names = [name for name in WRITERS if name in selected and name in engines.installed()]
    print(f"engines: {', '.join(names)}", file=sys.stderr)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    measured = [limits()]
    with tempfile.TemporaryDirectory() as directory:
        tensors = random_weights(SHAPES[shape])
        for name in names:
            WRITERS[name](SHAPES[shape], tensors, Path(directory) / name)
        del tensors
        for number in range(repeats):
            for name in names:
                print(f"round {number + 1} of {repeats}: {name}", file=sys.stderr)
                result = run_worker(name, Path(directory) / name)
                if result is not None:
                    rounds[name].append(result)
            measured.append(limits())
        grown = run_growth(Path(directory) / "llama") if grow else None
    results: dict[str, Any] = {
        "shape": shape,
        "limits": {key: statistics.median(m[key] for m in measured) for key in measured[0]},
        "engines": {
            name: {key: statistics.median(r[key] for r in runs) for key in runs[0]}
            for name, runs in rounds.items()
            if runs
        },
        "rounds": rounds,
        "measured_limits": measured,
    }
    print(table(shape, results))
    if grown is not None:
        results["growth"] = grown
        print(f"\n{growth.table(grown)}")
    if out is not None:
        Path(out).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if plots is not None:
        Path(plots).mkdir(parents=True, exist_ok=True)
        draw_peers(results, Path(plots) / "speed_peers.svg")
        if grown is not None:
            draw_growth(results, Path(plots) / "speed_growth.svg")


if __name__ == "__main__":
    cli.run(main)
