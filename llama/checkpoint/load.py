"""A network filled with the weights of a checkpoint."""

import logging
import time
from dataclasses import replace

import torch
from torch import nn

from llama import parallel
from llama.args import ModelArgs
from llama.checkpoint.backend import choose_backend
from llama.checkpoint.base import Checkpoint
from llama.checkpoint.memory import (
    Network,
    device_memory,
    keep_freed,
    memory_needs,
    release,
    shares_memory,
    trim,
)
from llama.checkpoint.rounding import make_scheme
from llama.checkpoint.sharding import (
    Forms,
    check_model_parallel_size,
    weight_bytes,
)
from llama.cli import progress
from llama.layers.capability import Capability, cpu_has_bf16
from llama.layers.kernels import form_in
from llama.layers.kernels.machine_code import has_numba
from llama.layers.kernels.openmp import limit_threads, release_team
from llama.layers.quantization import Grouped, Rotated
from llama.model import Transformer

logger = logging.getLogger(__name__)

_COMPILED = 100_000_000  # bytes of weights for which code is compiled, which takes seconds


def load(
    checkpoint: Checkpoint,
    args: ModelArgs,
    device: torch.device,
    dtype: torch.dtype | None,
    int8_cache: bool = False,
    compiles: bool = False,
) -> Transformer:
    """Build the network and fill this rank's part of it from any number of parts.

    The network of a quantised checkpoint is quantised, too.

    Args:
        checkpoint: the weights.
        args: the checkpoint's hyper-parameters (``make_args``).
        device: the device of weights and cache.
        dtype: the dtype of weights and cache; None chooses by checkpoint and device
            (``choose_dtype``).
        int8_cache: store the cache in eight bits instead.
        compiles: whether kernels on CUDA may compile code.

    Raises:
        MemoryError: weights and cache need more memory than the device has.
        ValueError: a tensor is missing, unexpected or of the wrong shape, or the network can't be
            divided among the ranks.
    """
    start = time.monotonic()
    ranks = parallel.world_size()
    checkpoint.check(args)
    check_model_parallel_size(args, ranks, checkpoint.forms)
    if dtype is None:
        fast_bf16 = has_fast_bf16(device) or _has_fast_operators(checkpoint, args, device)
        dtype = choose_dtype(checkpoint.dtype, device.type, fast_bf16)
    forms = {module: form_in(form, dtype, device) for module, form in checkpoint.forms.items()}
    tokens = plan_memory(args, dtype, device, ranks, forms, int8_cache)
    with torch.device("meta"):
        model = Transformer(args)
        model.quantize(forms, dtype)
    try:
        still_mapped, own = _fill(model, checkpoint, args, device, dtype)
    finally:
        for part in checkpoint.parts:
            part.places.clear()
    backend = choose_backend(args, ranks, dtype, device, int8_cache)
    model.allocate_buffers(device, dtype, int8_cache, backend)
    model.capability = replace(model.capability, compiles=compiles and device.type == "cuda")
    _pack(model, still_mapped, own)
    if device.type == "cpu":
        keep_freed()
        limit_threads()
        release_team()
    # Ranks whose GPUs have less free memory than others' decide for all.
    model.prefill_tokens = -int(parallel.max_over_ranks(torch.tensor(-tokens, device=device)))
    logger.info("loaded %s in %.2f seconds", checkpoint.names[0], time.monotonic() - start)
    return model


