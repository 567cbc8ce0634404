"""Devices, and the ranks that share the network."""

import atexit
import contextlib
import io
import logging
import os
import weakref
from datetime import timedelta

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel.initialize import (
    destroy_model_parallel,
    get_model_parallel_group,
    get_model_parallel_rank,
    get_model_parallel_world_size,
    initialize_model_parallel,
    model_parallel_is_initialized,
)

from llama import heartbeat


def choose_device(
    wanted: str | torch.device | None, cuda: bool, mps: bool, local_rank: int, ranks: int
) -> torch.device:
    """Return the device for a process: its own GPU, else Apple's, else the CPU.

    Args:
        wanted: the device that the caller asks for; None to choose.
        cuda: whether CUDA is available.
        mps: whether Apple's Metal is available.
        local_rank: the number of the process on this machine.
        ranks: the number of processes; several can't communicate from MPS.
    """
    if wanted is None:
        wanted = "cuda" if cuda else "mps" if mps and ranks == 1 else "cpu"
    try:
        device = torch.device(wanted)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device is {wanted!r}: give 'cpu', 'cuda', 'cuda:1' or 'mps'") from error
    if not {"cpu": True, "cuda": cuda, "mps": mps}.get(device.type, False):
        raise ValueError(f"device is {wanted!r}, which PyTorch doesn't offer here: try 'cpu'")
    return torch.device("cuda", local_rank) if str(device) == "cuda" else device


def detect_device(wanted: str | torch.device | None = None) -> torch.device:
    """Return ``choose_device`` of this machine and process.

    Raises:
        ValueError: PyTorch doesn't offer the device here, or all processes would take one GPU.
    """
    device = choose_device(
        wanted,
        torch.cuda.is_available(),
        torch.backends.mps.is_available(),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        ranks=int(os.environ.get("WORLD_SIZE", "1")),
    )
    # NCCL refuses two processes on a GPU. A script may have chosen gloo, which doesn't.
    by_gloo = dist.is_initialized() and dist.get_backend() == "gloo"
    if str(wanted).startswith("cuda:") and local_ranks() > 1 and not by_gloo:
        raise ValueError(
            f"device is {str(wanted)!r} in every process of this machine, but each needs its own "
            "GPU: write device='cuda', or leave it out, and each process takes its own"
        )
    return device


_cpu_group: dist.ProcessGroup | None = None  # of all ranks, for messages between CPUs
graphs: "weakref.WeakSet[torch.cuda.CUDAGraph]" = weakref.WeakSet()  # that have been recorded


def initialize(device: torch.device | None = None) -> int:
    """Join the other processes and share the network among all of them.

    Under a launcher the processes find each other through its environment variables; alone, the
    group lives in memory. Calling it again changes nothing.

    Args:
        device: of the tensors. Several processes with CUDA devices are connected by ``nccl``, all
            others by ``gloo``. Processes that are connected already stay as they are.

    Returns:
        The number of processes.

    Raises:
        ValueError: there are more processes than GPUs, NCCL is missing, or the processes are
            connected by ``nccl`` and the device isn't a GPU.
    """
    if device is None or device.index is None:
        device = detect_device(device)
    if device.type == "cuda":
        if device.index >= torch.cuda.device_count():
            raise ValueError(
                f"process {device.index} of this machine needs a GPU of its own, but there are "
                f"{torch.cuda.device_count()}: start fewer processes, or use device='cpu'"
            )
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _connect(device)
    global _cpu_group
    if dist.get_rank() > 0 and logging.getLogger("llama").level == logging.NOTSET:
        logging.getLogger("llama").setLevel(logging.ERROR)  # rank 0 says the rest for all
    if not model_parallel_is_initialized():
        with contextlib.redirect_stdout(io.StringIO()):  # fairscale announces its groups
            initialize_model_parallel(dist.get_world_size())
        atexit.register(_leave)
        # A rank may wait indefinitely: the heartbeat tells that others are lost, not a timeout.
        # fairscale's groups take no timeout when they are made.
        dist.distributed_c10d._set_pg_timeout(timedelta(days=365), get_model_parallel_group())
    if _cpu_group is None and dist.get_world_size() > 1:
        _cpu_group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
        heartbeat.start(_cpu_group)
    if world_size() > 1 and dist.get_backend() == "nccl" and device.type != "cuda":
        raise ValueError(
            f"the processes are connected by nccl, which is for GPUs, but the device is {device}: "
            "use device='cuda', or start again"
        )
    return world_size()


