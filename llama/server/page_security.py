"""Restrict the page to its own routes and its own host."""

import re

from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# The routes that the page uses. Gradio has more: uploads, files, the description of an API.
ROUTES = re.compile(
    r"/|/(assets|static)/.+|/theme\.css|/favicon\.ico|/gradio_api/(queue/(join|data)|cancel)"
)
EXTERNAL = re.compile(rb'<(?:meta\s+(?:property="og|name="twitter)|link rel="manifest")[^>]*>\s*')
HEADERS = {
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    "referrer-policy": "no-referrer",
    "x-dns-prefetch-control": "off",
}


def same_origin_only(app: ASGIApp) -> ASGIApp:
    """Wrap an ASGI app: serve only the page's routes, and forbid loads from other hosts."""

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_restricted(part: Message) -> None:
            if part["type"] == "http.response.start":
                headers = MutableHeaders(scope=part)
                headers.update(HEADERS)
                if scope["path"] == "/":
                    del headers["content-length"]
            elif part["type"] == "http.response.body" and scope["path"] == "/":
                part["body"] = EXTERNAL.sub(b"", part.get("body", b""))
            await send(part)

        is_allowed = scope["type"] != "http" or ROUTES.fullmatch(scope["path"])
        target = app if is_allowed else PlainTextResponse("Not Found", 404)
        await target(scope, receive, send_restricted)

    return serve
