"""Memory and speed of a checkpoint on machines that needn't be at hand: ``python -m llama.plan``.

Sizes come from the checkpoint's header, speeds from the model in ``costs.py``: nothing is loaded,
and nothing is measured.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from llama.checkpoint.memory import Needs, Network, memory_needs
from llama.checkpoint.pretrained import TINY
from llama.checkpoint.rounding import make_scheme
from llama.checkpoint.sharding import check_model_parallel_size, parameter_count
from llama.errors import printable
from llama.layers.capability import Capability
from llama.plan.costs import Cost, Device, Machines, Pass, cost, prompt_cost
from llama.plan.flags import MachineFlags, WorkFlags
from llama.plan.networks import open_network

_CAUSES = {
    "weights": "reading weights",
    "cache": "reading the cache",
    "arithmetic": "arithmetic",
    "kernels": "small kernels",
    "all_reduces": "all-reduces",
}


class Division(NamedTuple):
    """One way to divide machines into copies of a network.

    Args:
        network: a copy, with a cache for its sequences.
        ranks: GPUs of a copy, or machines without one.
        copies: their number.
        needs: the memory of each rank.
        step: a decoding step of a copy's sequences at the end of their contexts.
        fits: whether each rank has this memory.
    """

    network: Network
    ranks: int
    copies: int
    needs: Needs
    step: Cost
    fits: bool


def main(ckpt_dir: str = str(TINY), *, machine: MachineFlags, work: WorkFlags) -> None:
    """Print which machines a checkpoint fits, and how fast it is there, by arithmetic alone.

    Only the checkpoint's header is read. docs/scaling.md says how speeds are computed, and by how
    much they differ from measured ones.

    Args:
        ckpt_dir: a checkpoint of any format, or the size of a published one: 7B, 13B, 34B and 70B
            of Llama 2, 1B, 3B, 8B and 405B of Llama 3; the embedded one by default.
    """
    machines = machine.machines()
    network = open_network(ckpt_dir, machines.device.kind, work)
    print("\n".join(report(printable(ckpt_dir, 200), network, machines, work, machine.price)))


def divisions(network: Network, machines: Machines, work: WorkFlags) -> list[Division]:
    """Return all ways to divide machines, from small copies to large ones."""
    found = []
    for ranks in machines.group_sizes():
        with contextlib.suppress(ValueError):  # the network can't be divided so
            check_model_parallel_size(network.args, ranks, network.forms)
            copies = machines.n_devices // ranks
            bsz = -(-work.batch // copies)
            copy = replace(network, args=replace(network.args, max_batch_size=bsz))
            step = cost(copy, machines, ranks, Pass.step(bsz, work.n_context), work.compile)
            needs = needs_of(copy, machines.device, ranks)
            fits = needs.total <= machines.device.memory
            found.append(Division(copy, ranks, copies, needs, step, fits))
    return found


def needs_of(network: Network, device: Device, ranks: int) -> Needs:
    """Return the memory that each rank needs, as loading computes it."""
    capability = Capability(device.kind, varlen_dtypes=(torch.float16, torch.bfloat16))
    return memory_needs(network, ranks, capability, int(device.memory))


def report(
    name: str, network: Network, machines: Machines, work: WorkFlags, price: float | None
) -> Iterator[str]:
    """Yield the lines that the command prints."""
    device = machines.device
    dtype = str(network.dtype).removeprefix("torch.")
    kinds = ", ".join(dict.fromkeys(form.name for form in network.forms.values()))
    yield (
        f"{name}: {parameter_count(network.args):,} parameters in {dtype}"
        + f" but for {kinds}" * bool(kinds)
    )
    yield (
        f"{machines.n_devices} x {device.name}: {device.memory / 1e9:.1f} GB, "
        f"{device.bandwidth / 1e9:,.0f} GB/s, {device.flops / 1e12:,.1f} Tflop/s each"
    )
    yield f"sequences at a time: {work.batch}, of {work.n_context:,} tokens each"
    yield ""
    found = divisions(network, machines, work)
    yield "| a copy on | copies | weights | cache | workspace | fits | tokens/s | each | limit |"
    yield "|---|---|---|---|---|---|---|---|---|"
    yield from (_row(each, work.batch) for each in found)
    yield ""
    fitting = [each for each in found if each.fits]
    if fitting:
        yield from _details(min(fitting, key=lambda each: each.step.seconds), machines, work, price)
    else:
        yield from _advice(network, device)


def _row(division: Division, batch: int) -> str:
    needs, step = division.needs, division.step
    sizes = (f"{size / 1e9:.2f} GB" for size in needs[:3])
    cells = [division.ranks, division.copies, *sizes, "yes" if division.fits else "no"]
    if division.fits:
        cells += [f"{batch / step.seconds:,.0f}", f"{1 / step.seconds:.1f}", _CAUSES[step.limit]]
    else:
        cells += ["", "", "memory"]
    return "| " + " | ".join(map(str, cells)) + " |"


def _details(
    best: Division, machines: Machines, work: WorkFlags, price: float | None
) -> Iterator[str]:
    """Yield the lines about the fastest division."""
    args, needs, length = best.network.args, best.needs, work.n_context
    prompt = prompt_cost(
        best.network, machines, best.ranks, length, needs.prefill_tokens, work.compile
    )
    yield f"fastest: a copy on {best.ranks} of {machines.n_devices}"
    yield f"a step of {args.max_batch_size}: {_seconds(best.step)}"
    yield f"a prompt of {length:,}: {_seconds(prompt)}"
    positions = _room(best.network, needs, machines.device)
    yield (
        f"room for {positions // length * best.copies} sequences of {length:,} tokens, "
        f"or for {work.batch} of {positions // args.max_batch_size:,}"
    )
    unit = "GPU" if machines.device.kind == "cuda" else "machine"
    hours = 1e6 / 3600 * machines.n_devices * best.step.seconds / work.batch
    prompt_hours = 1e6 / 3600 * best.ranks * prompt.seconds / length
    yield (
        f"a million new tokens: {hours:.2f} {unit} hours"
        + (f", {hours * price:.2f} at {price:.2f} an hour" if price else "")
    )
    yield (
        f"a million of prompts: {prompt_hours:.2f} {unit} hours"
        + (f", {prompt_hours * price:.2f}" if price else "")
    )


def _room(network: Network, needs: Needs, device: Device) -> int:
    """Return how many positions a cache can have at most, beside weights and workspace."""
    left = int(device.memory) - needs.weights - needs.workspace
    return left * network.args.max_seq_len * network.args.max_batch_size // needs.cache


def _seconds(cost: Cost) -> str:
    """Return the time of a pass and its causes."""
    unit, scale, digits = ("ms", 1e3, 1) if cost.seconds < 1 else ("s", 1, 2)
    causes = (
        f"{_CAUSES[name]} {scale * seconds:.{digits}f}"
        for name, seconds in cost._asdict().items()
        if seconds > 0
    )
    return f"{scale * cost.seconds:.{digits}f} {unit}: {', '.join(causes)}"


def _advice(network: Network, device: Device) -> Iterator[str]:
    """Yield on how many devices a copy fits, and for how many sequences it has room there."""
    length = network.args.max_seq_len
    forms = {"as it is": network.forms}
    for kind in ("int8", "int4"):
        forms[f"with --quantize {kind}"] = make_scheme(kind).forms(network.args)
    yield "nothing fits; what would"
    for how, some in forms.items():
        copy = replace(network, forms=some)
        fewest = _fewest(copy, device)
        if fewest is not None:
            n = _room(copy, needs_of(copy, device, fewest), device) // length
            yield f"- {how}, on {fewest} x {device.name}: {n} sequences of {length:,} tokens"


def _fewest(network: Network, device: Device) -> int | None:
    """Return the fewest devices that have the memory for a copy; None if no number has."""
    for ranks in range(1, network.args.n_heads + 1):
        with contextlib.suppress(ValueError):
            check_model_parallel_size(network.args, ranks, network.forms)
            if needs_of(network, device, ranks).total <= device.memory:
                return ranks
    return None