def _connect(device: torch.device) -> None:
    """Make the process group: NCCL's for several processes with GPUs, else gloo's."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:  # which torchrun sets
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        return
    backend = "nccl" if device.type == "cuda" and int(os.environ["WORLD_SIZE"]) > 1 else "gloo"
    if backend == "nccl" and not dist.is_nccl_available():
        raise ValueError(
            "several processes with GPUs need NCCL, which this PyTorch lacks (on Windows all do): "
            "start one process, use device='cpu', or call "
            "torch.distributed.init_process_group('gloo') first, which is slower"
        )
    dist.init_process_group(backend)


def _leave() -> None:
    """Leave the process groups while Python is still running.

    gloo's threads take Python's lock to release a last tensor. Where the interpreter is already
    shutting down, that ends the process with SIGABRT. NCCL waits for graphs that hold its calls.
    """
    heartbeat.stop()
    for graph in graphs:
        graph.reset()
    if dist.is_initialized():  # a script may have left on its own
        destroy_model_parallel()
        dist.destroy_process_group()


def world_size() -> int:
    """Return the number of processes that share the network."""
    if not model_parallel_is_initialized():
        raise RuntimeError(
            "no process group yet: use Llama.build, or call llama.parallel.initialize() before "
            "making a Transformer"
        )
    return int(get_model_parallel_world_size())


def local_ranks() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank() -> int:
    """Return this process's number among those that share the network."""
    return int(get_model_parallel_rank())


def print_once(*values: object, end: str = "\n") -> None:
    """Print on rank 0 alone: all ranks of a script hold the same results."""
    if rank() == 0:
        print(*values, end=end, flush=True)


_ops = torch.ops._c10d_functional  # which torch.compile can trace


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    """Return the sum of all ranks' ``x``, in the memory of ``x`` if it is contiguous."""
    if world_size() == 1:
        return x
    # A compiler takes the form that changes nothing, and saves the copy itself.
    reduce = _ops.all_reduce if torch.compiler.is_compiling() else _ops.all_reduce_
    return _ops.wait_tensor(reduce(x.contiguous(), "sum", get_model_parallel_group().group_name))


def all_gather(x: torch.Tensor) -> torch.Tensor:
    """Join all ranks' ``x`` along the last dimension."""
    if world_size() == 1:
        return x
    name, n_ranks = get_model_parallel_group().group_name, world_size()
    if torch.compiler.is_compiling():
        parts = _ops.all_gather_into_tensor(x.contiguous(), n_ranks, name)
    else:  # which gloo has for CUDA tensors too
        out = x.new_empty(n_ranks * x.shape[0], *x.shape[1:])
        parts = _ops.all_gather_into_tensor_out(x.contiguous(), n_ranks, name, out=out)
    parts = _ops.wait_tensor(parts).unflatten(0, (n_ranks, x.shape[0]))
    return parts.movedim(0, -2).flatten(-2)  # (…, n_ranks * x.shape[-1])


def can_capture() -> bool:
    """Return whether a CUDA graph can hold the collectives, if any are needed."""
    return world_size() == 1 or dist.get_backend(get_model_parallel_group()) == "nccl"


def broadcast(tensor: torch.Tensor) -> torch.Tensor:
    """Copy rank 0's values of ``tensor`` to every rank, in place."""
    if world_size() > 1:
        group = _cpu_group if tensor.is_cpu else get_model_parallel_group()
        with heartbeat.explained():
            dist.broadcast(tensor, src=0, group=group)
    return tensor


def max_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Replace each element by the largest of all ranks, in place."""
    if world_size() > 1:
        with heartbeat.explained():
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=get_model_parallel_group())
    return tensor
