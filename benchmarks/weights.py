"""Random weights of a shape, in the format of each engine that speed.py compares."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llama import ModelArgs
from llama.checkpoint.base import Checkpoint, Weights
from llama.checkpoint.hf_names import from_interleaved
from llama.checkpoint.save import save
from llama.checkpoint.save_hf import save_hf
from llama.checkpoint.sharding import full_shapes
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


def gguf_writer(args: ModelArgs, path: Path, vocabulary: dict[str, Any] | None = None) -> Any:
    """Return a writer that has a network's fields.

    Args:
        vocabulary: tokens, scores, types, bos and eos; None for no vocabulary.
    """
    import gguf

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
    return writer


def gguf_name(name: str) -> str:
    """Return a parameter's name in GGUF files."""
    from llama.checkpoint.gguf import META_NAMES

    theirs = {ours: name for name, ours in META_NAMES.items()}
    stem = name.removesuffix(".weight")
    if not stem.startswith("layers."):
        return f"{theirs[stem]}.weight"
    _, number, module = stem.split(".", 2)
    return f"blk.{number}.{theirs[module]}.weight"


def write_gguf(
    args: ModelArgs, tensors: Tensors, path: Path, vocabulary: dict[str, Any] | None = None
) -> None:
    """Write a GGUF file of bfloat16; the vocabulary as in ``gguf_writer``."""
    import gguf

    writer = gguf_writer(args, path, vocabulary)
    for name, tensor in tensors.items():
        if tensor.dim() == 1:  # llama.cpp wants norms in float32
            writer.add_tensor(gguf_name(name), tensor.float().numpy())
        else:
            raw = tensor.view(torch.uint16).numpy()
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(gguf_name(name), raw.view("uint8"), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_q4_k_m(args: ModelArgs, path: Path) -> None:
    """Write a file of random blocks, of the types that llama.cpp's Q4_K_M has in each place.

    It takes seconds where quantising takes minutes, and the memory of one tensor.
    """
    import gguf
    import numpy as np

    kinds = gguf.GGMLQuantizationType
    generator = np.random.default_rng(0)
    shapes = full_shapes(args)
    writer = gguf_writer(args, path)

    def kind(name: str) -> Any:
        if len(shapes[name]) == 1:
            return kinds.F32
        return kinds.Q6_K if _has_six_bits(name, args.n_layers) else kinds.Q4_K

    def blocks(name: str) -> Any:
        shape = shapes[name]
        if kind(name) == kinds.F32:
            return np.ones(shape, dtype=np.float32)
        values, nbytes = gguf.GGML_QUANT_SIZES[kind(name)]
        raw = generator.integers(256, size=(shape[0], shape[1] // values, nbytes), dtype=np.uint8)
        # The factors of a block, such that weights are about as large as a network's.
        first, factors = (208, [1e-5]) if kind(name) == kinds.Q6_K else (0, [1e-4, 1e-3])
        raw[..., first : first + 2 * len(factors)] = np.array(factors, np.float16).view(np.uint8)
        return raw.reshape(shape[0], -1)

    for name, shape in shapes.items():
        if kind(name) == kinds.F32:
            dtype, stored = np.dtype(np.float32), shape
        else:
            values, nbytes = gguf.GGML_QUANT_SIZES[kind(name)]
            dtype, stored = np.dtype(np.uint8), (shape[0], shape[1] // values * nbytes)
        size = dtype.itemsize * int(np.prod(stored))
        writer.add_tensor_info(gguf_name(name), stored, dtype, size, kind(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in shapes:
        writer.write_tensor_data(blocks(name))
    writer.close()


def _has_six_bits(name: str, n_layers: int) -> bool:
    """Return whether Q4_K_M keeps a weight in Q6_K: the output, and two in half of the layers."""
    if name == "output.weight":
        return True
    if not name.endswith(("attention.wv.weight", "feed_forward.w2.weight")):
        return False
    number, eighth = int(name.split(".")[1]), n_layers // 8
    return number < eighth or number >= 7 * n_layers // 8 or (number - eighth) % 3 == 2


def linked(name: str) -> Callable[[ModelArgs, Tensors, Path], None]:
    """Return a function that gives an engine the weights of another."""

    def link(args: ModelArgs, tensors: Tensors, path: Path) -> None:
        target = path.with_name(name)
        if not target.exists():
            WRITERS[name](args, tensors, target)
        path.symlink_to(target.name)

    return link


def write_quantized(name: str) -> Callable[[ModelArgs, Tensors, Path], None]:
    def write(args: ModelArgs, tensors: Tensors, path: Path) -> None:
        original = path.with_name("llama")
        if not original.exists():
            write_meta(args, tensors, original)
        convert(str(original), str(path), quantize=name)

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
        usual, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
        llama_cpp.llama_log_get(ctypes.byref(usual), ctypes.byref(data))
        silent = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(silent, None)
        failed = llama_cpp.llama_model_quantize(*names, ctypes.byref(params))
        llama_cpp.llama_log_set(usual, data)
        if failed:
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
    has_output = "output.weight" in tensors
    decoder.projection.weight = array("output" if has_output else "tok_embeddings")
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
    "llama compiled": linked("llama"),
    "transformers": write_hf,
    "llama.cpp": write_gguf,
    "llama BF16": linked("llama.cpp"),
    "llama int8": write_quantized("int8"),
    "ctranslate2": write_ctranslate2,
    "llama int4": write_quantized("int4"),
}
for _kind in ("Q8_0", "Q4_0", "Q4_K_M"):  # the same file for both engines
    WRITERS[f"llama.cpp {_kind}"] = write_quantized_gguf(_kind)
    WRITERS[f"llama {_kind}"] = linked(f"llama.cpp {_kind}")
