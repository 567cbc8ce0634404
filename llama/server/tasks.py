"""Answer the API's requests for texts and vectors."""

import base64
import struct
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from llama.adapters import n_virtual
from llama.engine.sequence import Sequence
from llama.server import schemas
from llama.server.answers import Piece
from llama.server.errors import ApiError, ContextLengthExceeded
from llama.server.events import Events, collect, json_response, stream, unless_disconnected
from llama.server.scores import Scores, new_id, usage
from llama.server.service import Service
from llama.server.spelled import continue_spelled

_AT_ONCE = 32  # vectors that are written to the network together


async def complete(service: Service, body: schemas.CompletionRequest, request: Request) -> Response:
    """Continue texts, or fill in the middle between two."""
    adapter = chosen_adapter(service, body.model)
    score = body.logprobs is not None
    check_scores(service, score)
    tokenizer, tasks = service.llama.tokenizer, service.llama.tasks
    prompts, n, suffix = _prompts(body.prompt), body.n or 1, body.suffix
    echo = bool(body.echo) and suffix is None
    parses = service.config.parse_special if body.parse_special is None else body.parse_special

    def make() -> list[Sequence]:
        params = service.params(
            max_gen_len=body.max_tokens,
            logprobs=score,
            top_logprobs=body.logprobs or 0,
            echo=echo,
            adapter=adapter,
            **body.generation,
        )
        if suffix is not None:
            return tasks.infilling(prompts, [suffix], params)
        if parses:
            return continue_spelled(service, prompts, params)
        return tasks.text(prompts, params, in_context=True)

    has_form = body.response_format is not None
    submission = service.submit(make, len(prompts) * n, n, timeout=body.timeout, has_form=has_form)
    answers = await unless_disconnected(request, submission)
    name, created = new_id("cmpl")
    answer = partial(schemas.Completion, id=name, created=created, model=adapter or service.name)
    scored = answers.jobs if score else []
    scores = [Scores(tokenizer, job, echo) for job in scored]
    echoes = set(range(len(answers.jobs))) - set(answers.refusals) if echo else set()

    def choice(piece: Piece) -> schemas.CompletionChoice:
        i, text = piece.number, piece.text
        if i in echoes:
            echoes.remove(i)
            text = tokenizer.decode(answers.jobs[i].sequence.prompt) + text
        return schemas.CompletionChoice(
            index=i,
            text=text,
            logprobs=scores[i].for_completion(piece.n_tokens) if score else None,
            finish_reason=piece.finish,
            stop_reason=piece.stop_reason,
        )

    if not body.stream:
        pieces = await collect(request, answers)
        return await json_response(
            lambda: answer(choices=list(map(choice, pieces)), usage=usage(answers.jobs, n))
        )
    return stream(
        answers,
        Events(
            piece=lambda piece: [answer(choices=[choice(piece)])],
            last=lambda: [answer(choices=[], usage=usage(answers.jobs, n))] * body.wants_usage,
            is_scored=score,
        ),
    )


async def embed(service: Service, body: schemas.EmbeddingRequest, request: Request) -> Response:
    """Return vectors of texts."""
    adapter = chosen_adapter(service, body.model)
    width = service.llama.model.params.dim
    if body.dimensions not in (None, width):
        raise ApiError(400, f"the model's vectors have {width} numbers: leave it out", "dimensions")
    texts = _prompts(body.input)
    tasks = service.llama.tasks
    submission = service.submit(lambda: tasks.read(texts, "mean", adapter), len(texts))
    try:
        answers = await unless_disconnected(request, submission)
    except ContextLengthExceeded as error:
        raise error.of("input") from error
    await collect(request, answers)

    n_tokens = sum(len(job.sequence.prompt) for job in answers.jobs)
    used = schemas.EmbeddingUsage(prompt_tokens=n_tokens, total_tokens=n_tokens)
    whole = schemas.Embeddings(model=adapter or service.name, data=[], usage=used)
    in_base64 = body.encoding_format == "base64"
    vectors = _encoded([job.sequence for job in answers.jobs], in_base64)
    return StreamingResponse(_with_data(whole, vectors), media_type="application/json")


def _encoded(sequences: list[Sequence], in_base64: bool) -> Iterator[bytes]:
    """Yield the vectors of texts as JSON, and free them."""
    for i, sequence in enumerate(sequences):
        assert sequence.pooled is not None
        pooled, sequence.pooled = sequence.pooled, None
        vector = (pooled / pooled.norm().clamp(min=1e-12)).tolist()
        if in_base64:
            vector = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        yield schemas.Embedding(index=i, embedding=vector).model_dump_json().encode()


def _with_data(whole: schemas.Embeddings, data: Iterator[bytes]) -> Iterator[bytes]:
    """Yield an answer in parts: whole, 2,048 vectors would take a gigabyte of memory."""
    before, mark, after = whole.model_dump_json().partition('"data":[')
    yield (before + mark).encode()
    is_first = True
    while some := list(islice(data, _AT_ONCE)):
        yield b"," * (not is_first) + b",".join(some)
        is_first = False
    yield after.encode()


def chosen_adapter(service: Service, model: str | None) -> str | None:
    """Return the adapter that is a request's model; None for the served model itself.

    Raises:
        ApiError: it is neither.
    """
    if model in (None, service.name):
        return None
    if model not in service.llama.adapters:
        names = ", ".join(repr(name) for name in (service.name, *service.llama.adapters))
        raise ApiError(
            404,
            f"there is no model {model!r} here: this server has {names}",
            "model",
            "model_not_found",
        )
    return model


def models(service: Service) -> list[schemas.Model]:
    """Return what a request's model may be: the served one, then the adapters."""
    of_all: Any = {"created": service.created, "max_model_len": service.max_tokens}
    directories = service.config.lora_directories()
    found = [schemas.Model(id=service.name, root=service.config.root, **of_all)]
    for name in service.llama.adapters:
        adapter = service.llama.adapters.get(name)
        if adapter is None:  # unloaded just now
            continue
        # Clients needn't know where on this machine it lies.
        root = Path(directories[name]).resolve().name if name in directories else name
        limit = {"max_model_len": service.max_tokens - n_virtual(adapter)}
        found.append(schemas.Model(id=name, root=root, parent=service.name, **of_all | limit))
    return found


def _prompts(value: Any) -> list[Any]:
    """Return a list of prompts, of a text, token ids, or a list of either."""
    if isinstance(value, str) or isinstance(value[0], int):
        return [value]
    return list(value)


def check_scores(service: Service, score: bool) -> None:
    """Raise ``ApiError`` if a request wants log-probabilities, which would tell a guarded text."""
    if score and (service.llama.input_guard or service.llama.output_guard):
        raise ApiError(400, "a server with a guard returns no logprobs: leave it out", "logprobs")
