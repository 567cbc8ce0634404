"""OpenAI's API: https://platform.openai.com/docs/api-reference."""

from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama.server import schemas, tasks
from llama.server.access import AccessControl
from llama.server.errors import Failures, add_error_handlers
from llama.server.service import Service

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.ErrorAnswer, "description": text}
    for status, text in (
        (400, "The request is wrong."),
        (401, "The API key is missing or wrong."),
        (403, "The request names another host."),
        (404, "There is no such model."),
        (413, "The request is too large."),
        (429, "The queue is full: try again later."),
        (500, "The server failed."),
        (503, "The server is shutting down."),
        (504, "The request took longer than its timeout."),
    )
}


def make_app(service: Service) -> FastAPI:
    """Return the API of a served model."""
    config = service.config
    # FastAPI's own page at /docs would ask other hosts for its looks.
    app = FastAPIOffline(
        title="llama", summary="Text, chat and infilling by a Llama", redoc_url=None
    )
    add_error_handlers(app)
    app.include_router(_routes(service))
    # From the innermost to the outermost.
    app.add_middleware(Failures)
    app.add_middleware(
        AccessControl,
        api_key=config.api_key,
        local=config.is_local,
        max_body=config.max_body,
        ends=lambda: service.loop.draining,
    )
    # Also without origins: the page's library would set rules of its own otherwise.
    app.add_middleware(
        CORSMiddleware,
        allow_origins=config.origins,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["Retry-After"],
        allow_private_network=bool(config.origins),
    )
    app.add_middleware(_Counted, service=service)
    return app


class _Counted:
    """Counts the answers, by path and status."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start" and scope["type"] == "http":
                route = scope.get("route")
                # Only known paths: others would be as many as anyone likes.
                path = getattr(route, "path", "other")
                self._service.metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        await self._app(scope, receive, counted)


def _routes(service: Service) -> APIRouter:
    router = APIRouter()
    served = schemas.Model(
        id=service.name, created=service.created, max_model_len=service.max_tokens
    )

    @router.get("/v1/models", responses={k: _ERRORS[k] for k in (401, 403)}, tags=["models"])
    async def models() -> schemas.Models:
        """The one model that is served."""
        return schemas.Models(data=[served])

    @router.get("/v1/models/{model:path}", responses=_ERRORS, tags=["models"])
    async def model(model: str) -> schemas.Model:
        """A model, if it is the one that is served."""
        tasks.check_model(service, model)
        return served

    @router.post(
        "/v1/completions",
        response_model=schemas.Completion,
        responses=_with_stream(schemas.Completion),
        tags=["text"],
    )
    async def completions(asked: schemas.CompletionRequest, request: Request) -> Response:
        """Continue texts, or with ``suffix`` fill in what is between two."""
        return await tasks.complete(service, asked, request)

    @router.post(
        "/v1/chat/completions",
        response_model=schemas.ChatCompletion,
        responses=_with_stream(schemas.ChatChunk),
        tags=["text"],
    )
    async def chat_completions(asked: schemas.ChatRequest, request: Request) -> Response:
        """Answer a dialog."""
        return await tasks.chat(service, asked, request)

    @router.post(
        "/v1/embeddings",
        response_model=schemas.Embeddings,
        responses=_ERRORS,
        tags=["vectors"],
    )
    async def embeddings(asked: schemas.EmbeddingRequest, request: Request) -> Response:
        """Vectors of texts, of length 1: the mean of the network's last hidden states."""
        return await tasks.embed(service, asked, request)

    @router.get("/health", responses={503: {"model": schemas.Health}}, tags=["server"])
    async def health(response: Response) -> schemas.Health:
        """Whether the server takes requests. Needs no key."""
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
        responses={200: {"content": {"text/plain": {}}}, 401: _ERRORS[401], 403: _ERRORS[403]},
        tags=["server"],
    )
    async def metrics() -> Response:
        """Prometheus's metrics."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return router


def _with_stream(event: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    text = f"With stream=true, server-sent events: `data: {event.__name__}`, then `data: [DONE]`."
    data = {"type": "string", "description": text}
    schema = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    content = {"text/event-stream": {"schema": schema}}
    return {200: {"content": content}, **_ERRORS}
