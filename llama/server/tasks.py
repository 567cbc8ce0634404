"""Answer the API's requests for texts and vectors."""

import base64
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import Request, Response
from pydantic import BaseModel

from llama.chat.prompts import Message
from llama.engine.sequence import Sequence
from llama.sampling import SamplingParams
from llama.server import schemas
from llama.server.answers import Answers
from llama.server.errors import ApiError
from llama.server.events import collect, json_response, stream, unless_disconnected
from llama.server.scores import Scores, new_id, usage
from llama.server.service import Service


async def complete(service: Service, body: schemas.CompletionRequest, request: Request) -> Response:
    """Continue texts, or fill in the middle between two."""
    check_model(service, body.model)
    score = body.logprobs is not None
    _check_scores(service, score)
    tokenizer, tasks = service.llama.tokenizer, service.llama.tasks
    prompts, n, suffix = _prompts(body.prompt), body.n or 1, body.suffix
    repeated = [prompt for prompt in prompts for _ in range(n)]

    def make() -> list[Sequence]:
        params = _params(service, body, body.max_tokens)
        if suffix is not None:
            params = replace(params, logprobs=score, top_logprobs=body.logprobs or 0)
            return tasks.infilling(repeated, [suffix] * len(repeated), params)
        params = replace(
            params, logprobs=score, top_logprobs=body.logprobs or 0, echo=bool(body.echo)
        )
        return tasks.text(repeated, params, in_context=True)

    submission = service.submit(make, len(repeated), n, timeout=body.timeout)
    answers = await unless_disconnected(request, submission)
    name, created = new_id("cmpl")
    answer = partial(schemas.Completion, id=name, created=created, model=service.name)
    scored = answers.jobs if score else []
    scores = [Scores(tokenizer, job, bool(body.echo)) for job in scored]
    echoes = set(range(len(answers.jobs))) - set(answers.refusals) if body.echo else set()

    def choice(i: int, text: str, n_tokens: int, finish: Any) -> schemas.CompletionChoice:
        if i in echoes:
            echoes.remove(i)
            text = tokenizer.decode(answers.jobs[i].sequence.prompt) + text
        logprobs = scores[i].for_completion(n_tokens) if score else None
        return schemas.CompletionChoice(index=i, text=text, logprobs=logprobs, finish_reason=finish)

    return await _respond(request, body, answers, n, (choice, answer), (choice, answer))


async def chat(service: Service, body: schemas.ChatRequest, request: Request) -> Response:
    """Answer a dialog."""
    check_model(service, body.model)
    score = bool(body.logprobs)
    _check_scores(service, score)
    dialog = [
        Message(role="system" if m.role == "developer" else m.role, content=m.text)
        for m in body.messages
    ]
    llama, n = service.llama, body.n or 1

    def make() -> list[Sequence]:
        params = _params(service, body, body.max_completion_tokens or body.max_tokens)
        params = replace(params, logprobs=score, top_logprobs=body.top_logprobs or 0)
        return llama.tasks.chat([dialog] * n, params)

    submission = service.submit(make, n, n, dialogs=[dialog], timeout=body.timeout)
    answers = await unless_disconnected(request, submission)
    scores = [Scores(llama.tokenizer, job) for job in answers.jobs if score]
    name, created = new_id("chatcmpl")
    whole = partial(schemas.ChatCompletion, id=name, created=created, model=service.name)
    chunk = partial(schemas.ChatChunk, id=name, created=created, model=service.name)
    started: set[int] = set()

    def logprobs(i: int, n_tokens: int) -> schemas.ChatLogprobs | None:
        return scores[i].for_chat(n_tokens) if score else None

    def choice(i: int, text: str, n_tokens: int, finish: Any) -> schemas.ChatChoice:
        message = schemas.ChatAnswer(content=text)
        return schemas.ChatChoice(
            index=i, message=message, logprobs=logprobs(i, n_tokens), finish_reason=finish
        )

    def part(i: int, text: str, n_tokens: int, finish: Any) -> schemas.ChatChunkChoice:
        delta = schemas.ChatDelta(content=text)
        if i not in started:
            delta.role = "assistant"
            started.add(i)
        return schemas.ChatChunkChoice(
            index=i, delta=delta, logprobs=logprobs(i, n_tokens), finish_reason=finish
        )

    return await _respond(request, body, answers, n, (choice, whole), (part, chunk))


