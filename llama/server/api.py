"""OpenAI's API: https://platform.openai.com/docs/api-reference."""

from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama.server import (
    dialogs,
    infill,
    ranking,
    responses,
    schemas,
    schemas_chat,
    schemas_infill,
    schemas_ranking,
    schemas_responses,
    schemas_tokens,
    tasks,
    tokens,
)
from llama.server.access import AccessControl
from llama.server.errors import ErrorMiddleware, add_error_handlers
from llama.server.events import soon
from llama.server.lenient import HEADER, LenientFields
from llama.server.paths import UniformRequests
from llama.server.service import Service
from llama.server.threads import RequestThread

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.ErrorAnswer, "description": text}
    for status, text in (
        (400, "The request is wrong."),
        (401, "The API key is missing or wrong."),
        (403, "The request names another host, and the server has no key."),
        (404, "There is no such model."),
        (413, "The request is too large."),
        (429, "The queue is full: try again later."),
        (500, "The server failed."),
        (501, "The server lacks a package that the request needs."),
        (503, "The server is shutting down."),
        (504, "The request took longer than its timeout."),
    )
}


def make_app(service: Service) -> FastAPI:
    """Return the app that serves a model."""
    config, app = service.config, make_core(service)
    app.add_middleware(
        AccessControl,
        api_key=config.api_key,
        local=config.is_local,
        max_body=config.max_body,
        is_draining=lambda: service.loop.draining,
    )
    app.add_middleware(
        CORSMiddleware,
        allow_origins=config.origins,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["Retry-After", HEADER],
        allow_private_network=bool(config.origins),
    )
    app.add_middleware(RequestCounter, service=service)
    app.add_middleware(UniformRequests, root_path=config.root_path)
    return app


def make_core(service: Service) -> FastAPI:
    """Return the part of the app that answers requests, whoever sends them."""
    # FastAPI's own page at /docs loads its style sheets and scripts from other hosts.
    app = FastAPIOffline(
        title="llama",
        summary="Text, chat and infilling by a Llama",
        redoc_url=None,
        redirect_slashes=False,  # UniformRequests takes them off
    )
    add_error_handlers(app)
    app.include_router(_routes(service))
    # From the innermost to the outermost.
    if service.config.lenient:
        app.add_middleware(LenientFields)
    app.add_middleware(ErrorMiddleware)
    return app


class RequestCounter:
    """ASGI middleware that counts requests by path and status."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def count_and_send(message: Message) -> None:
            if message["type"] == "http.response.start" and scope["type"] == "http":
                route = scope.get("route")
                # Other paths share a label: clients could create any number of labels.
                path = getattr(route, "path", "other")
                self._service.metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        await self._app(scope, receive, count_and_send)


def _routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models", responses={k: ERRORS[k] for k in (401, 403)}, tags=["models"])
    async def models() -> schemas.Models:
        """Return the served model, and the adapters that are models too."""
        return schemas.Models(data=tasks.models(service))

    @router.get("/v1/models/{model:path}", responses=ERRORS, tags=["models"])
    async def model(model: str) -> schemas.Model:
        """Return a model, if it is the served one or an adapter."""
        return tasks.model_named(service, model)

    @router.post("/v1/completions", **_text_route(schemas.Completion, schemas.Completion))
    async def completions(body: schemas.CompletionRequest, request: Request) -> Response:
        """Continue texts, or fill in the middle between ``prompt`` and ``suffix``."""
        return await soon(tasks.complete(service, body, request), body.stream)

    of_chat = _text_route(schemas_chat.ChatCompletion, schemas_chat.ChatChunk)

    @router.post("/v1/chat/completions", **of_chat)
    async def chat_completions(body: schemas_chat.ChatRequest, request: Request) -> Response:
        """Answer a dialog, with text or with calls of tools."""
        return await soon(dialogs.chat(service, body, request), body.stream)

    of_responses = _text_route(
        schemas_responses.ModelResponse,
        schemas_responses.ResponseEvent,
        "server-sent events: `event: ` their type, `data: ResponseEvent`.",
    )

    @router.post("/v1/responses", **of_responses)
    async def create_response(
        body: schemas_responses.ResponsesRequest, request: Request
    ) -> Response:
        """Answer a dialog in the form of items. Nothing is kept for a later request."""
        return await soon(responses.respond(service, body, request), body.stream)

    _add_infilling(router, service)
    _add_ranking(router, service)
    _add_tokens(router, service)
    vectors: Any = {"response_model": schemas.Embeddings, "responses": ERRORS}

    @router.post("/v1/embeddings", **vectors, tags=["vectors"])
    async def embeddings(body: schemas.EmbeddingRequest, request: Request) -> Response:
        """Return vectors of texts, of length 1: the mean of the last hidden states."""
        return await tasks.embed(service, body, request)

    @router.get("/health", responses={503: {"model": schemas.Health}}, tags=["server"])
    async def health(response: Response) -> schemas.Health:
        """Return whether the server accepts requests. Needs no key."""
        loop = service.loop
        response.status_code = 503 if loop.draining else 200
        return schemas.Health(
            status="draining" if loop.draining else "ok",
            active=loop.n_active,
            waiting=loop.n_waiting,
        )

    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}, 401: ERRORS[401], 403: ERRORS[403]},
        tags=["server"],
    )
    async def metrics() -> Response:
        """Return metrics in Prometheus's text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return router


