"""The web page: files without a build step, a client of the API like any other."""

from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, FastAPI, Request, Response
from pydantic import BaseModel, Field
from starlette.staticfiles import StaticFiles

from llama.server.api import ERRORS
from llama.server.page.render import render_markdown
from llama.server.schemas_sampling import RequestBody
from llama.server.service import Service
from llama.server.threads import RequestThread

MAX_TEXT = 100_000  # characters that are rendered at once

STATIC = Path(__file__).parent / "static"
# Named here, as a system may have other names for them, or none; browsers start no others.
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; form-action 'none'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-dns-prefetch-control": "off",
    "cache-control": "no-cache",  # asks whether it has changed, so that no two versions meet
}


class RenderRequest(RequestBody):
    text: Annotated[str, Field(max_length=MAX_TEXT)]
    kind: Literal["markdown"] = "markdown"


class Rendered(BaseModel):
    html: str = Field(description="Safe to be a part of a page; without styles and scripts.")


def mount_page(app: FastAPI, service: Service) -> FastAPI:
    """Add the page to the app that serves a model: its files at ``/`` and ``/page/NAME``.

    Returns:
        The same app.
    """
    app.include_router(_files())
    thread = RequestThread("texts to render", service.config.timeout)

    @app.post("/render", response_model=Rendered, responses=ERRORS, tags=["page"])
    async def render(body: RenderRequest, request: Request) -> Response:
        """Return a text as HTML: Markdown with coloured code and formulas, for the page."""
        return await thread.answer(request, lambda: Rendered(html=render_markdown(body.text)))

    return app


def _files() -> APIRouter:
    router = APIRouter(include_in_schema=False)
    files = StaticFiles(directory=STATIC)

    @router.get("/")
    async def index(request: Request) -> Response:
        return await send("index.html", request)

    @router.get("/page/{name}")
    async def file(name: str, request: Request) -> Response:
        return await send(name, request)

    async def send(name: str, request: Request) -> Response:
        response = await files.get_response(name, request.scope)
        response.headers.update(HEADERS)
        if media_type := MEDIA_TYPES.get(Path(name).suffix):
            response.headers["content-type"] = media_type
        return response

    return router