Form = tuple[Callable[..., BaseModel], Callable[..., BaseModel]]


async def _respond(
    request: Request,
    body: schemas.CompletionRequest | schemas.ChatRequest,
    answers: Answers,
    n: int,
    whole: Form,
    event: Form,
) -> Response:
    """Return answers whole or as events, as the request says.

    Args:
        whole: makes a choice of (number, text, number of tokens, finish reason), and a response
            of choices and usage.
        event: the same for an event, which has one choice.
    """
    if body.stream:
        part, chunk = event
        without_choices = partial(chunk, choices=[])
        last = (lambda: without_choices(usage=usage(answers.jobs, n))) if body.wants_usage else None
        scored = body.logprobs is not None and body.logprobs is not False
        return stream(answers, lambda piece: chunk(choices=[part(*piece)]), last, scored)
    choice, response = whole
    texts = await collect(request, answers)

    def build() -> BaseModel:
        choices = [
            choice(i, text, len(answers.jobs[i].sequence.tokens), finish)
            for i, (text, finish) in enumerate(texts)
        ]
        return response(choices=choices, usage=usage(answers.jobs, n))

    return await json_response(build)


async def embed(service: Service, body: schemas.EmbeddingRequest, request: Request) -> Response:
    """Return vectors of texts."""
    check_model(service, body.model)
    width = service.llama.model.params.dim
    if body.dimensions not in (None, width):
        raise ApiError(400, f"the model's vectors have {width} numbers: leave it out", "dimensions")
    texts = _prompts(body.input)
    submission = service.submit(lambda: service.llama.tasks.read(texts, "mean"), len(texts))
    answers = await unless_disconnected(request, submission)
    await collect(request, answers)

    def build() -> schemas.Embeddings:
        data = []
        for i, job in enumerate(answers.jobs):
            pooled = job.sequence.pooled
            assert pooled is not None
            vector = (pooled / pooled.norm().clamp(min=1e-12)).tolist()
            if body.encoding_format == "base64":
                vector = base64.b64encode(struct.pack(f"<{width}f", *vector)).decode()
            data.append(schemas.Embedding(index=i, embedding=vector))
        n_tokens = sum(len(job.sequence.prompt) for job in answers.jobs)
        used = schemas.EmbeddingUsage(prompt_tokens=n_tokens, total_tokens=n_tokens)
        return schemas.Embeddings(model=service.name, data=data, usage=used)

    return await json_response(build)


def check_model(service: Service, model: str | None) -> None:
    """Raise ``ApiError`` if a request is for another model than the served one."""
    if model not in (None, service.name):
        raise ApiError(
            404,
            f"there is no model {model!r} here: this server has {service.name!r}",
            "model",
            "model_not_found",
        )


def _params(
    service: Service, body: schemas.CompletionRequest | schemas.ChatRequest, max_tokens: int | None
) -> SamplingParams:
    n_lookup = service.config.prompt_lookup_num_tokens
    return SamplingParams(
        max_gen_len=max_tokens, prompt_lookup_num_tokens=n_lookup, **body.sampling
    )


def _prompts(value: Any) -> list[Any]:
    """Return a list of prompts, of a text, token ids, or a list of either."""
    if isinstance(value, str) or isinstance(value[0], int):
        return [value]
    return list(value)


def _check_scores(service: Service, score: bool) -> None:
    if score and (service.llama.input_guard or service.llama.output_guard):
        raise ApiError(400, "a server with a guard returns no logprobs: leave it out", "logprobs")
