"""The page's own host is the only one that a browser is sent to."""

import re

from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# What the page asks Gradio for. Gradio offers more: uploads, files, the description of an API.
NEEDED = re.compile(
    r"/|/(assets|static)/.+|/theme\.css|/favicon\.ico|/gradio_api/(queue/(join|data)|cancel)"
)
FOREIGN = re.compile(rb'<(?:meta\s+(?:property="og|name="twitter)|link rel="manifest")[^>]*>\s*')
HEADERS = {
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    "referrer-policy": "no-referrer",
    "x-dns-prefetch-control": "off",
}


def own_host(app: ASGIApp) -> ASGIApp:
    """ASGI middleware: serves of Gradio what the page needs, and lets it ask no other host."""

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_own(part: Message) -> None:
            if part["type"] == "http.response.start":
                headers = MutableHeaders(scope=part)
                headers.update(HEADERS)
                if scope["path"] == "/":
                    del headers["content-length"]
            elif part["type"] == "http.response.body" and scope["path"] == "/":
                part["body"] = FOREIGN.sub(b"", part.get("body", b""))
            await send(part)

        known = scope["type"] != "http" or NEEDED.fullmatch(scope["path"])
        await (app if known else PlainTextResponse("Not Found", 404))(scope, receive, send_own)

    return serve
