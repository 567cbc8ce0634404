"""What the API's requests for texts and vectors come to."""

import base64
import struct
from functools import partial
from typing import Any

from fastapi import Request, Response

from llama.prompts import Message
from llama.server import schemas
from llama.server.answers import Scores, new_id, usage
from llama.server.errors import ApiError
from llama.server.events import collect, json_response, single_event, stream
from llama.server.service import Piece, Service, as_dialog


async def complete(
    service: Service, asked: schemas.CompletionRequest, request: Request
) -> Response:
    """Continue texts, or fill in what is missing between two."""
    check_model(service, asked.model)
    score = asked.logprobs is not None
    _check_scores(service, score)
    prompts = [prompt for prompt in _prompts(asked.prompt) for _ in range(asked.n)]
    settings: dict[str, Any] = {
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "max_gen_len": asked.max_tokens,
        "logprobs": score,
        "stop": asked.stops,
        "seed": asked.seed,
    }
    llama = service.llama
    if asked.suffix is None:
        rows, shared = await service.prepare(llama.text_rows, prompts, echo=asked.echo, **settings)
    else:
        suffixes = [asked.suffix] * len(prompts)
        rows, shared = await service.prepare(llama.infilling_rows, prompts, suffixes, **settings)
    decode = llama.tokenizer.decode
    dialog = as_dialog("\n".join(decode(row.prompt) for row in rows[:: asked.n]))
    name, created = new_id("cmpl")
    answer = partial(schemas.Completion, id=name, created=created, model=service.name)
    against = await service.refused(dialog)
    if against is not None:
        refused = [
            schemas.CompletionChoice(index=i, text=against, finish_reason="content_filter")
            for i in range(len(rows))
        ]
        body = answer(choices=refused, usage=usage([]))
        return single_event(body) if asked.stream else json_response(body)
    answers = service.write(rows, shared, dialog, asked.logprobs or 0, asked.timeout)
    scores = [Scores(llama.tokenizer, job, asked.echo) for job in answers.jobs]
    echoed = [decode(row.prompt) if asked.echo else "" for row in rows]

    def choice(i: int, text: str, n_tokens: int, finish: Any) -> schemas.CompletionChoice:
        text, echoed[i] = echoed[i] + text, ""
        logprobs = scores[i].for_completion(n_tokens) if score else None
        return schemas.CompletionChoice(index=i, text=text, logprobs=logprobs, finish_reason=finish)

    def event(piece: Piece) -> schemas.Completion:
        return answer(choices=[choice(*piece)])

    def last() -> schemas.Completion:
        return answer(choices=[], usage=usage(answers.jobs, asked.n))

    if asked.stream:
        return stream(answers, event, last if asked.wants_usage else None)
    texts = await collect(request, answers)
    choices = [
        choice(i, text, len(answers.jobs[i].row.tokens), finish)
        for i, (text, finish) in enumerate(texts)
    ]
    return json_response(answer(choices=choices, usage=usage(answers.jobs, asked.n)))


async def chat(service: Service, asked: schemas.ChatRequest, request: Request) -> Response:
    """Answer a dialog."""
    check_model(service, asked.model)
    _check_scores(service, asked.logprobs)
    dialog = [
        Message(role="system" if m.role == "developer" else m.role, content=m.text)
        for m in asked.messages
    ]
    llama = service.llama
    rows, shared = await service.prepare(
        llama.chat_rows,
        [dialog] * asked.n,
        temperature=asked.temperature,
        top_p=asked.top_p,
        max_gen_len=asked.max_completion_tokens or asked.max_tokens,
        logprobs=asked.logprobs,
        stop=asked.stops,
        seed=asked.seed,
    )
    name, created = new_id("chatcmpl")
    whole = partial(schemas.ChatCompletion, id=name, created=created, model=service.name)
    chunk = partial(schemas.ChatChunk, id=name, created=created, model=service.name)
    scores: list[Scores] = []
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

    against = await service.refused(dialog)
    if against is not None:
        pieces = [Piece(i, against, 0, "content_filter") for i in range(asked.n)]
        if asked.stream:
            return single_event(chunk(choices=[part(*piece) for piece in pieces]))
        return json_response(whole(choices=[choice(*p) for p in pieces], usage=usage([])))
    answers = service.write(rows, shared, dialog, asked.top_logprobs or 0, asked.timeout)
    scores += [Scores(llama.tokenizer, job) for job in answers.jobs]

    def event(piece: Piece) -> schemas.ChatChunk:
        return chunk(choices=[part(*piece)])

    def last() -> schemas.ChatChunk:
        return chunk(choices=[], usage=usage(answers.jobs, asked.n))

    if asked.stream:
        return stream(answers, event, last if asked.wants_usage else None)
    texts = await collect(request, answers)
    choices = [
        choice(i, text, len(answers.jobs[i].row.tokens), finish)
        for i, (text, finish) in enumerate(texts)
    ]
    return json_response(whole(choices=choices, usage=usage(answers.jobs, asked.n)))


async def embed(
    service: Service, asked: schemas.EmbeddingRequest, request: Request
) -> schemas.Embeddings:
    """Vectors of texts."""
    check_model(service, asked.model)
    width = service.llama.model.params.dim
    if asked.dimensions not in (None, width):
        raise ApiError(400, f"the model's vectors have {width} numbers: leave it out", "dimensions")
    prompts = _prompts(asked.input)
    rows, shared = await service.prepare(service.llama.text_rows, prompts, max_gen_len=0)
    answers = service.write(rows, shared, pooling="mean")
    await collect(request, answers)
    data = []
    for i, job in enumerate(answers.jobs):
        assert job.vector is not None
        vector = (job.vector / job.vector.norm().clamp(min=1e-12)).tolist()
        if asked.encoding_format == "base64":
            vector = base64.b64encode(struct.pack(f"<{width}f", *vector)).decode()
        data.append(schemas.Embedding(index=i, embedding=vector))
    n_tokens = sum(len(row.prompt) for row in rows)
    used = schemas.EmbeddingUsage(prompt_tokens=n_tokens, total_tokens=n_tokens)
    return schemas.Embeddings(model=service.name, data=data, usage=used)


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
    if wanted and service.llama.output_guard is not None:
        raise ApiError(400, "behind a guard there are no logprobs: leave it out", "logprobs")
