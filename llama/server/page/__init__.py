"""The web page: files without a build step, a client of the API like any other."""

from pathlib import Path

from fastapi import APIRouter, FastAPI, Request, Response
from starlette.staticfiles import StaticFiles

from llama.server.service import Service

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


def mount_page(app: FastAPI, service: Service) -> FastAPI:
    """Add the page to the app that serves a model: its files at ``/`` and ``/page/NAME``.

    Returns:
        The same app.
    """
    app.include_router(_routes())
    return app


def _routes() -> APIRouter:
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
