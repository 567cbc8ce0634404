"""What the tasks of ``Llama`` share: prompts become rows, rows are worked off in batches."""

import random
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from llama.chat.formats import ChatFormat, choose_chat
from llama.chat.prompts import UNSAFE_ERROR, Dialog, has_tags, infilling_prompt_tokens
from llama.decoding import Request, Row, make_rows, run
from llama.errors import checked_list
from llama.guards import InputGuard, OutputGuard, checked_verdict, refusal
from llama.model import Transformer
from llama.prefixes import Prefixes
from llama.tokenizer import BaseTokenizer
from llama.turns import Turns


class BaseLlama:
    """A model, its tokenizer and its way to write dialogs.

    ``input_guard`` and ``output_guard``, where they are set, judge the dialogs that are to be
    answered, and the answers (``llama.guards``).
    """

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
        self.input_guard: InputGuard | None = None
        self.output_guard: OutputGuard | None = None
        self._seeds = random.Random(seed)
        self._prefixes = Prefixes(model)
        self._turns = Turns()

    def text_rows(
        self,
        prompts: Sequence[str | list[int]],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        stop: Sequence[str] = (),
        seed: int | None = None,
        prompt_lookup_num_tokens: int = 0,
        in_context: bool = False,
    ) -> tuple[list[Row], Request]:
        """What ``text_completion`` works off, which also takes prompts of token ids here.

        ``in_context`` keeps a space at the beginning of a text, which then fits its prompt.
        """
        request = self._request(temperature, top_p, logprobs, echo)
        ids = [
            prompt if _are_ids(prompt) else self._text_prompt(prompt)
            for prompt in checked_list(prompts, "prompts")
        ]
        decode, n_lookup = self.tokenizer.decode, prompt_lookup_num_tokens
        in_context = in_context or echo
        return self._rows(ids, max_gen_len, seed, decode, stop, n_lookup, in_context), request

    def chat_rows(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        stop: Sequence[str] = (),
        seed: int | None = None,
        prompt_lookup_num_tokens: int = 0,
    ) -> tuple[list[Row], Request]:
        """What ``chat_completion`` works off; a dialog that is to be refused has no prompt."""
        request = self._request(temperature, top_p, logprobs, stop_tokens=self._chat_stops())
        ids = [self._dialog_prompt(dialog) for dialog in checked_list(dialogs, "dialogs")]
        stop = (*checked_list(stop, "stop"), *self.chat.stop)
        decode, n_lookup = self.tokenizer.decode, prompt_lookup_num_tokens
        return self._rows(ids, max_gen_len, seed, decode, stop, n_lookup), request

    def infilling_rows(
        self,
        prefixes: Sequence[str],
        suffixes: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        suffix_first: bool = False,
        stop: Sequence[str] = (),
        seed: int | None = None,
        prompt_lookup_num_tokens: int = 0,
    ) -> tuple[list[Row], Request]:
        """What ``text_infilling`` works off."""
        request = self._request(temperature, top_p, logprobs, stop_tokens=[self.tokenizer.eot_id])
        prefixes = checked_list(prefixes, "prefixes")
        suffixes = checked_list(suffixes, "suffixes")
        if len(prefixes) != len(suffixes):
            raise ValueError(f"{len(prefixes)} prefixes but {len(suffixes)} suffixes: give pairs")
        pairs = zip(prefixes, suffixes, strict=True)
        ids = [infilling_prompt_tokens(self.tokenizer, *pair, suffix_first) for pair in pairs]
        decode, n_lookup = self.tokenizer.decode_infilling, prompt_lookup_num_tokens
        return self._rows(ids, max_gen_len, seed, decode, stop, n_lookup), request

    def _text_prompt(self, prompt: str) -> list[int]:
        tokenizer = self.tokenizer
        ids = tokenizer.encode(prompt, bos=tokenizer.add_bos, eos=False)
        # An empty prompt needs something to continue, also where texts have no beginning.
        return ids or [tokenizer.bos_id] * (tokenizer.bos_id >= 0)

    def _dialog_prompt(self, dialog: Dialog) -> list[int]:
        """The prompt's ids; none for a dialog that is to be refused."""
        ids = self.chat.prompt(self.tokenizer, dialog)
        return [] if has_tags(dialog, self.chat.tags) else ids

    def _refusal(self, dialog: Dialog) -> str | None:
        """What is said against a dialog, instead of an answer."""
        if has_tags(dialog, self.chat.tags):
            return UNSAFE_ERROR
        if self.input_guard is not None:
            verdict = checked_verdict(self.input_guard(dialog))
            return None if verdict.allowed else refusal(verdict)
        return None

    def _judge(self, dialog: Dialog, row: Row) -> str:
        """The answer to a dialog, or what a guard says against it; its tokens are gone then."""
        if self.output_guard is not None:
            verdict = checked_verdict(self.output_guard(dialog, row.text.text))
            if not verdict.allowed:
                row.tokens, row.logprobs = [], []
                return refusal(verdict)
        return row.text.text

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
        check_not_empty([row.prompt for row in rows])
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


def _are_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int)


def check_not_empty(prompts: Sequence[Sequence[int]]) -> None:
    if not all(prompts):
        raise ValueError("a prompt has no tokens: begin it with the tokenizer's bos_id")
