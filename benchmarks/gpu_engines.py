"""The engines that gpu_worker.py measures: this library, transformers and vLLM, on one device.

All have random weights in bfloat16, made on the device; only this library's can be quantised. Each
has ``measure(bsz, context)``, which returns the seconds of a prefill, the tokens per second of
decoding after it, and how many positions of a sequence are filled in the mean while it decodes.
"""

import dataclasses
import os
import statistics
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch

from llama import Llama, ModelArgs, SamplingParams
from llama.checkpoint import pretrained
from llama.checkpoint.base import Checkpoint, Weights
from llama.checkpoint.rounding import make_scheme
from llama.checkpoint.sharding import form_of, full_shapes
from llama.layers.quantization import Form, Grouped

WARM, STEPS, WINDOWS = 8, 32, 3  # steps: first ones that aren't counted, then what is timed
NEW = WARM + STEPS * WINDOWS + 24  # tokens that there is room for after a prompt
FILES: dict[str, Form] = {  # the forms of most weights in quantised files
    "Q4_0": Grouped("int4", 32, has_zeros=False),
    "GPTQ": Grouped("int4", 128),
    "Q6_K": Grouped("int8", 16, has_zeros=False),
    "Q8_0": Grouped("int8", 32, has_zeros=False),
    "FP8": Grouped("float8", 0, has_zeros=False, scale_dtype=torch.float32),
}
LONG = 32768  # tokens of all prompts from which one run has to do


class Engine(Protocol):
    def measure(self, bsz: int, context: int) -> tuple[float, float, float]: ...


