"""The cost of a pass: seconds by their cause, from bytes, operations and the limits of a device.

A pass of some tokens, each at its own position, takes the sum of

    weights / (read * bandwidth)           all weights but the embedding, once for all tokens
    cache / (cached * bandwidth)           keys and values of the positions that are filled
    operations / (arithmetic * flops)
    layers * kernels                       a layer's norms, rotations, sums and their launches
    states / bandwidth                     on a processor, what these read and write for each token
    2 * layers * all-reduces               where several ranks share the network

The fractions of a device's limits (``read``, ``cached``, ``arithmetic``) and ``kernels`` are fitted
to what docs/gpu.md and docs/performance.md say was measured: tests compare them. All-reduces were
never measured here.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import torch

from llama.checkpoint.memory import Network
from llama.checkpoint.sharding import cache_bytes, form_of, full_shapes, split_dim
from llama.layers.quantization import Form, Rotated


class Rates(NamedTuple):
    """The speed of weights of one kind.

    Args:
        read: fraction of the bandwidth.
        arithmetic: fraction of the operations per second.
        kernels: seconds that a layer's small kernels take.
        compiled: the same with ``compile=True``.
        codes: bytes a cycle that the operator for up to ``FEW`` tokens decodes.
        few: operations a cycle that it computes.
        widened: fraction of the bandwidth at which passes of more tokens widen the weights first.
    """

    read: float
    arithmetic: float
    kernels: float
    compiled: float
    codes: float = math.inf
    few: float = math.inf
    widened: float = math.inf


FEW = 192  # tokens
_LAYER, _COMPILED = 50e-6, 15e-6
_CUDA = {
    "plain": Rates(0.74, 0.55, _LAYER, _COMPILED),
    "int8": Rates(0.74, 0.31, 175e-6, 50e-6),  # compiled as gpt-fast's figures are
    "int4 in groups": Rates(0.74, 0.55, _LAYER, _COMPILED, 5.7, 170, 0.0085),
    "int8 in groups": Rates(0.74, 0.55, _LAYER, _COMPILED, 5.7, 85, 0.0085),  # two planes of four
    "float8 in groups": Rates(0.055, 0.45, _LAYER, _COMPILED),  # widened in every pass
    "float8": Rates(0.49, 0.45, 140e-6, _COMPILED, widened=0.062),  # whole rows
}
_CUDA_COMPILED = {  # by compiled code for prompts, and for few tokens with eight bits
    **_CUDA,
    "int4 in groups": _CUDA["int4 in groups"]._replace(widened=0.018),
    "int8 in groups": Rates(0.31, 0.55, _LAYER, _COMPILED, few=94, widened=0.21),
    "float8": _CUDA["float8"]._replace(widened=0.6),
}
_PROCESSOR = Rates(0.85, 0.85, 450e-6, 450e-6)
_CPU = {
    "plain": _PROCESSOR,
    "int8": _PROCESSOR._replace(arithmetic=1.1),  # integers
    "int4 in groups": _PROCESSOR._replace(widened=0.16),
    "int8 in groups": _PROCESSOR._replace(widened=0.16),
    "float8 in groups": _PROCESSOR._replace(read=0.1),  # widened in every pass; not measured
    "float8": _PROCESSOR._replace(read=0.1),
}
_RATES = {
    **{("cuda", False): _CUDA, ("cuda", True): _CUDA_COMPILED},
    **{("cpu", False): _CPU, ("cpu", True): _CPU},
}
_CACHED = {"cuda": 0.6, "cpu": 0.8}  # of the bandwidth
_GATHERED = 0.033  # on CUDA, of a cache that FlashAttention can't read
_ATTENTION = {"cuda": 0.35, "cpu": 0.85}  # of the operations per second
_PASSES = 28  # over a token's states in a layer, on a processor, attention's included
_FLOAT32 = 1 / 16  # of bfloat16's operations per second, on GPUs


@dataclass(frozen=True)
class Device:
    """One GPU, or the processor of one machine, with the limits in its data sheet.

    Args:
        name: as people write it.
        memory: bytes that a process can have.
        bandwidth: of the memory, bytes per second.
        flops: of large products in bfloat16, operations per second.
        cycles: of all multiprocessors, per second.
        link: bytes per second to the machine's other GPUs, in each direction.
        latency: seconds of an all-reduce of few bytes among them.
        kind: "cuda" or "cpu".
        has_float8: whether it multiplies float8 (compute capability 8.9 or higher).
    """

    name: str
    memory: float
    bandwidth: float
    flops: float
    cycles: float = math.inf
    link: float = math.inf
    latency: float = 0.0
    kind: str = "cuda"
    has_float8: bool = True


GB = 0.98 * 2**30  # bytes of a data sheet's, less what the driver takes
_NVLINK, _PCIE = 20e-6, 50e-6  # seconds; 20 agrees with gpt-fast's figures of eight A100s
DEVICES = {
    "a100": Device("A100 80GB", 80 * GB, 2.0e12, 312e12, 152e9, 300e9, _NVLINK, has_float8=False),
    "h100": Device("H100", 80 * GB, 3.35e12, 989e12, 261e9, 450e9, _NVLINK),
    "h200": Device("H200", 140 * GB, 4.8e12, 989e12, 261e9, 450e9, _NVLINK),
    "l4": Device("L4", 22 * GB, 0.3e12, 121e12, 118e9, 25e9, _PCIE),
    "l40s": Device("L40S", 45 * GB, 0.864e12, 362e12, 358e9, 25e9, _PCIE),
    "rtx3090": Device("RTX 3090", 24 * GB, 0.936e12, 71e12, 139e9, 25e9, _PCIE, has_float8=False),
    "rtx4090": Device("RTX 4090", 24 * GB, 1.0e12, 165e12, 323e9, 25e9, _PCIE),
    "cpu": Device("CPU", 16 * GB, 50e9, 0.5e12, kind="cpu"),
}
NETWORK_LATENCY = 60e-6  # seconds of an all-reduce of few bytes among machines, by InfiniBand


@dataclass(frozen=True)
class Machines:
    """Machines with the same number of devices each.

    Args:
        network: bytes per second of a machine to the others, in each direction.
    """

    device: Device
    gpus: int = 1
    nodes: int = 1
    network: float = 50e9

    @property
    def n_devices(self) -> int:
        return self.gpus * self.nodes

    def group_sizes(self) -> list[int]:
        """Return how many devices may share a network: parts of a machine, or whole machines."""
        inside = [n for n in range(1, self.gpus + 1) if self.gpus % n == 0]
        across = [n * self.gpus for n in range(2, self.nodes + 1) if self.nodes % n == 0]
        return inside + across

    def all_reduce(self, n_bytes: float, ranks: int) -> float:
        """Return the seconds in which ranks add up ``n_bytes`` of each, machine by machine."""
        local = min(ranks, self.gpus)
        nodes = ranks // local
        seconds = 0.0
        if local > 1:
            seconds += self.device.latency + 2 * (local - 1) / local * n_bytes / self.device.link
        if nodes > 1:
            seconds += NETWORK_LATENCY + 2 * (nodes - 1) / nodes * n_bytes / self.network
        return seconds


class _Part(NamedTuple):
    """One rank's part of a weight."""

    kind: str
    is_output: bool
    n_weights: float
    n_bytes: float


