"""Flags that several commands and examples share.

``llama.cli`` turns the fields of a dataclass into flags. Both go to the library as they are::

    llama = Llama.build(**vars(build))
    llama.text_completion(prompts, **vars(sampling))
"""

from dataclasses import dataclass

import torch

from llama.checkpoint.pretrained import TINY


@dataclass(frozen=True)
class BuildFlags:
    """Arguments of ``Llama.build``.

    Args:
        ckpt_dir: a checkpoint of any format; the embedded one by default.
        tokenizer_path: its tokenizer, where the checkpoint doesn't bring its own.
        max_seq_len: tokens of a prompt and its answer together, at most.
        adapter: a LoRA adapter's directory, or several separated by commas.
        device: cpu, cuda or mps; the fastest available by default.
        dtype: float32, bfloat16 or float16; by default as checkpoint and device suggest.
        quantize: int8 or int4, for quantised weights; none widens those that are.
        seed: of the random numbers that tokens are sampled with.
    """

    ckpt_dir: str = str(TINY)
    tokenizer_path: str | None = None
    max_seq_len: int = 512
    adapter: str | tuple[str, ...] = ()
    device: str | None = None
    dtype: torch.dtype | None = None
    quantize: str | None = None
    seed: int = 1


@dataclass(frozen=True)
class BatchFlags(BuildFlags):
    """``BuildFlags`` of programs that process several prompts at once.

    Args:
        max_batch_size: prompts to process at once; others wait.
    """

    max_batch_size: int = 8


@dataclass(frozen=True)
class SamplingFlags:
    """Arguments of ``Llama``'s tasks.

    Args:
        temperature: 0 for the most probable token each time.
        top_p: sample from the most probable tokens whose probabilities add up to this.
        max_gen_len: tokens to generate, at most; as many as fit by default.
        top_k: sample from so many of the most probable tokens; 0 for all.
        min_p: sample from tokens at least this many times as probable as the most probable one.
        repetition_penalty: above 1 for fewer repetitions of the prompt and the answer.
        presence_penalty: above 0 for fewer repetitions of the answer.
        frequency_penalty: the same, for each time that the answer has a token.
        sampling: checkpoint for what the checkpoint's authors recommend.
    """

    temperature: float = 0.6
    top_p: float = 0.9
    max_gen_len: int | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    sampling: str | None = None