def prompts_of(args: ModelArgs, bsz: int, length: int, seed: int) -> list[list[int]]:
    """Return prompts whose first tokens differ, so that no cache has seen them."""
    firsts = [seed * 7919 + number * 31 for number in range(bsz)]
    return [
        [(first + i * 104729) % (args.vocab_size - 8) + 8 for i in range(length)]
        for first in firsts
    ]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, run: Callable[[], object]) -> float:
    """Return the seconds of a call, until the device has done its work."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def random_checkpoint(
    args: ModelArgs, device: torch.device, std: float = 0.02, form: Form | None = None
) -> Checkpoint:
    """Return a checkpoint without files: each weight is made on a device when it is read.

    Args:
        form: of its weights, as a quantised file has them; without it they are in bfloat16.
    """
    forms = {} if form is None else dict.fromkeys(make_scheme("int4").forms(args), form)
    shapes = full_shapes(args, forms)

    def read(name: str) -> torch.Tensor:
        stored = form_of(forms, name)
        if stored is not None:
            part = name.rpartition(".")[2]
            dtype = stored.dtypes()[part]
            if part != "weight":
                return torch.full(shapes[name], std / 8, dtype=dtype, device=device)
            # Bits that are a finite number in every form.
            codes = torch.randint(64, shapes[name], dtype=torch.uint8, device=device)
            return codes.view(dtype)
        if name.endswith("norm.weight"):
            return torch.ones(shapes[name], dtype=torch.bfloat16, device=device)
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        weight = torch.empty(shapes[name], dtype=torch.bfloat16, device=device)
        return weight.normal_(std=std, generator=generator)

    unset = ("max_seq_len", "max_batch_size")
    params = {k: v for k, v in dataclasses.asdict(args).items() if k not in unset and v is not None}
    files: dict[str, Path | bytes] = {"tokenizer.model": pretrained.TINY / "tokenizer.model"}
    return Checkpoint(
        "random weights",
        params,
        [Weights(shapes, read)],
        ["random weights"],
        torch.bfloat16,
        files,
        forms=forms,
    )


def build(
    args: ModelArgs,
    device: torch.device,
    std: float = 0.02,
    form: Form | None = None,
    **options: Any,
) -> Llama:
    """Return ``Llama.build(...)`` of random weights, which never stops a text.

    They are in bfloat16, or in a form that quantised files have.
    """
    # What is to be quantised or packed is read from the CPU, as files are.
    source = torch.device("cpu") if form or options.get("quantize") else device
    checkpoint = random_checkpoint(args, device, std, form)
    if source != device:
        made = checkpoint.parts[0]
        checkpoint.parts = [Weights(made.shapes, lambda name: made[name].to(source))]
    with mock.patch.object(pretrained, "open_checkpoint", lambda path: checkpoint):
        llama = Llama.build(device=device, dtype=torch.bfloat16, **options)
    llama.tokenizer.stop_ids = frozenset()
    return llama


class Ours:
    """This library, through its engine."""

    def __init__(self, llama: Llama, device: torch.device):
        self._llama, self._engine, self._device = llama, llama.engine, device

    def measure(self, bsz: int, context: int) -> tuple[float, float, float]:
        self._engine.cancel_all()  # those of a measurement that failed
        args = self._llama.model.params
        n_runs = 1 if bsz * context > LONG else 4  # the first of which sets things up
        seconds = []
        for seed in range(n_runs):
            prompts = prompts_of(args, bsz, context, seed)
            self._llama.reset_cache()
            seconds.append(timed(self._device, partial(self._prefill, prompts)))
        tokens_per_s, filled = self._decode(prompts)  # of which the cache still holds the last ones
        return statistics.median(seconds[1:] or seconds), tokens_per_s, filled

    def _prefill(self, prompts: list[list[int]]) -> None:
        self._engine.submit(self._sequences(prompts, 1))
        while self._engine.n_running or self._engine.n_waiting:
            self._engine.step()

    def _decode(self, prompts: list[list[int]]) -> tuple[float, float]:
        sequences = self._sequences(prompts, NEW)

        def count() -> int:
            return sum(len(sequence.tokens) for sequence in sequences)

        def steps(number: int) -> None:
            for _ in range(number):
                self._engine.step()

        self._engine.submit(sequences)
        while not all(sequence.tokens for sequence in sequences):
            steps(1)
        steps(WARM)
        counts, rates = [count()], []
        for _ in range(WINDOWS):
            seconds = timed(self._device, lambda: steps(STEPS))
            counts.append(count())
            rates.append((counts[-1] - counts[-2]) / seconds)
        if any(sequence.finish_reason for sequence in sequences):
            raise RuntimeError("a sequence ended while it was timed: give NEW more room")
        self._engine.cancel_all()
        filled = len(prompts[0]) + (counts[0] + counts[-1]) / 2 / len(prompts)
        return statistics.median(rates), filled

    def _sequences(self, prompts: list[list[int]], length: int) -> list[Any]:
        params = SamplingParams(temperature=0, max_gen_len=length)
        return self._llama.tasks.generate(prompts, params, "ids")


class Clock:
    """A streamer of transformers that notes when tokens come: the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def hf_config(args: ModelArgs, longest: int) -> Any:
    """Return transformers' configuration of a shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=args.dim,
        intermediate_size=args.hidden_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.kv_heads,
        vocab_size=args.vocab_size,
        max_position_embeddings=longest + NEW,
        rms_norm_eps=args.norm_eps,
        architectures=["LlamaForCausalLM"],
    )


class Transformers:
    """transformers' ``generate`` with SDPA.

    Args:
        cache: options of ``generate``: a static cache makes it compile its steps on CUDA.
    """

    def __init__(self, args: ModelArgs, longest: int, device: torch.device, **cache: Any):
        from transformers import AutoModelForCausalLM

        with torch.device(device):
            self._model = AutoModelForCausalLM.from_config(
                hf_config(args, longest), dtype=torch.bfloat16, attn_implementation="sdpa"
            ).eval()
        self._model.generation_config.eos_token_id = None
        self._args, self._device, self._cache = args, device, cache

    def measure(self, bsz: int, context: int) -> tuple[float, float, float]:
        n_runs = 1 if bsz * context > LONG and not self._cache else 3
        prefills, rates = [], []
        n_new = WARM + STEPS + 1
        for seed in range(n_runs):
            prompts = prompts_of(self._args, bsz, context, seed)
            tokens = torch.tensor(prompts, device=self._device)
            clock = Clock()
            synchronize(self._device)
            start = time.perf_counter()
            self._model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=n_new,
                do_sample=False,
                pad_token_id=0,
                streamer=clock,
                **self._cache,
            )
            # The prompt, then n_new tokens of each sequence.
            prefills.append(clock.times[1] - start)
            rates.append(bsz * STEPS / (clock.times[n_new] - clock.times[n_new - STEPS]))
        filled = context + WARM + STEPS / 2
        counted = slice(n_runs > 1, None)  # without the first, which sets things up
        return statistics.median(prefills[counted]), statistics.median(rates[counted]), filled


class VLLM:
    """vLLM's offline engine, on weights that it makes up (``load_format="dummy"``)."""

    def __init__(self, args: ModelArgs, longest: int, directory: str):
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM

        hf_config(args, longest).save_pretrained(directory)
        self._args = args
        self._llm = LLM(
            model=directory,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=longest + NEW,
            enable_prefix_caching=False,
        )

    def measure(self, bsz: int, context: int) -> tuple[float, float, float]:
        from vllm import SamplingParams as Params

        n_runs = 1 if bsz * context > LONG else 4
        firsts, rates = [], []
        for seed in range(n_runs):
            prompts = prompts_of(self._args, bsz, context, seed)
            inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
            seconds = []
            for length in (1, 1 + STEPS * WINDOWS):
                params = Params(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
                start = time.perf_counter()
                self._llm.generate(inputs, params, use_tqdm=False)
                seconds.append(time.perf_counter() - start)
            firsts.append(seconds[0])
            rates.append(bsz * STEPS * WINDOWS / (seconds[1] - seconds[0]))
        counted = slice(n_runs > 1, None)
        filled = context + STEPS * WINDOWS / 2
        return statistics.median(firsts[counted]), statistics.median(rates[counted]), filled
