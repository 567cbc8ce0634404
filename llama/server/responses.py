"""OpenAI's Responses API, without its state: https://platform.openai.com/docs/api-reference."""

import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal

from fastapi import Request, Response

from llama.chat.tools import AnswerDelta
from llama.server import schemas_responses as schemas
from llama.server.answers import Piece
from llama.server.dialogs import Turn, submit_dialog
from llama.server.errors import ApiError
from llama.server.events import Events, collect, json_response, stream, unless_disconnected
from llama.server.loop import Job
from llama.server.schemas import FinishReason
from llama.server.schemas_chat import TokenLogprob
from llama.server.scores import Scores, usage
from llama.server.service import Service
from llama.server.tasks import check_scores, chosen_adapter

_INCOMPLETE: dict[FinishReason, Literal["max_output_tokens", "content_filter"]] = {
    "length": "max_output_tokens",
    "content_filter": "content_filter",
}


async def respond(service: Service, body: schemas.ResponsesRequest, request: Request) -> Response:
    """Answer a dialog in the form of a list of items."""
    adapter = chosen_adapter(service, body.model)
    check_scores(service, body.wants_logprobs)
    sampling = body.generation | {"adapter": adapter}
    submission = submit_dialog(
        service, body.dialog, body.options, sampling, body.timeout, ("input", "text.format")
    )
    answers, [turn] = await unless_disconnected(request, submission)
    [job] = answers.jobs
    scores = Scores(service.llama.tokenizer, job) if body.wants_logprobs else None
    growing = GrowingResponse(_empty(body, adapter or service.name), turn, scores)
    if body.stream:
        return stream(
            answers,
            Events(
                piece=growing.push,
                first=growing.begin,
                last=lambda: growing.end(job),
                failed=growing.fail,
                done=b"",
                is_scored=body.wants_logprobs,
            ),
        )
    [piece] = await collect(request, answers)

    def build() -> schemas.ModelResponse:
        growing.push(piece)
        growing.end(job)
        return growing.response

    return await json_response(build)


def _empty(body: schemas.ResponsesRequest, model: str) -> schemas.ModelResponse:
    """Return a response without output, which repeats what was asked."""
    form = body.text.format if body.text else None
    text = {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_unset=True)
    choice = body.tool_choice or "auto"
    tools = [tool.model_dump() for tool in body.tools or ()]
    return schemas.ModelResponse(
        id=_new_id("resp"),
        created_at=int(time.time()),
        model=model,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        text={"format": text},
        tools=tools,
        tool_choice=choice if isinstance(choice, str) else choice.model_dump(),
        parallel_tool_calls=body.parallel_tool_calls is not False,
        metadata=body.metadata or {},
        top_logprobs=body.top_logprobs or 0,
        user=body.user,
    )


