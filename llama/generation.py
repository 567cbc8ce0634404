"""Generation: prompts in, the model's continuations out, whole or token by token."""

from collections.abc import Generator, Sequence
from pathlib import Path

import torch

from llama import parallel
from llama.args import make_args
from llama.chat.formats import FORMATS, choose_chat
from llama.chat.prompts import (
    Dialog,
    Message,
)
from llama.checkpoint import apply_adapter, open_checkpoint
from llama.checkpoint.base import quantized, replace_tokenizer, vocabulary_size
from llama.checkpoint.load import load
from llama.checkpoint.sharding import quantized_count
from llama.cli import progress
from llama.compilation import compile_decoding
from llama.errors import checked_list
from llama.guards import Gate, judged
from llama.layers.quantization import make_scheme
from llama.predictions import (
    ChatPrediction,
    CompletionPrediction,
    InfillingPrediction,
)
from llama.reading import ReadingLlama
from llama.tokenizers import load_tokenizer

TINY = Path(__file__).parent / "tiny"
"""The checkpoint that comes with the package."""


class Llama(ReadingLlama):
    """A model and its tokenizer. Calls from several threads wait for each other."""

    @staticmethod
    def build(
        ckpt_dir: str | Path = TINY,
        tokenizer_path: str | Path | None = None,
        max_seq_len: int = 512,
        max_batch_size: int = 8,
        model_parallel_size: int | None = None,
        seed: int = 1,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        *,
        adapter: str | Path | Sequence[str | Path] = (),
        chat_format: str | None = None,
        compile: bool = False,
        quantize: str | None = None,
        group_size: int | None = None,
        kv_cache_dtype: str | None = None,
    ) -> "Llama":
        """Load a checkpoint, in one process or with the others that ``torchrun`` started.

        Args:
            ckpt_dir: a directory in Meta's or Hugging Face's layout, a GGUF file or one of
                llama2.c; the embedded checkpoint by default.
            tokenizer_path: a ``tokenizer.model`` or ``tokenizer.json``, where the checkpoint
                doesn't bring its own.
            max_seq_len: positions in the cache: prompt and generated tokens together.
            max_batch_size: rows in the cache; more prompts are worked off in turn.
            model_parallel_size: where given, must equal the number of processes.
            seed: what later calls draw their seeds from; the same in all processes.
            device: where to run; CUDA, else Apple's MPS, else the CPU by default.
            dtype: what to compute in; by default what the checkpoint and the device suggest.
            adapter: a directory with a LoRA adapter to merge in, or several in order.
            chat_format: how dialogs are written, one of ``llama.chat.formats.FORMATS``; by default
                as the checkpoint's own template says, else as Meta's models were trained.
            compile: whether to compile decoding steps (CUDA and CPU), which needs Triton or a C++
                compiler and takes a while; the log tells how long.
            quantize: "int8" or "int4": weights of 8 or about 4.5 bits. A checkpoint that
                ``llama.convert`` has quantised needs no saying so, and loads quicker.
            group_size: how many weights share a scale in int4: 32, 64 (by default), 128 or 256.
            kv_cache_dtype: "int8" halves the cache's memory, and makes steps after a long text
                slower; by default it is as exact as ``dtype``.

        Raises:
            FileNotFoundError: the directory, a weight file or the tokenizer is missing.
            ImportError: the checkpoint's format needs a package that isn't installed.
            MemoryError: weights and cache are more than the machine has.
            RuntimeError: PyTorch can't compile here.
            ValueError: a file is malformed, or files, processes and arguments don't fit together.
        """
        if not isinstance(ckpt_dir, str | Path):
            raise TypeError(f"ckpt_dir is {ckpt_dir!r}: give a path")
        ckpt_dir = Path(ckpt_dir)
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(
                f"dtype is {dtype!r}: give torch.float32, torch.bfloat16 or torch.float16"
            )
        torch_device = parallel.detect_device(device)
        ranks = parallel.initialize(torch_device)
        if model_parallel_size not in (None, ranks):
            raise ValueError(
                f"model_parallel_size is {model_parallel_size!r}, but the number of processes is "
                f"{ranks}: leave it out, or start with "
                f"torchrun --nproc_per_node {model_parallel_size}"
            )
        source = open_checkpoint(ckpt_dir)
        for directory in [adapter] if isinstance(adapter, str | Path) else adapter:
            source = apply_adapter(source, Path(directory))
        if tokenizer_path is not None:
            source = replace_tokenizer(source, Path(tokenizer_path))
        vocabulary = vocabulary_size(source)
        tokenizer = load_tokenizer(source.files, vocabulary, ckpt_dir)
        chat = choose_chat(chat_format, source.files, tokenizer)
        n_words = tokenizer.n_words
        args = make_args(source.params, source.source, n_words, max_seq_len, max_batch_size)
        if quantize is not None:
            scheme = make_scheme(quantize, group_size, source.scheme)
            tell = progress(quantized_count(args, scheme), "quantising", "weights")
            source = quantized(source, args, scheme, tell)
        elif group_size is not None:
            raise ValueError("group_size is for quantize='int4': say so, or leave it out")
        if kv_cache_dtype not in (None, "int8"):
            raise ValueError(f"kv_cache_dtype is {kv_cache_dtype!r}: expected None or 'int8'")
        model = load(source, args, torch_device, dtype, kv_cache_dtype == "int8")
        if compile:
            compile_decoding(model)
        return Llama(model, tokenizer, seed, chat)

    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        stop_token: int | None = None,
        *,
        stop: Sequence[str] = (),
        seed: int | None = None,
        prompt_lookup_num_tokens: int = 0,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Continue prompts of token ids.

        Args:
            prompt_tokens: the prompts, of any lengths from 1 to ``max_seq_len``.
            max_gen_len: new tokens at most; the cache may allow a row fewer.
            temperature: 0 takes the likeliest token each time.
            top_p: probability mass that tokens are drawn from.
            logprobs: whether to give the tokens' log-probabilities (untempered).
            echo: whether to give the prompt too; its first token has the log-probability 0.0.
            stop_token: an id that ends a row, besides the end of sequence.
            stop: strings that end a row, looked for in the text of its new tokens.
            seed: makes the draws repeatable; row i then draws alike in any company.
            prompt_lookup_num_tokens: how many tokens are guessed at most from what a row's text
                says already, and checked in one pass: quicker where text repeats itself, and in
                float32 with the same result. 10 suits edits of code; 0 guesses none.

        Returns:
            The rows' tokens, without what ended them, and their log-probabilities or None.

        Raises:
            TypeError, ValueError: an argument is wrong, or a prompt doesn't fit.
            RuntimeError: the logits aren't finite, or a second thread calls on several ranks.
        """
        if not isinstance(stop_token, int | None):
            raise TypeError(f"stop_token is {stop_token!r}: give one token id")
        request = self._request(temperature, top_p, logprobs, echo, [stop_token], bool(stop))
        rows = self._rows(
            prompt_tokens, max_gen_len, seed, self.tokenizer.decode, stop, prompt_lookup_num_tokens
        )
        self._run_all(rows, request)
        tokens = [row.prompt * request.echo + row.tokens for row in rows]
        if not logprobs:
            return tokens, None
        return tokens, [row.prompt_logprobs * request.echo + row.logprobs for row in rows]

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        *,
        stop: Sequence[str] = (),
        seed: int | None = None,
        prompt_lookup_num_tokens: int = 0,
    ) -> list[CompletionPrediction]:
        """Continue texts. Arguments as in ``generate``; None generates to the cache's end.

        Returns:
            For each prompt ``{"generation": text}``, with ``logprobs`` also ``tokens`` (pieces)
            and ``logprobs``.
        """
        rows, request = self.text_rows(
            prompts,
            temperature,
            top_p,
            max_gen_len,
            logprobs,
            echo,
            stop,
            seed,
            prompt_lookup_num_tokens,
        )
        self._run_all(rows, request)
        predictions = []
        for row in rows:
            text = self.tokenizer.decode(row.prompt) * request.echo + row.text.text
            prediction = CompletionPrediction(generation=text)
            predictions.append(self._with_scores(prediction, row, request))
        return predictions

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        *,
        stop: Sequence[str] = (),
        seed: int | None = None,
        prompt_lookup_num_tokens: int = 0,
    ) -> list[ChatPrediction]:
        """Answer dialogs. Arguments as in ``text_completion``.

        Returns:
            For each dialog ``{"generation": {"role": "assistant", "content": text}}``, with
            ``logprobs`` also ``tokens`` (pieces) and ``logprobs``. A dialog whose messages contain
            the format's own tags is answered with an error text, and one that a guard refuses with
            its reason.

        Raises:
            ValueError: a dialog is not well formed (``llama.chat.prompts.check_dialog``), or as in
                ``generate``.
        """
        dialogs = list(checked_list(dialogs, "dialogs"))
        rows, request = self.chat_rows(
            dialogs, temperature, top_p, max_gen_len, logprobs, stop, seed, prompt_lookup_num_tokens
        )
        refusals = [self._refusal(dialog) for dialog in dialogs]
        run = [row for row, refused in zip(rows, refusals, strict=True) if refused is None]
        self._run_all(run, request)
        predictions = []
        for dialog, row, refused in zip(dialogs, rows, refusals, strict=True):
            text = self._judge(dialog, row) if refused is None else refused
            answer = Message(role="assistant", content=text)
            if self.chat is FORMATS["turn-based"]:
                answer["destination"] = "user"
            prediction = ChatPrediction(generation=answer)
            predictions.append(self._with_scores(prediction, row, request))
        return predictions

    def text_infilling(
        self,
        prefixes: Sequence[str],
        suffixes: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        suffix_first: bool = False,
        *,
        stop: Sequence[str] = (),
        seed: int | None = None,
        prompt_lookup_num_tokens: int = 0,
    ) -> list[InfillingPrediction]:
        """Fill in what is missing between prefixes and suffixes. Arguments as in
        ``text_completion``; ``suffix_first`` puts the suffix in front in the prompt.

        Returns:
            For each pair ``{"generation": middle, "full_text": prefix + middle + suffix}``, with
            ``logprobs`` also ``tokens`` (pieces) and ``logprobs``.

        Raises:
            ValueError: the model wasn't trained for infilling, or as in ``generate``.
        """
        rows, request = self.infilling_rows(
            prefixes,
            suffixes,
            temperature,
            top_p,
            max_gen_len,
            logprobs,
            suffix_first,
            stop,
            seed,
            prompt_lookup_num_tokens,
        )
        self._run_all(rows, request)
        predictions = []
        for row, prefix, suffix in zip(rows, prefixes, suffixes, strict=True):
            middle = row.text.text
            prediction = InfillingPrediction(generation=middle, full_text=prefix + middle + suffix)
            predictions.append(self._with_scores(prediction, row, request))
        return predictions

    def text_completion_stream(
        self,
        prompt: str,
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        *,
        stop: Sequence[str] = (),
        seed: int | None = None,
        prompt_lookup_num_tokens: int = 0,
    ) -> Generator[str, None, None]:
        """``text_completion`` of one prompt, piece by piece: joined, they are the same text.

        Until it is exhausted or closed, other threads wait; another call of the same thread takes
        the model over, and the iterator then raises RuntimeError.
        """
        rows, request = self.text_rows(
            [prompt],
            temperature,
            top_p,
            max_gen_len,
            stop=stop,
            seed=seed,
            prompt_lookup_num_tokens=prompt_lookup_num_tokens,
        )
        return self._stream(rows, request)

    def chat_completion_stream(
        self,
        dialog: Dialog,
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        *,
        stop: Sequence[str] = (),
        seed: int | None = None,
        prompt_lookup_num_tokens: int = 0,
    ) -> Generator[str, None, None]:
        """``chat_completion`` of one dialog, piece by piece, as in ``text_completion_stream``:
        joined, they are the answer's content. With an ``output_guard``, text is held back until it
        has been judged."""
        rows, request = self.chat_rows(
            [dialog],
            temperature,
            top_p,
            max_gen_len,
            stop=stop,
            seed=seed,
            prompt_lookup_num_tokens=prompt_lookup_num_tokens,
        )
        refused = self._refusal(dialog)
        if refused is not None:
            return (text for text in [refused])
        pieces = self._stream(rows, request)
        if self.output_guard is None:
            return pieces
        return judged(pieces, Gate(dialog, self.output_guard))

    def text_infilling_stream(
        self,
        prefix: str,
        suffix: str,
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        suffix_first: bool = False,
        *,
        stop: Sequence[str] = (),
        seed: int | None = None,
        prompt_lookup_num_tokens: int = 0,
    ) -> Generator[str, None, None]:
        """``text_infilling`` of one pair, piece by piece, as in ``text_completion_stream``: joined,
        they are the middle."""
        rows, request = self.infilling_rows(
            [prefix],
            [suffix],
            temperature,
            top_p,
            max_gen_len,
            suffix_first=suffix_first,
            stop=stop,
            seed=seed,
            prompt_lookup_num_tokens=prompt_lookup_num_tokens,
        )
        return self._stream(rows, request)
