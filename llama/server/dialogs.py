"""Answer dialogs: /v1/chat/completions, and what /v1/responses shares with it."""

from functools import partial
from typing import Any, Literal

from fastapi import Request, Response

from llama.chat.options import ChatOptions
from llama.chat.prompts import Function, Message
from llama.chat.tools import AnswerDelta, AnswerParser, ToolCall
from llama.engine.sequence import Sequence as EngineSequence
from llama.errors import PromptTooLong, WrongForm
from llama.server import schemas_chat as schemas
from llama.server.answers import Answers, Piece
from llama.server.errors import ApiError, ContextLengthExceeded
from llama.server.events import Events, collect, json_response, stream, unless_disconnected
from llama.server.schemas import FinishReason
from llama.server.scores import Scores, new_id, usage
from llama.server.service import Service
from llama.server.tasks import check_scores, chosen_adapter, n_last


class Turn:
    """An answer to a dialog as it grows: its text, apart from its calls of tools.

    Args:
        parser: finds the calls; None if the request has no tools.
    """

    def __init__(self, parser: AnswerParser | None):
        self.content = ""
        self.calls: list[ToolCall] = []
        self._parser = parser

    def push(self, piece: Piece) -> AnswerDelta:
        """Take more of the answer, and return what is new."""
        if self._parser is None or piece.finish == "content_filter":
            delta = AnswerDelta(piece.text)
        else:
            delta = self._parser.push(piece.text)
            if piece.finish is not None:
                rest = self._parser.finish()
                delta = AnswerDelta(delta.content + rest.content, delta.calls + rest.calls)
        self.content += delta.content
        for call in delta.calls:
            if call.index == len(self.calls):
                function = Function(name=call.name or "", arguments="")
                self.calls.append({"id": call.id or "", "type": "function", "function": function})
            self.calls[call.index]["function"]["arguments"] += call.arguments
        return delta

    def message(self) -> schemas.ChatAnswer:
        """Return the whole answer."""
        calls = [schemas.AnsweredCall.model_validate(call) for call in self.calls]
        content = None if calls and not self.content else self.content
        return schemas.ChatAnswer(content=content, tool_calls=calls or None)

    def reason(self, finish: FinishReason) -> FinishReason:
        """Return why the answer ended, for one that a piece says has ended."""
        return "tool_calls" if finish == "stop" and self.calls else finish


def chat_options(service: Service, options: dict[str, Any]) -> ChatOptions:
    """Return options of ``ChatOptions`` for a dialog in the order of roles that clients send.

    Raises:
        ApiError: the chat format has no place for tools.
    """
    chosen = ChatOptions(merge_roles=True, **options)
    try:
        service.llama.tasks.answer_parser(chosen)
    except ValueError:
        raise ApiError(
            400,
            f"this server's chat format ({service.chat_format}) has no place for tools: start it "
            'with --tool_format hermes, or send no tools, or tool_choice="none"',
            "tools",
        ) from None
    return chosen


async def submit_dialog(
    service: Service,
    dialog: list[Message],
    options: dict[str, Any],
    sampling: dict[str, Any],
    timeout: float | None,
    names: tuple[str, str] = ("messages", "response_format"),
) -> tuple[Answers, list[Turn]]:
    """Submit a dialog, in the order of roles that clients send, to be answered.

    Args:
        options: of ``ChatOptions``.
        sampling: of ``SamplingParams``.
        names: of the request's fields for the dialog and for the answer's form.

    Raises:
        ApiError: the chat format has no place for tools, or see ``Service.submit``.
    """
    tasks, n = service.llama.tasks, sampling.get("n", 1)
    chosen = chat_options(service, options)

    def make() -> list[EngineSequence]:
        params = service.params(**sampling)
        try:
            return tasks.chat([dialog], params, chosen)
        except WrongForm as error:
            if params.response_format is not None:
                raise ApiError(400, str(error), names[1]) from error
            message = str(error).replace("response_format", "the form of a tool's arguments", 1)
            raise ApiError(400, message, "tools") from error
        except PromptTooLong:
            raise
        except ValueError as error:
            raise ApiError(400, str(error), names[0]) from error

    has_form = sampling.get("response_format") is not None or bool(chosen.offered)
    try:
        has_scores = sampling.get("logprobs", False)
        answers = await service.submit(make, n, n, [dialog], timeout, has_form, has_scores)
    except ContextLengthExceeded as error:
        raise error.of(names[0]) from error
    return answers, [Turn(tasks.answer_parser(chosen)) for _ in answers.jobs]


