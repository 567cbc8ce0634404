"""Answer the API's requests for texts and vectors."""

import base64
import math
import struct
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from llama.adapters import n_virtual
from llama.engine.sequence import Sequence as EngineSequence
from llama.errors import short
from llama.server import schemas
from llama.server.about import model_meta
from llama.server.answers import Piece
from llama.server.errors import ApiError, ContextLengthExceeded
from llama.server.events import Events, collect, json_response, stream, unless_disconnected
from llama.server.loop import Job
from llama.server.scores import Scores, new_id, usage
from llama.server.service import Service
from llama.server.spelled import continue_spelled
from llama.tokenizer import BaseTokenizer

_AT_ONCE = 32  # vectors that are written to the network together


async def complete(service: Service, body: schemas.CompletionRequest, request: Request) -> Response:
    """Continue texts, or fill in the middle between two."""
    adapter = chosen_adapter(service, body.model)
    score = body.logprobs is not None
    check_scores(service, score)
    tokenizer, tasks = service.llama.tokenizer, service.llama.tasks
    prompts, n, suffix = _prompts(body.prompt), body.n_generated, body.suffix
    if suffix == "" and not service.infills:
        suffix = None  # asks for nothing
    echo = bool(body.echo) and suffix is None
    parses = service.config.parse_special if body.parse_special is None else body.parse_special
    last = n_last(service, body.truncate_prompt_tokens, adapter, body.max_tokens)

    def make() -> list[EngineSequence]:
        params = service.params(
            max_gen_len=body.max_tokens,
            logprobs=score or n > (body.n or 1),
            top_logprobs=body.logprobs or 0,
            echo=echo and score,
            adapter=adapter,
            **body.generation | {"n": n},
        )
        if suffix is not None:
            return tasks.infilling(prompts, [suffix], params)
        if parses:
            return continue_spelled(service, prompts, params, last)
        return tasks.text(shortened(tokenizer, prompts, last), params, in_context=True)

    has_form = body.response_format is not None
    submission = service.submit(
        make, len(prompts) * n, n, timeout=body.timeout, has_form=has_form, has_scores=score
    )
    answers = await unless_disconnected(request, submission)
    name, created = new_id("cmpl")
    answer = partial(schemas.Completion, id=name, created=created, model=adapter or service.name)
    scored = answers.jobs if score else []
    scores = [Scores(tokenizer, job, echo) for job in scored]
    echoes = set(range(len(answers.jobs))) - set(answers.refusals) if echo else set()

    def choice(piece: Piece, index: int | None = None) -> schemas.CompletionChoice:
        i, text = piece.number, piece.text
        if i in echoes:
            echoes.remove(i)
            text = tokenizer.decode(answers.jobs[i].sequence.prompt) + text
        return schemas.CompletionChoice(
            index=i if index is None else index,
            text=text,
            logprobs=scores[i].for_completion(piece.n_tokens) if score else None,
            finish_reason=piece.finish,
            stop_reason=piece.stop_reason,
        )

    if not body.stream:
        pieces = best(await collect(request, answers), answers.jobs, body.n or 1, n)
        return await json_response(
            lambda: answer(
                choices=[choice(piece, i) for i, piece in enumerate(pieces)],
                usage=usage(answers.jobs, n),
            )
        )
    return stream(
        answers,
        Events(
            piece=lambda piece: [answer(choices=[choice(piece)])],
            last=lambda: [answer(choices=[], usage=usage(answers.jobs, n))] * body.wants_usage,
            is_scored=score,
        ),
    )


def best(pieces: Sequence[Piece], jobs: Sequence[Job], n: int, best_of: int) -> list[Piece]:
    """Return the ``n`` best of each prompt's answers, the best one first.

    The better one has the higher mean log-probability of its tokens. An empty answer comes after
    all texts, and one that a guard has refused comes last.

    Args:
        pieces: whole answers, ``best_of`` to each prompt in a row.
        jobs: theirs.
    """
    if best_of == n:
        return list(pieces)

    def rank(piece: Piece) -> tuple[bool, float]:
        scores = jobs[piece.number].sequence.logprobs
        return piece.finish != "content_filter", fmean(scores) if scores else -math.inf

    of_prompts = [pieces[i : i + best_of] for i in range(0, len(pieces), best_of)]
    return [piece for some in of_prompts for piece in sorted(some, key=rank, reverse=True)[:n]]


def n_last(
    service: Service, asked: int | None, adapter: str | None, n_new: int | None
) -> int | None:
    """Return how many tokens of a prompt are kept, for a request's ``truncate_prompt_tokens``.

    Args:
        adapter: the name of the one that the request has chosen.
        n_new: tokens that the answer may have; None for as many as fit.
    """
    if asked != -1:
        return asked
    found = None if adapter is None else service.llama.adapters.get(adapter)
    room = service.max_tokens - n_virtual(found)
    # A client that asks for more than there is, or for no number, still has its prompt read.
    return room - min(room if n_new is None else n_new, room // 4)


def shortened(tokenizer: BaseTokenizer, prompts: list[Any], last: int | None) -> list[Any]:
    """Return texts or token ids, of which the last tokens are kept; all of them for None."""
    if last is None:
        return prompts
    bos = tokenizer.add_bos
    ids = (
        tokenizer.encode(prompt, bos=bos, eos=False) if isinstance(prompt, str) else prompt
        for prompt in prompts
    )
    return [kept[-last:] or prompt for kept, prompt in zip(ids, prompts, strict=True)]


async def embed(service: Service, body: schemas.EmbeddingRequest, request: Request) -> Response:
    """Return vectors of texts."""
    adapter = chosen_adapter(service, body.model)
    width = service.llama.model.params.dim
    if body.dimensions not in (None, width):
        raise ApiError(400, f"the model's vectors have {width} numbers: leave it out", "dimensions")
    texts = _prompts(body.input)
    tokenizer, tasks = service.llama.tokenizer, service.llama.tasks
    last = n_last(service, body.truncate_prompt_tokens, adapter, 0)

    def make() -> list[EngineSequence]:
        return tasks.read(shortened(tokenizer, texts, last), "mean", adapter)

    submission = service.submit(make, len(texts))
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


def _encoded(sequences: list[EngineSequence], in_base64: bool) -> Iterator[bytes]:
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
        ApiError: it is neither, and the server wasn't started with --any_model.
    """
    own = (service.name, *service.config.aliases)
    if not model or model in own:
        return None
    if model in service.llama.adapters:
        return model
    if service.config.any_model:
        return None
    names = ", ".join(repr(name) for name in (*own, *service.llama.adapters))
    raise ApiError(
        404,
        f"there is no model {short(model, 80)} here: this server has {names}; --any_model has it "
        "answer to any name",
        "model",
        "model_not_found",
    )


def model_named(service: Service, name: str) -> schemas.Model:
    """Return the model that requests get by a name, under this name.

    Raises:
        ApiError: there is none.
    """
    adapter, known = chosen_adapter(service, name), models(service)
    found = next((each for each in known if each.id == adapter), known[0])
    return found.model_copy(update={"id": name})


def models(service: Service) -> list[schemas.Model]:
    """Return what a request's model may be: the served one, its aliases, then the adapters."""
    of_all: Any = {"created": service.created, "max_model_len": service.max_tokens}
    of_all["meta"] = model_meta(service)
    directories = service.config.lora_directories()
    names, root = (service.name, *service.config.aliases), service.config.root
    found = [schemas.Model(id=name, root=root, **of_all) for name in names]
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
