"""Who may come in, and with how much: keys, hosts, sizes."""

import asyncio
import base64
import binascii
import hmac
import ipaddress
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama.server.errors import ApiError

OPEN = ("/health",)  # needs no key
LOOK = 0.2  # seconds between two looks at whether the server ends, while a body arrives


def is_loopback(host: str) -> bool:
    """Whether an address or name means this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _names_this_machine(host: str) -> bool:
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False


class AccessControl:
    """An ASGI application behind a check of each request.

    Args:
        api_key: what ``Authorization: Bearer`` must give, or a browser as the password of
            ``Basic``; None asks for none.
        local: whether only requests that name this machine are let in, so that no web page
            elsewhere can give its own name to the address.
        max_body: bytes of a request's body, at most.
        ends: whether the server is about to end, which waits for no more of a body.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None,
        local: bool,
        max_body: int,
        ends: Callable[[], bool],
    ):
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._local = local
        self._max_body = max_body
        self._ends = ends

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # there are no web sockets
        headers = Headers(scope=scope)
        error = self._refusal(scope["path"], headers)
        if error is not None:
            await error.response()(scope, receive, send)
            return
        left, arrives = self._max_body, True

        async def receive_bounded() -> Message:
            nonlocal left, arrives
            message = await (self._next_part(receive) if arrives else receive())
            arrives = message.get("more_body", False)
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, self._too_large())
            return message

        await self._app(scope, receive_bounded, send)

    async def _next_part(self, receive: Receive) -> Message:
        part = asyncio.ensure_future(receive())
        try:
            while not (await asyncio.wait({part}, timeout=LOOK))[0]:
                if self._ends():
                    headers = {"Retry-After": "10", "Connection": "close"}
                    raise HTTPException(503, "the server is shutting down", headers)
            return part.result()
        finally:
            part.cancel()

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        if self._local and not _names_this_machine(headers.get("host", "")):
            return ApiError(403, "the request's host isn't this machine", code="forbidden_host")
        if self._key is not None and path not in OPEN and not self._knows_key(headers):
            return ApiError(
                401,
                "an API key is needed: send it as 'Authorization: Bearer KEY', or as the password",
                headers={"WWW-Authenticate": 'Basic realm="llama", charset="UTF-8"'},
            )
        if "transfer-encoding" in headers and "content-length" in headers:
            # Another server in between may read the other one, and so another request's end.
            return ApiError(
                400,
                "Content-Length and Transfer-Encoding exclude each other: send one",
                headers={"Connection": "close"},
            )
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._max_body:
            return ApiError(413, self._too_large())
        return None

    def _knows_key(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        key = given.strip(" ").encode("latin-1")
        if scheme.lower() == "basic":
            try:
                _, _, key = base64.b64decode(key, validate=True).partition(b":")
            except binascii.Error:
                return False
        elif scheme.lower() != "bearer":
            return False
        return self._key is not None and hmac.compare_digest(key, self._key)

    def _too_large(self) -> str:
        return f"the request is larger than {self._max_body} bytes"