async def chat(service: Service, body: schemas.ChatRequest, request: Request) -> Response:
    """Answer a dialog."""
    adapter = chosen_adapter(service, body.model)
    score = bool(body.logprobs)
    check_scores(service, score)
    sampling = body.generation | {
        "max_gen_len": body.max_completion_tokens or body.max_tokens,
        "logprobs": score,
        "top_logprobs": body.top_logprobs or 0,
        "adapter": adapter,
    }
    last = n_last(service, body.truncate_prompt_tokens, adapter, sampling["max_gen_len"])
    options = body.options | {"max_prompt_tokens": last}
    submission = submit_dialog(service, body.dialog, options, sampling, body.timeout)
    answers, turns = await unless_disconnected(request, submission)
    jobs, n = answers.jobs, len(answers.jobs)
    scores = [Scores(service.llama.tokenizer, job) for job in jobs if score]
    name, created = new_id("chatcmpl")
    named: Any = {"id": name, "created": created, "model": adapter or service.name}
    whole = partial(schemas.ChatCompletion, **named)
    chunk = partial(schemas.ChatChunk, **named)

    def logprobs(piece: Piece) -> schemas.ChatLogprobs | None:
        return scores[piece.number].for_chat(piece.n_tokens) if score else None

    def choice(piece: Piece) -> schemas.ChatChoice:
        turn = turns[piece.number]
        turn.push(piece)
        return schemas.ChatChoice(
            index=piece.number,
            message=turn.message(),
            logprobs=logprobs(piece),
            finish_reason=turn.reason(piece.finish),
            stop_reason=piece.stop_reason,
        )

    if not body.stream:
        pieces = await collect(request, answers)
        return await json_response(
            lambda: whole(choices=list(map(choice, pieces)), usage=usage(jobs, n))
        )
    begun: set[int] = set()

    def chunks(piece: Piece) -> list[schemas.ChatChunk]:
        turn, number = turns[piece.number], piece.number
        new, is_last = turn.push(piece), piece.finish is not None
        deltas = _deltas(new, number not in begun, is_last, bool(turn.calls))
        begun.update([number] * bool(deltas))
        choices = [schemas.ChatChunkChoice(index=number, delta=delta) for delta in deltas]
        if choices:
            choices[0].logprobs = logprobs(piece)
            choices[-1].finish_reason = turn.reason(piece.finish)
            choices[-1].stop_reason = piece.stop_reason
        return [chunk(choices=[choice]) for choice in choices]

    return stream(
        answers,
        Events(
            piece=chunks,
            last=lambda: [chunk(choices=[], usage=usage(jobs, n))] * body.wants_usage,
            is_scored=score,
        ),
    )


def _deltas(
    new: AnswerDelta, is_first: bool, is_last: bool, has_calls: bool
) -> list[schemas.ChatDelta]:
    """Return what is new as OpenAI sends it: a call begins and ends in events of its own."""
    role: Literal["assistant"] | None = "assistant" if is_first else None
    deltas = []
    if new.content or (is_last and not has_calls):
        deltas.append(schemas.ChatDelta(role=role, content=new.content))
    elif role and new.calls:
        deltas.append(schemas.ChatDelta(role=role))
    for i, identity, name, arguments in new.calls:
        found = []
        if identity is not None:
            function = schemas.FunctionDelta(name=name)
            found.append(
                schemas.CallDelta(index=i, id=identity, type="function", function=function)
            )
        if arguments:
            function = schemas.FunctionDelta(arguments=arguments)
            found.append(schemas.CallDelta(index=i, function=function))
        deltas += [schemas.ChatDelta(tool_calls=[delta]) for delta in found]
    if has_calls and is_last:
        deltas.append(schemas.ChatDelta())
    return deltas
