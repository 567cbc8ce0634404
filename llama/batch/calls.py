"""The API without a network: the app is called as a web server calls it."""

import asyncio
from typing import Any

from starlette.types import ASGIApp, Message

_HEADERS = [(b"host", b"localhost"), (b"content-type", b"application/json")]


async def post(app: ASGIApp, path: str, body: bytes) -> tuple[int, bytes]:
    """Return the status and the body of the answer to a POST of JSON."""
    scope: dict[str, Any] = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(errors="surrogatepass"),
        "root_path": "",
        "query_string": b"",
        "headers": _HEADERS,
    }
    requests: list[Message] = [{"type": "http.request", "body": body}]
    status, parts = 0, []

    async def receive() -> Message:
        if not requests:
            await asyncio.Event().wait()  # nobody disconnects
        return requests.pop()

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, b"".join(parts)
