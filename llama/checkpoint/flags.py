"""The flags of a checkpoint that the server, files of requests and evaluations share."""

from dataclasses import dataclass, fields
from typing import Any

from llama.checkpoint.pretrained import TINY
from llama.cli import dtype_of


@dataclass(frozen=True)
class CheckpointFlags:
    """Flags that say which checkpoint is loaded, and how.

    Args:
        ckpt_dir: a checkpoint of any format; the embedded one by default.
        tokenizer_path: its tokenizer, where the checkpoint doesn't bring its own.
        max_seq_len: tokens of a prompt and its answer together, at most.
        device: cpu, cuda or mps; the fastest available by default.
        dtype: float32, bfloat16 or float16; by default as checkpoint and device suggest.
        adapter: the directory of a LoRA adapter to merge in, or several separated by commas.
        chat_format: how dialogs are written; by default as the checkpoint says.
        chat_template: a Jinja template's text or file, in place of the checkpoint's own.
        compile: compile decoding steps.
        quantize: int8 or int4, for quantised weights; none widens those that are.
        group_size: how many weights share a scale in int4.
        kv_cache_dtype: int8 for a cache of half the size.
    """

    ckpt_dir: str = str(TINY)
    tokenizer_path: str | None = None
    max_seq_len: int = 2048
    device: str | None = None
    dtype: str | None = None
    adapter: str | tuple[str, ...] = ()
    chat_format: str | None = None
    chat_template: str | None = None
    compile: bool = False
    quantize: str | None = None
    group_size: int | None = None
    kv_cache_dtype: str | None = None

    def build_arguments(self) -> dict[str, Any]:
        """Return the arguments of ``Llama.build``."""
        given = {field.name: getattr(self, field.name) for field in fields(CheckpointFlags)}
        return given | {"dtype": dtype_of(self.dtype)}