def _add_infilling(router: APIRouter, service: Service) -> None:
    of_infill = _text_route(
        schemas_infill.Infill,
        schemas_infill.InfillPiece,
        "server-sent events: `data: InfillPiece`, then `data: Infill`.",
    )

    of_infill["response_model"] = schemas_infill.Infill | schemas_infill.SelectedFields

    @router.post("/infill", **of_infill)
    async def infill_texts(body: schemas_infill.InfillRequest, request: Request) -> Response:
        """Fill in the middle between texts, which are cut to fit, as llama.cpp's server does."""
        return await soon(infill.infill(service, body, request), body.stream)

    of_fim = _text_route(schemas_chat.ChatCompletion, schemas_chat.ChatChunk)

    @router.post("/v1/fim/completions", **of_fim)
    async def fill_in(body: schemas_infill.FimRequest, request: Request) -> Response:
        """Fill in the middle between ``prompt`` and ``suffix``, as Mistral's API does."""
        return await soon(infill.fill_in(service, body, request), body.stream)


def _add_ranking(router: APIRouter, service: Service) -> None:
    @router.post(
        "/classify",
        response_model=schemas_ranking.Classes,
        responses=ERRORS,
        tags=["classes"],
    )
    async def classify(body: schemas_ranking.ClassifyRequest, request: Request) -> Response:
        """Return the most probable label of each text, of a model with a classifier's head."""
        return await ranking.classify(service, body, request)

    of_rerank: Any = {"response_model": schemas_ranking.Ranking, "responses": ERRORS}

    @router.post("/v2/rerank", **of_rerank, tags=["classes"], include_in_schema=False)
    @router.post("/rerank", **of_rerank, tags=["classes"], include_in_schema=False)
    @router.post("/v1/rerank", **of_rerank, tags=["classes"])
    async def rerank(body: schemas_ranking.RerankRequest, request: Request) -> Response:
        """Return documents by their relevance to a query, of a model with a head of one label."""
        return await ranking.rerank(service, body, request)


def _add_tokens(router: APIRouter, service: Service) -> None:
    thread = RequestThread("tokens", service.config.timeout)

    def about(answer: type[BaseModel]) -> dict[str, Any]:
        return {"response_model": answer, "responses": ERRORS, "tags": ["tokens"]}

    @router.post("/tokenize", **about(schemas_tokens.Tokenized))
    async def tokenize(body: schemas_tokens.TokenizeRequest, request: Request) -> Response:
        """Return the tokens of a text, or of a dialog's prompt."""
        return await thread.answer(request, lambda: tokens.tokenize(service, body))

    @router.post("/detokenize", **about(schemas_tokens.Detokenized))
    async def detokenize(body: schemas_tokens.DetokenizeRequest, request: Request) -> Response:
        """Return the text of tokens."""
        return await thread.answer(request, lambda: tokens.detokenize(service, body))

    @router.post("/apply-template", **about(schemas_tokens.AppliedTemplate))
    async def apply_template(body: schemas_chat.ChatRequest, request: Request) -> Response:
        """Return the prompt that a request of /v1/chat/completions has, as a text."""
        return await thread.answer(request, lambda: tokens.apply_template(service, body))

    @router.get("/tokenizer_info", responses={k: ERRORS[k] for k in (401, 403)}, tags=["tokens"])
    async def tokenizer_info() -> schemas_tokens.TokenizerInfo:
        """Return the tokenizer's special tokens, and the chat template."""
        return tokens.tokenizer_info(service)


def _text_route(
    whole: type[BaseModel], event: type[BaseModel], events: str | None = None
) -> dict[str, Any]:
    """Return a route's description, for an answer that is sent whole or as events."""
    default = f"server-sent events: `data: {event.__name__}`, then `data: [DONE]`."
    text = f"With stream=true, {events or default}"
    data = {"type": "string", "description": text}
    schema = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    content = {"text/event-stream": {"schema": schema}}
    responses = {200: {"content": content}, **ERRORS}
    return {"response_model": whole, "responses": responses, "tags": ["text"]}