def _parts(network: Network, ranks: int) -> Iterator[_Part]:
    """Yield the weights that a pass reads: all but the embedding, unless it is the output too."""
    args = network.args
    for name, shape in full_shapes(args).items():
        is_output = name in ("tok_embeddings.weight", "output.weight")
        if name == "tok_embeddings.weight" and not args.tie_word_embeddings:
            continue
        share = 1.0 if split_dim(name) is None else 1 / ranks
        if name.endswith((".wk.weight", ".wv.weight")):  # more ranks than heads have copies
            share = 1 / min(ranks, args.kv_heads)
        form = form_of(network.forms, name)
        n_bytes = prod(shape) * network.dtype.itemsize
        if form is not None:
            dtypes = form.in_dtype(network.dtype).dtypes()
            sizes = form.shapes(shape[0], shape[1]).items()
            n_bytes = sum(prod(size) * dtypes[part].itemsize for part, size in sizes)
        n_weights = prod(shape) if len(shape) > 1 else 0
        yield _Part(_kind(form), is_output, share * n_weights, share * n_bytes)


def _kind(form: Form | None) -> str:
    if form is None:
        return "plain"
    is_whole = isinstance(form, Rotated) or (form.name == "float8" and not form.group_size)
    return form.name if is_whole else f"{form.name} in groups"


def read_bytes(network: Network, ranks: int = 1) -> float:
    """Return the bytes of weights that one rank reads in a pass."""
    return sum(part.n_bytes for part in _parts(network, ranks))


