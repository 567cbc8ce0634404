"""Generation: prompts in, the model's continuations out, whole or token by token."""

import random
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llama import checkpoint, parallel
from llama.decoding import Request, Row, checked_list, make_rows, run
from llama.files import find_tokenizer, open_meta
from llama.model import Transformer
from llama.params import make_args
from llama.predictions import ChatPrediction, CompletionPrediction, InfillingPrediction
from llama.prompts import (
    UNSAFE_ERROR,
    Dialog,
    Message,
    check_dialog,
    dialog_prompt_tokens,
    has_special_tags,
    infilling_prompt_tokens,
)
from llama.tokenizer import Tokenizer

TINY = Path(__file__).parent / "tiny"
"""The checkpoint that comes with the package."""


class Llama:
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
    ) -> "Llama":
        """Load a checkpoint, in one process or with the others that ``torchrun`` started.

        Args:
            ckpt_dir: directory of a checkpoint in Meta's layout; the embedded one by default.
            tokenizer_path: a ``tokenizer.model``; looked for in ``ckpt_dir``, then in its parent.
            max_seq_len: positions in the cache: prompt and generated tokens together.
            max_batch_size: rows in the cache; more prompts are worked off in turn.
            model_parallel_size: where given, must equal the number of processes.
            seed: what later calls draw their seeds from; the same in all processes.
            device: where to run; CUDA, else Apple's MPS, else the CPU by default.
            dtype: what to compute in; by default what the checkpoint and the device suggest.

        Raises:
            FileNotFoundError: the directory, a weight file or the tokenizer is missing.
            MemoryError: weights and cache are more than the machine has.
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
        source = open_meta(ckpt_dir)
        tokenizer = Tokenizer(tokenizer_path or find_tokenizer(ckpt_dir))
        n_words = tokenizer.n_words
        args = make_args(source.params, source.source, n_words, max_seq_len, max_batch_size)
        model = checkpoint.load(source, args, torch_device, dtype)
        return Llama(model, tokenizer, seed)

    def __init__(self, model: Transformer, tokenizer: Tokenizer, seed: int = 1):
        self.model = model
        self.tokenizer = tokenizer
        self._seeds = random.Random(seed)
        self._lock = threading.Lock()  # held by the call that has the cache
        # Held for a moment, to look at what follows; reentrant: a stream may be collected then.
        self._state = threading.RLock()
        self._turn: object = None  # which call has the cache
        self._owner: int | None = None  # the thread that works or iterates on it
        self._home: int | None = None  # the thread that calls, where there are several ranks

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

        Returns:
            The rows' tokens, without what ended them, and their log-probabilities or None.

        Raises:
            TypeError, ValueError: an argument is wrong, or a prompt doesn't fit.
            RuntimeError: the logits aren't finite, or a second thread calls on several ranks.
        """
        request = self._request(temperature, top_p, logprobs, echo, stop_token, bool(stop))
        rows = self._rows(prompt_tokens, max_gen_len, seed, self.tokenizer.decode, stop)
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
    ) -> list[CompletionPrediction]:
        """Continue texts. Arguments as in ``generate``; None generates to the cache's end.

        Returns:
            For each prompt ``{"generation": text}``, with ``logprobs`` also ``tokens`` (pieces)
            and ``logprobs``.
        """
        request = self._request(temperature, top_p, logprobs, echo)
        ids = [self._text_prompt(prompt) for prompt in checked_list(prompts, "prompts")]
        decode = self.tokenizer.decode
        rows = self._rows(ids, max_gen_len, seed, decode, stop, in_context=echo)
        self._run_all(rows, request)
        predictions = []
        for row in rows:
            text = decode(row.prompt) * request.echo + row.text.text
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
    ) -> list[ChatPrediction]:
        """Answer dialogs. Arguments as in ``text_completion``.

        Returns:
            For each dialog ``{"generation": {"role": "assistant", "content": text}}``, with
            ``logprobs`` also ``tokens`` (pieces) and ``logprobs``. A dialog whose messages contain
            the format's own tags is answered with an error text.

        Raises:
            ValueError: a dialog is not well formed (``llama.prompts.check_dialog``), or as in
                ``generate``.
        """
        request = self._request(temperature, top_p, logprobs, stop_token=self.tokenizer.step_id)
        ids = [self._dialog_prompt(dialog) for dialog in checked_list(dialogs, "dialogs")]
        rows = self._rows(ids, max_gen_len, seed, self.tokenizer.decode, stop)
        self._run_all([row for row in rows if row.prompt], request)
        predictions = []
        for row in rows:
            text = row.text.text if row.prompt else UNSAFE_ERROR
            answer = Message(role="assistant", content=text)
            if self.tokenizer.step_id is not None:
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
    ) -> list[InfillingPrediction]:
        """Fill in what is missing between prefixes and suffixes. Arguments as in
        ``text_completion``; ``suffix_first`` puts the suffix in front in the prompt.

        Returns:
            For each pair ``{"generation": middle, "full_text": prefix + middle + suffix}``, with
            ``logprobs`` also ``tokens`` (pieces) and ``logprobs``.

        Raises:
            ValueError: the model wasn't trained for infilling, or as in ``generate``.
        """
        request = self._request(temperature, top_p, logprobs, stop_token=self.tokenizer.eot_id)
        prefixes = checked_list(prefixes, "prefixes")
        suffixes = checked_list(suffixes, "suffixes")
        if len(prefixes) != len(suffixes):
            raise ValueError(f"{len(prefixes)} prefixes but {len(suffixes)} suffixes: give pairs")
        pairs = list(zip(prefixes, suffixes, strict=True))
        ids = [infilling_prompt_tokens(self.tokenizer, *pair, suffix_first) for pair in pairs]
        decode = self.tokenizer.decode_infilling
        rows = self._rows(ids, max_gen_len, seed, decode, stop)
        self._run_all(rows, request)
        predictions = []
        for row, (prefix, suffix) in zip(rows, pairs, strict=True):
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
    ) -> Generator[str, None, None]:
        """``text_completion`` of one prompt, piece by piece: joined, they are the same text.

        Until it is exhausted or closed, other threads wait; another call of the same thread takes
        the model over, and the iterator then raises RuntimeError.
        """
        request = self._request(temperature, top_p)
        ids = [self._text_prompt(prompt)]
        decode = self.tokenizer.decode
        return self._stream(self._rows(ids, max_gen_len, seed, decode, stop), request)

    def chat_completion_stream(
        self,
        dialog: Dialog,
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        *,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> Generator[str, None, None]:
        """``chat_completion`` of one dialog, piece by piece, as in ``text_completion_stream``:
        joined, they are the answer's content."""
        request = self._request(temperature, top_p, stop_token=self.tokenizer.step_id)
        ids = self._dialog_prompt(dialog)
        if not ids:
            return (text for text in [UNSAFE_ERROR])
        decode = self.tokenizer.decode
        rows = self._rows([ids], max_gen_len, seed, decode, stop)
        return self._stream(rows, request)

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
    ) -> Generator[str, None, None]:
        """``text_infilling`` of one pair, piece by piece, as in ``text_completion_stream``: joined,
        they are the middle."""
        request = self._request(temperature, top_p, stop_token=self.tokenizer.eot_id)
        ids = [infilling_prompt_tokens(self.tokenizer, prefix, suffix, suffix_first)]
        decode = self.tokenizer.decode_infilling
        return self._stream(self._rows(ids, max_gen_len, seed, decode, stop), request)

    def _text_prompt(self, prompt: str) -> list[int]:
        return self.tokenizer.encode(prompt, bos=True, eos=False)

    def _dialog_prompt(self, dialog: Dialog) -> list[int]:
        """The prompt's ids; none for a dialog that is to be refused."""
        check_dialog(dialog)
        return [] if has_special_tags(dialog) else dialog_prompt_tokens(self.tokenizer, dialog)

    def _request(
        self,
        temperature: float,
        top_p: float,
        logprobs: bool = False,
        echo: bool = False,
        stop_token: int | None = None,
        needs_text: bool = True,
    ) -> Request:
        stop_tokens = {self.tokenizer.eos_id}
        if stop_token is not None:
            if not isinstance(stop_token, int):
                raise TypeError(f"stop_token is {stop_token!r}: give one token id")
            stop_tokens.add(stop_token)
        echo, n_words = bool(echo), self.tokenizer.n_words
        return Request(temperature, top_p, logprobs, echo, stop_tokens, needs_text, n_words)

    def _rows(
        self,
        prompts: Sequence[Sequence[int]],
        max_gen_len: int | None,
        seed: int | None,
        decode: Callable[[Sequence[int]], str],
        stop: Sequence[str],
        in_context: bool = False,
    ) -> list[Row]:
        if seed is None:
            seed = self._seeds.getrandbits(63)
        if not isinstance(seed, int):
            raise TypeError(f"seed is {seed!r}: give a whole number")
        return make_rows(self.model.params, prompts, max_gen_len, seed, decode, stop, in_context)

    def _run_all(self, rows: list[Row], request: Request) -> None:
        if any(not row.prompt for row in rows):
            raise ValueError("a prompt has no tokens: begin it with the tokenizer's bos_id")
        with self._exclusive():
            for first in range(0, len(rows), self.model.params.max_batch_size):
                batch = rows[first : first + self.model.params.max_batch_size]
                for _ in run(self.model, batch, request):
                    pass

    def _stream(self, rows: list[Row], request: Request) -> Generator[str, None, None]:
        with self._exclusive() as still_mine:
            for piece in run(self.model, rows, request):
                if piece:
                    yield piece
                    still_mine()

    @contextmanager
    def _exclusive(self) -> Iterator[Callable[[], None]]:
        """Keep the cache to one call. Yields what a stream asks before it goes on."""
        me = threading.get_ident()
        if parallel.world_size() > 1 and self._home not in (None, me):
            raise RuntimeError(
                "several ranks work on each call, and threads could bring calls to them in "
                "different orders: make all calls from one thread"
            )
        self._home = me
        turn = object()

        def still_mine() -> None:
            with self._state:
                if self._turn is not turn:
                    raise RuntimeError(
                        "another call has used this Llama since the stream began: exhaust or "
                        "close() a stream before the next call"
                    )
                self._owner = threading.get_ident()  # a stream may be handed on to another thread

        try:
            with self._state:
                if self._owner == me:
                    # A thread can't wait for a stream of its own: it takes over from it.
                    self._turn = turn
            if self._turn is not turn:
                self._lock.acquire()
                with self._state:
                    self._turn, self._owner = turn, me
            yield still_mine
        finally:
            with self._state:
                if self._turn is turn:
                    self._turn = self._owner = None
                    self._lock.release()

    def _with_scores(self, prediction: Any, row: Row, request: Request) -> Any:
        if request.logprobs:
            ids = row.prompt * request.echo + row.tokens
            prediction["tokens"] = [self.tokenizer.token_piece(t) for t in ids]
            prediction["logprobs"] = row.prompt_logprobs * request.echo + row.logprobs
        return prediction
