"""int4 weights rounded with the help of a text: GPTQ (https://arxiv.org/abs/2210.17323).

A weight's inputs are rounded one after another. Those not yet rounded make up for the error of
each, as far as the text's inputs, of which the sums of products are known, move together.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from llama import parallel
from llama.args import ModelArgs
from llama.checkpoint.base import Checkpoint, Weights, quantized, widened
from llama.checkpoint.rounding import Scheme, fit_groups, round_groups
from llama.layers.attention import Sdpa
from llama.layers.batch import Segment
from llama.layers.kv_cache import KVCache
from llama.layers.linear import ParallelLinear
from llama.layers.quantization import Grouped, StoredWeight
from llama.model import RMSNorm, TransformerBlock, precompute_freqs_cis

WINDOW = 512  # tokens that are read together
_MOST_WINDOWS = 32
_AT_ONCE = 4  # windows in a pass
_DAMPING = 0.01  # of the mean of the diagonal, added to it
# The layers of a block by their common inputs.
_GROUPS = (
    ("attention.wq", "attention.wk", "attention.wv"),
    ("attention.wo",),
    ("feed_forward.w1", "feed_forward.w3"),
    ("feed_forward.w2",),
)

Hidden = Sequence[torch.Tensor]
"""Hidden states of some whole windows each, (n_tokens, dim)."""


@torch.no_grad()
def calibrated(
    source: Checkpoint,
    args: ModelArgs,
    scheme: Scheme,
    tokens: Sequence[int],
    progress: Callable[[int], None] = lambda _: None,
) -> Checkpoint:
    """Return a checkpoint of int4 weights that are rounded for a text.

    Block after block is rounded for the inputs that the blocks before it make of the text, as they
    are rounded. The embedding, and an output in eight bits, are rounded without it.

    Args:
        source: a checkpoint; its weights are read one block at a time.
        args: its hyper-parameters (``make_args``).
        scheme: int4.
        tokens: the text, of which at most 32 windows of 512 tokens are read.
        progress: called with the number of weights that have been rounded.

    Raises:
        ValueError: the text is too short, or as for ``quantized``.
    """
    parallel.initialize(torch.device("cpu"))
    windows = _windows(tokens)
    rounded = quantized(source, args, scheme)
    forms = scheme.forms(args)
    source = widened(source, args)
    tensors: dict[str, torch.Tensor] = {}
    done = 0

    def add(module: str, stored: StoredWeight, n_weights: int) -> None:
        nonlocal done
        tensors.update({f"{module}.{part}": tensor for part, tensor in stored.items()})
        done += n_weights
        progress(done)

    def read(module: str) -> StoredWeight:
        dtypes = forms[module].dtypes()
        return {part: rounded.rank_part(f"{module}.{part}", args, 0, 1) for part in dtypes}

    table = read("tok_embeddings")
    add("tok_embeddings", table, args.vocab_size * args.dim)
    form = forms["tok_embeddings"]
    hidden = []
    for ids in windows.split(_AT_ONCE):
        rows = {part: tensor[ids.flatten()] for part, tensor in table.items()}
        hidden.append(form.dequantize(rows, form.block_size(args.dim)))
    for i in range(args.n_layers):
        block = _Block(source, args, i)
        hessians = block.hessians(hidden)
        for group, hessian in zip(_GROUPS, hessians, strict=True):
            for name in group:
                layer = block.layer(name)
                form = forms[f"layers.{i}.{name}"]
                assert isinstance(form, Grouped)
                stored = round_calibrated(form, layer.weight, hessian)
                add(f"layers.{i}.{name}", stored, layer.weight.numel())
                layer.weight.copy_(form.dequantize(stored))
        hidden = block.outputs(hidden)
    if "output" in forms:
        form, stored = forms["output"], read("output")
        if isinstance(form, Grouped):
            norm = RMSNorm(args.dim, args.norm_eps)
            norm.load_state_dict({"weight": source.rank_part("norm.weight", args, 0, 1)})
            hessian = torch.zeros(args.dim, args.dim)
            for h in hidden:
                _add_products(hessian, norm(h), h)
            weight = source.rank_part("output.weight", args, 0, 1)
            stored = round_calibrated(form, weight.float(), hessian)
        add("output", stored, args.n_outputs * args.dim)
    tensors |= {
        name: rounded.rank_part(name, args, 0, 1)
        for name in rounded.parts[0]
        if name not in tensors
    }
    return replace(rounded, parts=[Weights.of(tensors)], read_part=None)


def _windows(tokens: Sequence[int]) -> torch.Tensor:
    """Return windows that are spread over a text, (n_windows, WINDOW)."""
    n_windows = len(tokens) // WINDOW
    if not n_windows:
        raise ValueError(
            f"the text to calibrate with has {len(tokens)} tokens: give one of at least {WINDOW}, "
            f"better of {WINDOW * _MOST_WINDOWS:,}"
        )
    windows = torch.tensor(tokens[: n_windows * WINDOW]).view(-1, WINDOW)
    step = -(-n_windows // _MOST_WINDOWS)
    return windows[::step]


class _Block:
    """A block of the network in float32, with the weights of a checkpoint."""

    def __init__(self, source: Checkpoint, args: ModelArgs, number: int):
        with torch.device("meta"):
            self._block = TransformerBlock(args)
        prefix = f"layers.{number}."
        state = {
            name: source.rank_part(prefix + name, args, 0, 1).to(torch.float32, copy=True)
            for name in self._block.state_dict()
        }
        self._block.load_state_dict(state, assign=True)
        self._block.requires_grad_(False)
        device = torch.device("cpu")
        shape = (_AT_ONCE, args.kv_heads, WINDOW, args.head_dim)
        self._block.attention.cache = KVCache(shape, torch.float32, device)
        self._freqs_cis = precompute_freqs_cis(replace(args, max_seq_len=WINDOW), device)

    def layer(self, name: str) -> ParallelLinear:
        """Return a linear layer, such as attention.wq."""
        layer = self._block.get_submodule(name)
        assert isinstance(layer, ParallelLinear)
        return layer

    def outputs(self, hidden: Hidden) -> list[torch.Tensor]:
        """Return the block's outputs for its inputs."""
        return [self._output(h) for h in hidden]

    def hessians(self, hidden: Hidden) -> list[torch.Tensor]:
        """Return the sums of products of inputs, given the block's, for each of ``_GROUPS``."""
        layers = [self.layer(names[0]) for names in _GROUPS]
        sums = [torch.zeros(layer.in_features, layer.in_features) for layer in layers]
        for layer, total in zip(layers, sums, strict=True):
            layer.adapted = functools.partial(_add_products, total)
        for h in hidden:
            self._output(h)
        for layer in layers:
            layer.adapted = None
        return sums

    def _output(self, h: torch.Tensor) -> torch.Tensor:
        segments = [Segment(slot, 0, WINDOW) for slot in range(len(h) // WINDOW)]
        batch = Sdpa("cpu", torch.float32).layout(segments, h.device)
        out: torch.Tensor = self._block(h, self._freqs_cis[batch.positions], batch)
        return out


def _add_products(total: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Add the products of a layer's inputs to ``total``, and leave its outputs as they are."""
    total.addmm_(x.t(), x)
    return out


def round_calibrated(form: Grouped, weight: torch.Tensor, hessian: torch.Tensor) -> StoredWeight:
    """Round a weight to int4, with a small squared error of its outputs.

    Args:
        form: int4 with zeros.
        weight: float32, (out_features, in_features).
        hessian: the sum of the products of its inputs, (in_features, in_features).
    """
    size, n_inputs = form.group_size, weight.shape[1]
    factor = _inverse_factor(hessian)
    inputs = weight.t().contiguous()  # (in_features, out_features)
    codes = torch.empty(inputs.shape, dtype=torch.uint8)
    scales, zeros = [], []
    for first in range(0, n_inputs, size):
        last = first + size
        group, own = inputs[first:last], factor[first:last, first:last]
        scale, zero = fit_groups(group)
        errors = torch.empty_like(group)
        for i in range(size):
            code = round_groups(group[i], scale, zero)
            codes[first + i] = code
            error = group[i].sub(zero).addcmul_(code.sub_(8), scale, value=-1).div_(own[i, i])
            group[i + 1 :].addr_(own[i, i + 1 :], error, alpha=-1)
            errors[i] = error
        inputs[last:].addmm_(factor[first:last, last:].t(), errors, alpha=-1)
        scales.append(scale)
        zeros.append(zero)
    return {
        "weight": form.pack(codes.t().contiguous()),
        "scales": torch.stack(scales, dim=1).to(form.scale_dtype),
        "zeros": torch.stack(zeros, dim=1).to(form.scale_dtype),
    }


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Return the upper Cholesky factor of the inverse of a damped Hessian.

    Row i, divided by its diagonal element, says how inputs after i make up for an error at i.
    """
    mean = hessian.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    for damping in (_DAMPING, 10 * _DAMPING, 100 * _DAMPING):
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
    raise ValueError("the inputs that the text gives a weight aren't finite")
