"""Restrict the page to its own routes and its own host.

Gradio has more routes: uploads, files, the description of an API.
"""

import re

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.routing import Match, Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama.server.paths import route_path

# The paths that the page uses, by method.
PATHS = {
    "GET": re.compile(r"/|/(assets|static)/.+|/theme\.css|/favicon\.ico|/gradio_api/queue/data"),
    "POST": re.compile(r"/gradio_api/(queue/join|cancel)"),
}
EXTERNAL = re.compile(rb'<(?:meta\s+(?:property="og|name="twitter)|link rel="manifest")[^>]*>\s*')
HEADERS = {
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    "referrer-policy": "no-referrer",
    "x-dns-prefetch-control": "off",
}


class PageMount(Mount):
    """Mounts the page's own routes alone: for all others the app around it has its errors."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        found, child_scope = super().matches(scope)
        if scope["type"] != "http" or found is Match.NONE:
            return Match.NONE, {}
        methods = _methods(scope)
        if not methods:
            return Match.NONE, {}
        return Match.FULL if scope["method"] in methods else Match.PARTIAL, child_scope

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        methods = _methods(scope)
        if scope["method"] not in methods:
            raise HTTPException(405, headers={"Allow": ", ".join(methods)})
        await super().handle(scope, receive, send)


def _methods(scope: Scope) -> list[str]:
    path = route_path(scope)
    return [method for method, paths in PATHS.items() if paths.fullmatch(path)]


def same_origin_only(app: ASGIApp) -> ASGIApp:
    """Wrap an ASGI app: forbid a browser to load from other hosts."""

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        is_page = scope["type"] == "http" and route_path(scope) == "/"

        async def send_restricted(part: Message) -> None:
            if part["type"] == "http.response.start":
                headers = MutableHeaders(scope=part)
                headers.update(HEADERS)
                if is_page:
                    del headers["content-length"]
            elif part["type"] == "http.response.body" and is_page:
                part["body"] = EXTERNAL.sub(b"", part.get("body", b""))
            await send(part)

        await app(scope, receive, send_restricted)

    return serve