def _fill(
    model: Transformer,
    checkpoint: Checkpoint,
    args: ModelArgs,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[set[int], set[int]]:
    """Replace a model's meta tensors with this rank's part of the weights.

    Returns:
        The addresses of those that lie in mapped files, and of those that nobody else reads.
    """
    rank, ranks = parallel.rank(), parallel.world_size()
    tensors: dict[str, torch.Tensor] = {}
    still_mapped: set[int] = set()
    own: set[int] = set()
    places = _places(model, device)
    if device.type == "cpu" and ranks == len(checkpoint.parts) == 1:
        checkpoint.parts[0].places.update(places)
    for name in model.state_dict():
        if name.startswith("output.") and args.tie_word_embeddings and ranks == 1:
            tensors[name] = tensors[name.replace("output", "tok_embeddings")]
            continue
        part = checkpoint.rank_part(name, args, rank, ranks)
        part = part.to(device, _stored_dtype(model, name, dtype)).contiguous()
        mapped, place = checkpoint.mapped(name), places.get(name)
        is_mapped = any(shares_memory(part, tensor) for tensor in mapped)
        # A tensor that needs no change stays mapped: it is read when it is used, never copied.
        if is_mapped:
            still_mapped.add(part.data_ptr())
        else:
            if place is not None:
                part = part if shares_memory(part, place) else place.copy_(part)
                own.add(part.data_ptr())
            elif part.untyped_storage().nbytes() > part.nbytes:
                part = part.clone()  # of a tensor that was made whole, keep this rank's part only
            release(mapped)
        tensors[name] = part
    model.load_state_dict(tensors, assign=True)
    model.requires_grad_(False)
    return still_mapped, own


def _places(model: Transformer, device: torch.device) -> dict[str, torch.Tensor]:
    """Return where to put quantised weights: those that kernels join, one below the other.

    What a kernel would join or copy later, the system would have to clear memory for.
    """
    names = {module: name for name, module in model.named_modules()}
    places = {}
    for layers in model.linear_groups():
        for form in {layer.form for layer in layers if layer.form}:
            alike = [layer for layer in layers if layer.form == form]
            for part, dtype in form.dtypes().items():
                shapes = [getattr(layer, part).shape for layer in alike]
                if part == "order" or (len(alike) == 1 and device.type != "cpu"):
                    continue
                n_rows = [shape[0] for shape in shapes]
                joined = torch.empty(sum(n_rows), shapes[0][1], dtype=dtype, device=device)
                for layer, place in zip(alike, joined.split(n_rows), strict=True):
                    name = "tok_embeddings" if layer.is_shared else names[layer]
                    places[f"{name}.{part}"] = place
    return places


def _stored_dtype(model: Transformer, name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a parameter in a network of a dtype."""
    module, _, part = name.rpartition(".")
    form = getattr(model.get_submodule(module), "form", None)
    return form.dtypes().get(part, dtype) if form else dtype


def _pack(model: Transformer, still_mapped: set[int], own: set[int]) -> None:
    """Give the weights to their kernels, and release what was mapped or made on the way."""
    # The output first, which is the largest, while no other weight is in memory beside its copies.
    groups = list(model.linear_groups())[::-1]
    with progress(len(groups), "packing weights", "groups") as show:
        for n, layers in enumerate(groups):
            weights = [weight for layer in layers for weight in layer.parameters()]
            stored = [part for layer in layers for part in layer.stored().items()]
            owned = all(part.data_ptr() in own for name, part in stored if name != "order")
            del stored
            if model.pack_group(layers, owned):
                release(weight for weight in weights if weight.data_ptr() in still_mapped)
                del weights
                trim()  # the gaps that plain weights leave are too small for what comes next
            elif layers[0].is_shared and weights[0].data_ptr() in still_mapped:
                # Every token reads the output, and the pages of files are small.
                copy = weights[0].detach().clone()
                for layer in (model.output, model.tok_embeddings):
                    layer.weight = nn.Parameter(copy, requires_grad=False)
                release(weights)
            show(n + 1)


def choose_dtype(checkpoint: torch.dtype, device_type: str, fast_bf16: bool) -> torch.dtype:
    """Return the dtype to compute in, for weights stored as ``checkpoint``.

    Half-precision weights become bfloat16 where the device is fast at it (float16's small range
    overflows in some checkpoints), else float16 on an accelerator and float32 on the CPU. All
    other weights become float32.
    """
    if checkpoint not in (torch.float16, torch.bfloat16):
        return torch.float32
    if fast_bf16:
        return torch.bfloat16
    return torch.float32 if device_type == "cpu" else torch.float16


def _has_fast_operators(checkpoint: Checkpoint, args: ModelArgs, device: torch.device) -> bool:
    """Return whether a CPU has operators for a checkpoint's weights that don't need such hardware.

    With AVX2 alone weights of groups are multiplied five times as fast as widened to float32, by
    one token. Large plain ones are read in half of float32's bytes by compiled code, and what lies
    between them and int8's is compiled too.
    """
    if device.type != "cpu":
        return False
    forms = {type(form) for form in checkpoint.forms.values()}
    if Grouped in forms or forms - {Rotated}:
        return Grouped in forms
    return weight_bytes(args, torch.bfloat16) >= _COMPILED and has_numba()


def has_fast_bf16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return cpu_has_bf16()


def plan_memory(
    args: ModelArgs,
    dtype: torch.dtype,
    device: torch.device,
    ranks: int,
    forms: Forms | None = None,
    int8_cache: bool = False,
) -> int:
    """Return how many tokens of prompts a pass takes at most, before anything is allocated.

    Args:
        args: the hyper-parameters, with the size of the cache.
        dtype: the dtype of weights and cache.
        device: the device that one rank's part has to fit; on a CPU, those of all local ranks.
        ranks: the number of ranks that share the network.
        forms: the forms of quantised weights by module.
        int8_cache: whether the cache has eight bits.

    Raises:
        MemoryError: weights, cache and, on CUDA, a pass's workspace don't fit the device. It says
            what to change.
    """
    available = device_memory(device)
    capability = Capability.of(device)
    network = Network(args, dtype, forms or {}, int8_cache)
    needs = memory_needs(network, ranks, capability, available)
    workspace, tokens = needs.workspace, needs.prefill_tokens
    local_ranks = parallel.local_ranks() if device.type == "cpu" else 1  # which share this memory
    weights, cache = needs.weights * local_ranks, needs.cache * local_ranks
    if available is None or weights + cache + workspace <= available:
        return tokens
    room = available - workspace
    left = (room - weights) * args.max_seq_len * args.max_batch_size // cache
    if left >= 1:
        advice = (
            f"max_seq_len={args.max_seq_len} times max_batch_size={args.max_batch_size} can be at "
            f"most {left}"
        )
    elif not forms and weights * 2 // dtype.itemsize < room:
        advice = f"dtype={dtype} could be torch.bfloat16"
    elif not forms and _int4_bytes(args, dtype, ranks) * local_ranks < room:
        advice = "quantize could be 'int8' or 'int4'"
    else:
        advice = "the weights alone are too much: share them among more GPUs or more machines"
    sizes = f"weights of {weights / 1e9:.1f} GB and a cache of {cache / 1e9:.1f} GB"
    memory = f"{available / 1e9:.1f} GB of this machine's {device.type}"
    if capability.kind == "cuda":
        sizes += f", with a workspace of {workspace / 1e9:.1f} GB,"
        memory = f"{available / 1e9:.1f} GB that are free on {device} (nvidia-smi lists its uses)"
    raise MemoryError(f"{sizes} don't fit the {memory}: {advice}")


def _int4_bytes(args: ModelArgs, dtype: torch.dtype, ranks: int) -> int:
    return weight_bytes(args, dtype, ranks, make_scheme("int4").forms(args))