class GrowingResponse:
    """A response while it is generated, and the events that tell of it.

    Args:
        turn: the answer, whose text and calls become the response's items.
        scores: the log-probabilities, if they are asked for.
    """

    def __init__(self, response: schemas.ModelResponse, turn: Turn, scores: Scores | None):
        self.response = response
        self._turn = turn
        self._scores = scores
        self._last: Piece | None = None
        self._open: schemas.OutputMessage | schemas.OutputCall | None = None  # the last item
        self._n_events = 0

    def begin(self) -> list[schemas.ResponseEvent]:
        return [self._whole("response.created"), self._whole("response.in_progress")]

    def push(self, piece: Piece) -> list[schemas.ResponseEvent]:
        """Take more of the answer."""
        self._last = piece
        new = self._turn.push(piece)
        events = self._push_text(new.content) if new.content else []
        return events + self._push_calls(new)

    def _push_text(self, text: str) -> list[schemas.ResponseEvent]:
        events = []
        if not isinstance(self._open, schemas.OutputMessage):
            message = schemas.OutputMessage(id=_new_id("msg"))
            events = self._close("completed") + self._add(message)
            message.content = [schemas.OutputText()]
            added = {"content_index": 0, "part": message.content[0].model_dump()}
            events.append(self._of_item("response.content_part.added", **added))
        assert isinstance(self._open, schemas.OutputMessage)
        scores, [part] = self._logprobs(), self._open.content
        part.text += text
        part.logprobs = [*part.logprobs, *scores]
        fields: dict[str, Any] = {"content_index": 0, "delta": text, "logprobs": _dumped(scores)}
        return [*events, self._of_item("response.output_text.delta", **fields)]

    def _push_calls(self, new: AnswerDelta) -> list[schemas.ResponseEvent]:
        events = []
        for call in new.calls:
            if call.name is not None:
                item = schemas.OutputCall(
                    id=_new_id("fc"), call_id=call.id or _new_id("call"), name=call.name
                )
                events += self._close("completed") + self._add(item)
            if call.arguments:
                assert isinstance(self._open, schemas.OutputCall)
                self._open.arguments += call.arguments
                kind = "response.function_call_arguments.delta"
                events.append(self._of_item(kind, delta=call.arguments))
        return events

    def end(self, job: Job) -> list[schemas.ResponseEvent]:
        """End the response once its job has ended."""
        reason = _INCOMPLETE.get(self._last.finish if self._last else None)
        response, events = self.response, [] if self.response.output else self._push_text("")
        status: schemas.Status = "incomplete" if reason else "completed"
        events += self._close(status)
        response.status, response.usage = status, _usage(job)
        if reason is None:
            response.completed_at = int(time.time())
        else:
            response.incomplete_details = schemas.IncompleteDetails(reason=reason)
        return [*events, self._whole(f"response.{status}")]

    def fail(self, error: ApiError) -> list[schemas.ResponseEvent]:
        """End the response with an error."""
        self.response.status = "failed"
        self.response.error = schemas.ResponseFailure(message=str(error))
        return [self._whole("response.failed")]

    def _add(self, item: schemas.OutputMessage | schemas.OutputCall) -> list[schemas.ResponseEvent]:
        self.response.output.append(item)
        self._open = item
        index = len(self.response.output) - 1
        kind = "response.output_item.added"
        return [self._event(kind, output_index=index, item=item.model_dump())]

    def _close(self, status: schemas.Status) -> list[schemas.ResponseEvent]:
        """End the open item, if there is one."""
        item = self._open
        if item is None:
            return []
        item.status = status
        events = []
        if isinstance(item, schemas.OutputMessage):
            scores, [part] = self._logprobs(), item.content
            part.logprobs = [*part.logprobs, *scores]
            fields: dict[str, Any] = {"text": part.text, "logprobs": _dumped(part.logprobs)}
            for kind, of_kind in (
                ("response.output_text.done", fields),
                ("response.content_part.done", {"part": part.model_dump()}),
            ):
                events.append(self._of_item(kind, content_index=0, **of_kind))
        else:
            kind = "response.function_call_arguments.done"
            events.append(self._of_item(kind, name=item.name, arguments=item.arguments))
        index = len(self.response.output) - 1
        done = self._event("response.output_item.done", output_index=index, item=item.model_dump())
        self._open = None
        return [*events, done]

    def _logprobs(self) -> list[TokenLogprob]:
        if self._scores is None or self._last is None:
            return []
        content = self._scores.for_chat(self._last.n_tokens).content
        for token in (every for named in content for every in (named, *named.top_logprobs)):
            token.bytes = token.bytes or []
        return content

    def _event(self, kind: str, **fields: Any) -> schemas.ResponseEvent:
        self._n_events += 1
        return schemas.ResponseEvent(type=kind, sequence_number=self._n_events - 1, **fields)

    def _of_item(self, kind: str, **fields: Any) -> schemas.ResponseEvent:
        assert self._open is not None
        index = len(self.response.output) - 1
        return self._event(kind, item_id=self._open.id, output_index=index, **fields)

    def _whole(self, kind: str) -> schemas.ResponseEvent:
        return self._event(kind, response=self.response.model_dump())


def _dumped(scores: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    return [score.model_dump() for score in scores]


def _usage(job: Job) -> schemas.ResponseUsage:
    used = usage([job])
    n_cached = used.prompt_tokens_details.cached_tokens
    return schemas.ResponseUsage(
        input_tokens=used.prompt_tokens,
        input_tokens_details=schemas.InputDetails(
            cached_tokens=n_cached, cache_write_tokens=used.prompt_tokens - n_cached
        ),
        output_tokens=used.completion_tokens,
        total_tokens=used.total_tokens,
    )


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
