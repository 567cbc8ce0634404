"""Fill in the middle: llama.cpp's /infill, whose texts are cut to fit, and Mistral's form of it."""

import time
from contextlib import aclosing
from functools import partial
from typing import Any, Literal

from fastapi import Request, Response
from pydantic import BaseModel

from llama.adapters import n_virtual
from llama.chat.prompts import infilling_prompt_tokens
from llama.engine.sequence import Sequence
from llama.server import schemas_chat
from llama.server import schemas_infill as schemas
from llama.server.answers import Answers, Piece
from llama.server.events import Events, collect, json_response, stream, unless_disconnected
from llama.server.loop import Job
from llama.server.scores import new_id, usage
from llama.server.service import Service
from llama.server.tasks import chosen_adapter
from llama.tokenizer import BaseTokenizer

_BEFORE_EXTRA = "\n\n--- snippet ---\n\n"  # as llama.cpp has it
_MIN_ROOM = 128  # tokens that are kept free for a middle of any length


async def infill(service: Service, body: schemas.InfillRequest, request: Request) -> Response:
    """Fill in the middle between a prefix and a suffix."""
    adapter = chosen_adapter(service, body.model or None)
    tasks, tokenizer, begin = service.llama.tasks, service.llama.tokenizer, time.monotonic()
    wanted = _MIN_ROOM if body.n_new is None else max(body.n_new, 1)
    is_cut = False

    def make() -> list[Sequence]:
        nonlocal is_cut
        params = service.params(max_gen_len=body.n_new, adapter=adapter, **body.generation)
        room = service.max_tokens - min(wanted, service.max_tokens // 2)
        room -= n_virtual(service.llama.adapters.find(adapter))
        ids, is_cut = fitting_prompt(tokenizer, body, room)
        ends = [] if tokenizer.eot_id is None else [tokenizer.eot_id]
        return tasks.generate([ids], params, "infilling", ends=ends)

    answers = await unless_disconnected(request, service.submit(make, 1, timeout=body.timeout))
    growing = GrowingInfill(body, adapter or service.name, answers.jobs[0], begin, is_cut)
    if body.stream:
        end = partial(growing.end, text="")
        events = Events(
            piece=growing.push,
            last=lambda: [end()],
            is_enough=lambda: growing.is_enough,
            done=b"",
        )
        return stream(answers, events)
    await unless_disconnected(request, _gather(answers, growing))
    return await json_response(lambda: growing.end(growing.text))


def fitting_prompt(
    tokenizer: BaseTokenizer, body: schemas.InfillRequest, room: int
) -> tuple[list[int], bool]:
    """Return the prompt for a middle, and whether its texts were cut.

    The prefix loses its beginning, and the suffix, of which a quarter of the room is kept, its
    end. What they leave is for the ends of the other texts.

    Args:
        room: the number of tokens that a prompt may have.

    Raises:
        ValueError: the tokenizer has no infilling pieces.
    """
    ids = infilling_prompt_tokens(tokenizer, body.input_prefix + body.prompt, body.input_suffix)
    at = next(i for i, token in enumerate(ids) if token == tokenizer.suffix_id)
    (bos, pre, *prefix), (suf, *suffix, mid) = ids[:at], ids[at:]
    extra: list[int] = []
    for other in body.input_extra or ():
        extra += tokenizer.encode_infilling(_BEFORE_EXTRA + other.text)
    room = max(room - 4, 0)
    n_suffix = min(len(suffix), max(room // 4, room - len(prefix)))
    n_prefix = min(len(prefix), room - n_suffix)
    n_extra = min(len(extra), room - n_suffix - n_prefix)
    n_kept, n_all = n_suffix + n_prefix + n_extra, len(suffix) + len(prefix) + len(extra)
    before = [bos, *extra[len(extra) - n_extra :], pre, *prefix[len(prefix) - n_prefix :]]
    return [*before, suf, *suffix[:n_suffix], mid], n_kept < n_all


async def _gather(answers: Answers, growing: "GrowingInfill") -> None:
    try:
        async with aclosing(answers.pieces()) as pieces:
            async for piece in pieces:
                growing.push(piece)
                if growing.is_enough:
                    break
    finally:
        answers.close()


class GrowingInfill:
    """A middle while it is generated.

    Args:
        model: its name.
        job: the middle's.
        begin: the time of the request, by ``time.monotonic()``.
        is_cut: whether its texts were cut.

    Attributes:
        text: the middle so far.
        is_enough: whether it ends here, as the request says.
    """

    def __init__(
        self, body: schemas.InfillRequest, model: str, job: Job, begin: float, is_cut: bool
    ):
        self.text = ""
        self.is_enough = False
        self._n_sent = self._n_tokens_sent = 0
        self._body = body
        self._model = model
        self._job = job
        self._is_cut = is_cut
        self._begin = self._last_time = begin
        self._first_time: float | None = None
        self._last: Piece | None = None

    def push(self, piece: Piece) -> list[schemas.InfillPiece]:
        """Take more of the middle, and return what is new and certain to stay."""
        self._last_time = time.monotonic()
        if self._first_time is None:
            self._first_time = self._last_time
        self._last = piece
        self.text += piece.text
        if piece.finish != "content_filter":  # whose reason is no line of the middle
            self.is_enough = self._is_cut_short() or self._is_late()
        is_end = self.is_enough or piece.finish is not None
        n_certain = len(self.text) if is_end else self._n_certain()
        if n_certain == self._n_sent and piece.finish is None:
            return []
        content = self.text[self._n_sent : n_certain]
        tokens = self._job.sequence.tokens[self._n_tokens_sent : piece.n_tokens]
        self._n_sent, self._n_tokens_sent = n_certain, piece.n_tokens
        return [schemas.InfillPiece(content=content, tokens=tokens)]

    def _is_cut_short(self) -> bool:
        """Cut the text before the first line that is indented less; return whether there is one."""
        if self._body.n_indent:
            first, *lines = self.text.split("\n")
            for i, line in enumerate(lines):
                content = line.lstrip(" \t")
                if content and len(line) - len(content) < self._body.n_indent:
                    self.text = "\n".join([first, *lines[:i]])
                    return True
        return False

    def _is_late(self) -> bool:
        limit = (self._body.t_max_predict_ms or 0) / 1e3
        is_late = self._last_time - (self._first_time or self._last_time) > limit
        return limit > 0 and is_late and "\n" in self.text

    def _n_certain(self) -> int:
        """Return how much of the text stays, however its last line goes on."""
        before, newline, line = self.text.rpartition("\n")
        is_open = newline and not line.strip(" \t") and len(line) < (self._body.n_indent or 0)
        return len(before) if is_open else len(self.text)

    def end(self, text: str) -> BaseModel:
        """Return the answer, with the text that it hasn't had in pieces."""
        sequence, last = self._job.sequence, self._last
        stop = sequence.stop_reason if last and last.finish == "stop" else None
        is_limit = last is None or last.finish in (None, "length")
        first = self._last_time if self._first_time is None else self._first_time
        answer = schemas.Infill(
            content=text,
            tokens=sequence.tokens if self._body.return_tokens else [],
            stop_type="limit" if is_limit else "eos" if stop is None else "word",
            stopping_word="" if stop is None else str(stop),
            model=self._model,
            tokens_predicted=len(sequence.tokens),
            tokens_evaluated=len(sequence.prompt),
            tokens_cached=sequence.n_reused,
            truncated=self._is_cut,
            timings=schemas.Timings.of(
                len(sequence.prompt) - sequence.n_reused,
                first - self._begin,
                len(sequence.tokens),
                self._last_time - first,
            ),
        )
        if self._body.response_fields is None:
            return answer
        return schemas.SelectedFields.of(answer, self._body.response_fields)


async def fill_in(service: Service, body: schemas.FimRequest, request: Request) -> Response:
    """Fill in between ``prompt`` and ``suffix``; the answer has the form of a chat's."""
    adapter, n = chosen_adapter(service, body.model), body.n or 1
    tasks = service.llama.tasks

    def make() -> list[Sequence]:
        params = service.params(max_gen_len=body.max_tokens, adapter=adapter, **body.generation)
        if body.suffix is None:
            return tasks.text([body.prompt], params, in_context=True)
        return tasks.infilling([body.prompt], [body.suffix], params)

    has_form = body.response_format is not None
    submission = service.submit(make, n, n, timeout=body.timeout, has_form=has_form)
    answers = await unless_disconnected(request, submission)
    name, created = new_id("fimcmpl")
    named: Any = {"id": name, "created": created, "model": adapter or service.name}
    whole = partial(schemas_chat.ChatCompletion, **named)
    chunk = partial(schemas_chat.ChatChunk, **named)
    begun: set[int] = set()

    def choice(piece: Piece) -> schemas_chat.ChatChoice:
        message = schemas_chat.ChatAnswer(content=piece.text)
        ends: Any = {"finish_reason": piece.finish, "stop_reason": piece.stop_reason}
        return schemas_chat.ChatChoice(index=piece.number, message=message, **ends)

    def chunks(piece: Piece) -> list[schemas_chat.ChatChunk]:
        role: Literal["assistant"] | None = None if piece.number in begun else "assistant"
        begun.add(piece.number)
        delta = schemas_chat.ChatDelta(role=role, content=piece.text)
        ends: Any = {"finish_reason": piece.finish, "stop_reason": piece.stop_reason}
        new = schemas_chat.ChatChunkChoice(index=piece.number, delta=delta, **ends)
        return [chunk(choices=[new])]

    if not body.stream:
        pieces = await collect(request, answers)
        return await json_response(
            lambda: whole(choices=list(map(choice, pieces)), usage=usage(answers.jobs, n))
        )
    return stream(
        answers,
        Events(
            piece=chunks,
            last=lambda: [chunk(choices=[], usage=usage(answers.jobs, n))] * body.wants_usage,
        ),
    )
