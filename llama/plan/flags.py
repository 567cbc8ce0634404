"""The flags of ``python -m llama.plan``."""

from dataclasses import dataclass, replace

import torch

from llama.plan.costs import DEVICES, GB, Machines


@dataclass(frozen=True)
class MachineFlags:
    """The machines to plan for.

    Args:
        gpus: GPUs of each machine.
        gpu: a100, h100, h200, l4, l40s, rtx3090 or rtx4090; cpu for machines without.
        nodes: machines.
        memory: GB of a GPU's memory, or a machine's; by default its data sheet's, and 16 of a cpu.
        bandwidth: GB/s of this memory; by default the data sheet's, and 50 of a cpu.
        tflops: 10^12 operations per second of large products in bfloat16; by default the data
            sheet's, and 0.5 of a cpu.
        network: GB/s of a machine to the others, in each direction.
        price: of a GPU for an hour, or of a machine for cpu, to print what tokens cost.
    """

    gpus: int = 1
    gpu: str = "h100"
    nodes: int = 1
    memory: float | None = None
    bandwidth: float | None = None
    tflops: float | None = None
    network: float = 50.0
    price: float | None = None

    def machines(self) -> Machines:
        """Return the machines.

        Raises:
            ValueError: there is no such GPU, or a number isn't above 0.
        """
        device = DEVICES.get(self.gpu.lower().replace(" ", "").replace("-", ""))
        if device is None:
            raise ValueError(f"gpu is {self.gpu!r}: expected one of {', '.join(DEVICES)}")
        for name, value in vars(self).items():
            if not isinstance(value, str) and value is not None and not value > 0:
                raise ValueError(f"{name} is {value}: expected a number above 0")
        if device.kind == "cpu" and self.gpus > 1:
            raise ValueError(
                f"gpus is {self.gpus}, but the processes of one machine share its memory: "
                "leave gpus out, and give the number of machines as nodes"
            )
        device = replace(
            device,
            memory=device.memory if self.memory is None else self.memory * GB,
            bandwidth=device.bandwidth if self.bandwidth is None else self.bandwidth * 1e9,
            flops=device.flops if self.tflops is None else self.tflops * 1e12,
        )
        return Machines(device, self.gpus, self.nodes, self.network * 1e9)


@dataclass(frozen=True)
class WorkFlags:
    """The work to plan for, and how the checkpoint is loaded.

    Args:
        context: tokens of a prompt and its answer together, such as 4096 or 4k.
        batch: sequences at a time, on all machines together.
        dtype: float32, bfloat16 or float16; by default as checkpoint and device suggest.
        quantize: int8 or int4, for quantised weights; none widens those that are.
        group_size: how many weights share a scale in int4.
        kv_cache_dtype: int8 for a cache of half the size.
        compile: plan for compiled decoding steps.
    """

    context: str = "4k"
    batch: int = 1
    dtype: torch.dtype | None = None
    quantize: str | None = None
    group_size: int | None = None
    kv_cache_dtype: str | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}: expected a number above 0")

    @property
    def n_context(self) -> int:
        """The number that ``context`` says; ``ValueError`` if it says none."""
        text = self.context.lower()
        digits, factor = (text[:-1], 1024) if text.endswith("k") else (text, 1)
        if not (digits.isascii() and digits.isdigit() and int(digits) > 0):
            raise ValueError(f"context is {self.context!r}: give a number, such as 4096 or 4k")
        return int(digits) * factor
