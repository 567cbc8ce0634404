"""A checkpoint of any format as a model with its tokenizer and chat format."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llama import parallel
from llama.adapters import Adapter
from llama.chat.formats import choose_chat
from llama.chat.layout import ChatFormat
from llama.checkpoint import apply_adapter, open_checkpoint
from llama.checkpoint.adapters import read_adapter
from llama.checkpoint.backend import check_compiler
from llama.checkpoint.base import (
    chosen_scheme,
    quantized,
    replace_tokenizer,
    text_files,
    vocabulary_size,
    widened,
)
from llama.checkpoint.load import load
from llama.checkpoint.params import make_args
from llama.checkpoint.recognition import clear_errors, explain_texts
from llama.checkpoint.sharding import quantized_count
from llama.cli import progress
from llama.errors import LARGEST, short
from llama.layers.capability import Capability
from llama.logits.recommended import Recommended, recommended_sampling
from llama.model import Transformer
from llama.tokenizer import BaseTokenizer
from llama.tokenizers import load_tokenizer, with_template

logger = logging.getLogger(__name__)

TINY = Path(__file__).parents[1] / "tiny"
"""The checkpoint that comes with the package."""


@dataclass(frozen=True)
class LoadConfig:
    """A checkpoint to load, and the way to load it; see ``Llama.build``."""

    ckpt_dir: str | Path = TINY
    tokenizer_path: str | Path | None = None
    max_seq_len: int = 512
    max_batch_size: int = 8
    model_parallel_size: int | None = None
    device: str | torch.device | None = None
    dtype: torch.dtype | None = None
    adapters: Sequence[str | Path] = ()
    chat_format: str | None = None
    quantize: str | None = None
    group_size: int | None = None
    kv_cache_dtype: str | None = None
    chat_template: str | Path | None = None
    tool_format: str | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.ckpt_dir, str | Path):
            raise TypeError(f"ckpt_dir is {self.ckpt_dir!r}: give a path")
        if self.dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(
                f"dtype is {self.dtype!r}: give torch.float32, torch.bfloat16 or torch.float16"
            )
        if self.quantize is None and self.group_size is not None:
            raise ValueError("group_size is for quantize='int4': say so, or leave it out")
        if self.kv_cache_dtype not in (None, "int8"):
            raise ValueError(f"kv_cache_dtype is {self.kv_cache_dtype!r}: expected None or 'int8'")


def fit_tokenizer(tokenizer: BaseTokenizer, vocab_size: int, source: str) -> None:
    """Cut a tokenizer's vocabulary to the ids that a network knows; prompts can't have others.

    Raises:
        ValueError: so few are left that it is another model's tokenizer.
    """
    n_words = tokenizer.n_words
    if n_words <= vocab_size:
        return
    found = f"the tokenizer has {n_words} pieces, but {source} gives the model a vocabulary of "
    if n_words > 2 * vocab_size or tokenizer.bos_id >= vocab_size:
        raise ValueError(f"{found}{vocab_size}: this is another model's tokenizer")
    logger.warning("%s%d: text that needs the others is refused", found, vocab_size)
    tokenizer.n_words = vocab_size


def load_model(
    config: LoadConfig,
) -> tuple[Transformer, BaseTokenizer, ChatFormat, Recommended]:
    """Load a checkpoint, this rank's part of it.

    Raises:
        As ``Llama.build``.
    """
    device = parallel.detect_device(config.device)
    n_ranks = parallel.initialize(device)
    if config.model_parallel_size not in (None, n_ranks):
        raise ValueError(
            f"model_parallel_size is {config.model_parallel_size!r}, but the number of processes "
            f"is {n_ranks}: leave it out, or start with "
            f"torchrun --nproc_per_node {config.model_parallel_size}"
        )
    if config.compile:
        check_compiler(Capability.of(device))
    ckpt_dir = Path(config.ckpt_dir)
    source = open_checkpoint(ckpt_dir)
    for adapter in config.adapters:
        source = apply_adapter(source, Path(adapter))
    if config.tokenizer_path is not None:
        source = replace_tokenizer(source, Path(config.tokenizer_path))
    files = source.files
    if config.chat_template is not None:
        if config.chat_format is not None:
            raise ValueError("chat_template and chat_format are both given: choose one of them")
        files = with_template(files, config.chat_template)
    rows = vocabulary_size(source)
    with clear_errors(explain_texts, files):
        tokenizer = load_tokenizer(files, rows, ckpt_dir)
    chat = choose_chat(config.chat_format, files, tokenizer, config.tool_format)
    args = make_args(source.params, source.source, rows, config.max_seq_len, config.max_batch_size)
    fit_tokenizer(tokenizer, args.vocab_size, source.source)
    if config.quantize == "none":
        source = widened(source, args)
    elif config.quantize is not None:
        scheme = chosen_scheme(source, config.quantize, config.group_size)
        show = progress(quantized_count(args, scheme.forms(args)), "quantising", "weights")
        source = quantized(source, args, scheme, show, device)
    int8_cache = config.kv_cache_dtype == "int8"
    model = load(source, args, device, config.dtype, int8_cache, config.compile)
    return model, tokenizer, chat, recommended_sampling(source.files, ckpt_dir)


def load_adapter(
    name: str,
    directory: str | Path,
    model: Transformer,
    tokenizer: BaseTokenizer,
    scale: float = 1.0,
) -> Adapter:
    """Load an adapter for sequences that choose it by a name; see ``Llama.load_adapter``.

    Its sequences have the base's tokenizer: a warning tells if the adapter brings another one.

    Raises:
        TypeError: the name or the scale is none.
        FileNotFoundError, ImportError, ValueError: see ``read_adapter``.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"the adapter's name is {name!r}: give a string that calls choose it by")
    is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not is_number or not abs(scale) <= LARGEST:  # a NaN isn't either
        found = short(scale)
        raise TypeError(f"scale is {found}: give a number, 1 for the adapter as it was trained")
    directory = Path(directory)
    adapter = read_adapter(name, directory, model, scale)
    files = text_files(directory)
    if files.keys() & {"tokenizer.model", "tokenizer.json"}:
        rows = model.params.vocab_size
        try:
            own = _pieces(load_tokenizer(files, rows, directory), rows)
        except (ValueError, ImportError) as error:
            logger.warning("the tokenizer in %s is ignored: it can't be read: %s", directory, error)
            return adapter
        if own != _pieces(tokenizer, rows):
            logger.warning(
                "%s has another tokenizer than the model, which is ignored: merge the adapter to "
                "use it (adapter= of Llama.build)",
                directory,
            )
    return adapter


def _pieces(tokenizer: BaseTokenizer, limit: int) -> list[str]:
    return [tokenizer.token_piece(i) for i in range(min(tokenizer.n_words, limit))]