def position_bytes(network: Network, ranks: int = 1) -> int:
    """Return the bytes of a position in one rank's cache of the network's dtype."""
    args = replace(network.args, max_seq_len=1, max_batch_size=1)
    return cache_bytes(args, network.dtype, ranks)


class Pass(NamedTuple):
    """The tokens of a pass.

    Args:
        n_tokens: all of them.
        n_outputs: those whose logits are computed.
        n_attended: the positions that each of them attends to, added up.
        n_filled: the positions of the sequences' caches that are read.
    """

    n_tokens: int
    n_outputs: int
    n_attended: int
    n_filled: int

    @staticmethod
    def step(bsz: int, length: int) -> "Pass":
        """Return a decoding step of ``bsz`` sequences with ``length`` positions filled each."""
        return Pass(bsz, bsz, bsz * length, bsz * length)

    @staticmethod
    def piece(start: int, length: int) -> "Pass":
        """Return the reading of a prompt's next ``length`` tokens after ``start`` ones."""
        end = start + length
        return Pass(length, 1, (end * (end + 1) - start * (start + 1)) // 2, end)


class Cost(NamedTuple):
    """Seconds by their cause."""

    weights: float = 0.0
    cache: float = 0.0
    arithmetic: float = 0.0
    kernels: float = 0.0
    all_reduces: float = 0.0

    @property
    def seconds(self) -> float:
        return sum(self)

    @property
    def limit(self) -> str:
        """The cause that takes most of the time."""
        name: str = max(self._fields, key=lambda name: getattr(self, name))
        return name


def cost(
    network: Network, machines: Machines, ranks: int, work: Pass, compile: bool = False
) -> Cost:
    """Return the seconds of a pass on ranks that share a network."""
    args, device = network.args, machines.device
    on_cuda = device.kind == "cuda"
    in_float32 = on_cuda and network.dtype == torch.float32
    flops = device.flops * (_FLOAT32 if in_float32 else 1)
    parts = list(_parts(network, ranks))
    in_layers = sum(part.n_weights for part in parts if not part.is_output)
    weights = arithmetic = kernels = 0.0
    for part in parts:
        is_slow = part.kind == "float8" and on_cuda and not device.has_float8
        rates = _RATES[device.kind, compile]["float8 in groups" if is_slow else part.kind]
        read, speed = rates.read * device.bandwidth, rates.arithmetic * flops
        if work.n_tokens <= FEW:
            read = min(read, rates.codes * device.cycles)
            speed = min(speed, rates.few * device.cycles)
        else:
            weights += part.n_bytes / (rates.widened * device.bandwidth)
        weights += part.n_bytes / read
        n_tokens = work.n_outputs if part.is_output else work.n_tokens
        arithmetic += 2 * part.n_weights * n_tokens / speed
        if not part.is_output:
            # Prompts of all lengths aren't compiled.
            seconds = rates.compiled if compile and work.n_tokens <= FEW else rates.kernels
            kernels += args.n_layers * seconds * part.n_weights / in_layers
    if not on_cuda:
        width = (args.dim + args.hidden_dim) * network.dtype.itemsize
        kernels += _PASSES * args.n_layers * work.n_tokens * width / ranks / device.bandwidth
    attention = 4 * args.n_layers * args.n_heads * args.head_dim * work.n_attended / ranks
    arithmetic += attention / (_ATTENTION[device.kind] * flops)
    gathers = in_float32 or (on_cuda and network.int8_cache)
    cached = _GATHERED if gathers else _CACHED[device.kind]
    cache = work.n_filled * position_bytes(network, ranks) / (cached * device.bandwidth)
    n_bytes = work.n_tokens * args.dim * network.dtype.itemsize
    all_reduces = 2 * args.n_layers * machines.all_reduce(n_bytes, ranks)
    return Cost(weights, cache, arithmetic, kernels, all_reduces)


def prompt_cost(
    network: Network,
    machines: Machines,
    ranks: int,
    length: int,
    n_tokens: int,
    compile: bool = False,
) -> Cost:
    """Return the seconds of reading a prompt, ``n_tokens`` at most in a pass."""
    pieces = (
        Pass.piece(start, min(n_tokens, length - start)) for start in range(0, length, n_tokens)
    )
    costs = [cost(network, machines, ranks, piece, compile) for piece in pieces]
    return Cost(*(sum(seconds) for seconds in zip(*costs, strict=True)))
