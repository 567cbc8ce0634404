"""What the tasks of ``Llama`` share: prompts become rows, rows are worked off in batches."""

import random
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch

from llama.chat_formats import ChatFormat
from llama.decoding import Request, Row, checked_list, checked_prompts, make_rows, run
from llama.formats.text import choose_chat
from llama.model import Transformer
from llama.prefixes import Prefixes
from llama.prompts import Dialog, has_tags
from llama.tokenizer import BaseTokenizer
from llama.turns import Turns


class BaseLlama:
    """A model, its tokenizer and its way to write dialogs."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: BaseTokenizer,
        seed: int = 1,
        chat: ChatFormat | None = None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.chat = chat or choose_chat(None, {}, tokenizer)
        self._seeds = random.Random(seed)
        self._prefixes = Prefixes(model)
        self._turns = Turns()

    def _read(
        self, texts: Sequence[str], work: Callable[[list[list[int]]], torch.Tensor]
    ) -> torch.Tensor:
        """What ``work`` makes of texts, a batch at a time: a row for each."""
        ids = [self._text_prompt(text) for text in checked_list(texts, "texts")]
        prompts, size = checked_prompts(self.model.params, ids), self.model.params.max_batch_size
        _check_not_empty(prompts)
        with self._turns.exclusive():
            batches = [work(prompts[i : i + size]) for i in range(0, len(prompts), size)]
        return torch.cat(batches) if batches else torch.zeros(0)

    def _text_prompt(self, prompt: str) -> list[int]:
        tokenizer = self.tokenizer
        ids = tokenizer.encode(prompt, bos=tokenizer.add_bos, eos=False)
        # An empty prompt needs something to continue, also where texts have no beginning.
        return ids or [tokenizer.bos_id] * (tokenizer.bos_id >= 0)

    def _dialog_prompt(self, dialog: Dialog) -> list[int]:
        """The prompt's ids; none for a dialog that is to be refused."""
        ids = self.chat.prompt(self.tokenizer, dialog)
        return [] if has_tags(dialog, self.chat.tags) else ids

    def _chat_stops(self) -> list[int | None]:
        controls = self.tokenizer.control_ids
        return [self.tokenizer.step_id, *(controls.get(text) for text in self.chat.stop)]

    def _request(
        self,
        temperature: float,
        top_p: float,
        logprobs: bool = False,
        echo: bool = False,
        stop_tokens: Sequence[int | None] = (),
        needs_text: bool = True,
    ) -> Request:
        if self.model.params.labels is not None:
            raise ValueError("this checkpoint classifies and writes no text: use classify")
        stops = {*self.tokenizer.stop_ids, *(t for t in stop_tokens if t is not None)}
        echo, n_words = bool(echo), self.tokenizer.n_words
        return Request(temperature, top_p, logprobs, echo, stops, needs_text, n_words)

    def _rows(
        self,
        prompts: Sequence[Sequence[int]],
        max_gen_len: int | None,
        seed: int | None,
        decode: Callable[[Sequence[int]], str],
        stop: Sequence[str],
        prompt_lookup_num_tokens: int,
        in_context: bool = False,
    ) -> list[Row]:
        if seed is None:
            seed = self._seeds.getrandbits(63)
        if not isinstance(seed, int):
            raise TypeError(f"seed is {seed!r}: give a whole number")
        return make_rows(
            self.model.params,
            prompts,
            max_gen_len,
            seed,
            decode,
            stop,
            in_context,
            prompt_lookup_num_tokens,
        )

    def _run_all(self, rows: list[Row], request: Request) -> None:
        _check_not_empty([row.prompt for row in rows])
        with self._turns.exclusive():
            for first in range(0, len(rows), self.model.params.max_batch_size):
                batch = rows[first : first + self.model.params.max_batch_size]
                for _ in self._run(batch, request):
                    pass

    def _stream(self, rows: list[Row], request: Request) -> Generator[str, None, None]:
        with self._turns.exclusive() as still_mine:
            for piece in self._run(rows, request):
                if piece:
                    yield piece
                    still_mine()

    def _run(self, rows: list[Row], request: Request) -> Iterator[str]:
        """``run``, on what the cache still holds of the prompts."""
        scores_prompts = request.logprobs and request.echo
        starts = None if scores_prompts else self._prefixes.reuse(rows)
        passes = -1
        try:
            for piece in run(self.model, rows, request, starts):
                passes = self.model.n_passes
                yield piece
        finally:
            self._prefixes.record(rows, passes)

    def _with_scores(self, prediction: Any, row: Row, request: Request) -> Any:
        if request.logprobs:
            ids = row.prompt * request.echo + row.tokens
            prediction["tokens"] = [self.tokenizer.token_piece(t) for t in ids]
            prediction["logprobs"] = row.prompt_logprobs * request.echo + row.logprobs
        return prediction


def _check_not_empty(prompts: Sequence[Sequence[int]]) -> None:
    if not all(prompts):
        raise ValueError("a prompt has no tokens: begin it with the tokenizer's bos_id")
