"""What the API's requests for texts and vectors come to."""

import base64
import struct
from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import Request, Response
from pydantic import BaseModel

from llama.chat.prompts import Message
from llama.server import schemas
from llama.server.answers import Answers
from llama.server.errors import ApiError
from llama.server.events import collect, json_response, stream, unless_gone
from llama.server.scores import Scores, new_id, usage
from llama.server.service import Service


async def complete(
    service: Service, asked: schemas.CompletionRequest, request: Request
) -> Response:
    """Continue texts, or fill in what is missing between two."""
    check_model(service, asked.model)
    score = asked.logprobs is not None
    _check_scores(service, score)
    llama, prompts, n = service.llama, _prompts(asked.prompt), asked.n or 1
    settings: dict[str, Any] = {
        "max_gen_len": asked.max_tokens,
        "logprobs": score,
        **asked.sampling,
    }
    how: dict[str, Any] = {"n": n, "n_top": asked.logprobs or 0, "timeout": asked.timeout}
    if asked.suffix is None:
        settings |= {"echo": bool(asked.echo), "in_context": True}
        work = service.ask(llama.text_rows, prompts, **how, **settings)
    else:
        suffixes = [asked.suffix]
        work = service.ask(llama.infilling_rows, prompts, suffixes, **how, **settings)
    answers = await unless_gone(request, work)
    name, created = new_id("cmpl")
    answer = partial(schemas.Completion, id=name, created=created, model=service.name)
    scored = answers.jobs if score else []
    scores = [Scores(llama.tokenizer, job, bool(asked.echo)) for job in scored]
    echoes = set(range(len(answers.jobs))) - set(answers.refusals) if asked.echo else set()

    def choice(i: int, text: str, n_tokens: int, finish: Any) -> schemas.CompletionChoice:
        if i in echoes:
            echoes.remove(i)
            text = llama.tokenizer.decode(answers.jobs[i].row.prompt) + text
        logprobs = scores[i].for_completion(n_tokens) if score else None
        return schemas.CompletionChoice(index=i, text=text, logprobs=logprobs, finish_reason=finish)

    return await _respond(request, asked, answers, n, (choice, answer), (choice, answer))


async def chat(service: Service, asked: schemas.ChatRequest, request: Request) -> Response:
    """Answer a dialog."""
    check_model(service, asked.model)
    _check_scores(service, bool(asked.logprobs))
    dialog = [
        Message(role="system" if m.role == "developer" else m.role, content=m.text)
        for m in asked.messages
    ]
    llama, n = service.llama, asked.n or 1
    work = service.ask(
        llama.chat_rows,
        [dialog],
        n=n,
        dialogs=[dialog],
        n_top=asked.top_logprobs or 0,
        timeout=asked.timeout,
        max_gen_len=asked.max_completion_tokens or asked.max_tokens,
        logprobs=bool(asked.logprobs),
        **asked.sampling,
    )
    answers = await unless_gone(request, work)
    scores = [Scores(llama.tokenizer, job) for job in answers.jobs if asked.logprobs]
    name, created = new_id("chatcmpl")
    whole = partial(schemas.ChatCompletion, id=name, created=created, model=service.name)
    chunk = partial(schemas.ChatChunk, id=name, created=created, model=service.name)
    begun: set[int] = set()

    def told(i: int, n_tokens: int) -> schemas.ChatLogprobs | None:
        return scores[i].for_chat(n_tokens) if asked.logprobs else None

    def choice(i: int, text: str, n_tokens: int, finish: Any) -> schemas.ChatChoice:
        message = schemas.ChatAnswer(content=text)
        logprobs = told(i, n_tokens)
        return schemas.ChatChoice(index=i, message=message, logprobs=logprobs, finish_reason=finish)

    def part(i: int, text: str, n_tokens: int, finish: Any) -> schemas.ChatChunkChoice:
        delta = schemas.ChatDelta(content=text)
        if i not in begun:
            delta.role = "assistant"
            begun.add(i)
        logprobs = told(i, n_tokens)
        return schemas.ChatChunkChoice(
            index=i, delta=delta, logprobs=logprobs, finish_reason=finish
        )

    return await _respond(request, asked, answers, n, (choice, whole), (part, chunk))


Form = tuple[Callable[..., BaseModel], Callable[..., BaseModel]]


async def _respond(
    request: Request,
    asked: schemas.CompletionRequest | schemas.ChatRequest,
    answers: Answers,
    n: int,
    whole: Form,
    event: Form,
) -> Response:
    """Answers as they are asked for.

    Args:
        whole: what makes a choice of (number, text, how many tokens, why it ends), and what makes
            a body of choices and usage.
        event: the same for an event, of which each has one choice.
    """

    def told() -> schemas.Usage:
        return usage(answers.jobs, n)

    if asked.stream:
        part, chunk = event
        last = (lambda: chunk(choices=[], usage=told())) if asked.wants_usage else None
        scored = asked.logprobs is not None and asked.logprobs is not False
        return stream(answers, lambda piece: chunk(choices=[part(*piece)]), last, scored)
    choice, body = whole
    texts = await collect(request, answers)

    def build() -> BaseModel:
        choices = [
            choice(i, text, len(answers.jobs[i].row.tokens), finish)
            for i, (text, finish) in enumerate(texts)
        ]
        return body(choices=choices, usage=told())

    return await json_response(build)


async def embed(service: Service, asked: schemas.EmbeddingRequest, request: Request) -> Response:
    """Vectors of texts."""
    check_model(service, asked.model)
    width = service.llama.model.params.dim
    if asked.dimensions not in (None, width):
        raise ApiError(400, f"the model's vectors have {width} numbers: leave it out", "dimensions")
    settings: dict[str, Any] = {"max_gen_len": 0, "prompt_lookup_num_tokens": 0, "embed": True}
    build, prompts = service.llama.text_rows, _prompts(asked.input)
    answers = await unless_gone(request, service.ask(build, prompts, **settings))
    await collect(request, answers)

    def body() -> schemas.Embeddings:
        data = []
        for i, job in enumerate(answers.jobs):
            assert job.vector is not None
            vector = (job.vector / job.vector.norm().clamp(min=1e-12)).tolist()
            if asked.encoding_format == "base64":
                vector = base64.b64encode(struct.pack(f"<{width}f", *vector)).decode()
            data.append(schemas.Embedding(index=i, embedding=vector))
        n_tokens = sum(len(job.row.prompt) for job in answers.jobs)
        used = schemas.EmbeddingUsage(prompt_tokens=n_tokens, total_tokens=n_tokens)
        return schemas.Embeddings(model=service.name, data=data, usage=used)

    return await json_response(body)


def check_model(service: Service, model: str | None) -> None:
    """Raise an ``ApiError`` where another model is asked for than is served."""
    if model not in (None, service.name):
        raise ApiError(
            404,
            f"there is no model {model!r} here: this server has {service.name!r}",
            "model",
            "model_not_found",
        )


def _prompts(given: Any) -> list[Any]:
    """A list of prompts, from the four ways to give them."""
    if isinstance(given, str) or isinstance(given[0], int):
        return [given]
    return list(given)


def _check_scores(service: Service, wanted: bool) -> None:
    if wanted and (service.llama.input_guard or service.llama.output_guard):
        raise ApiError(400, "behind a guard there are no logprobs: leave it out", "logprobs")
