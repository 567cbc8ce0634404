"""Access control: API keys, allowed hosts, and the size of requests."""

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

from llama.errors import short
from llama.server.errors import ApiError
from llama.server.paths import route_path

PUBLIC_PATHS = ("/health", "/")  # need no key
PUBLIC_FILES = "/page/"  # of the page, which asks for the key itself
POLL_INTERVAL = 0.2  # seconds between checks for shutdown, while a body arrives


def is_loopback(host: str) -> bool:
    """Return whether an address or name is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _is_loopback_authority(host: str) -> bool:
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False


def _names_this_machine(scope: Scope, headers: Headers) -> bool:
    if "host" not in headers:
        # Health checks may send none in HTTP/1.0. A browser, whose pages may come from anywhere,
        # always sends one.
        return bool(scope["http_version"] == "1.0")
    return _is_loopback_authority(headers["host"])


def _credentials(authorization: str) -> bytes:
    """Return the key in a header; an empty one, which no server has, if there is none."""
    scheme, _, credentials = authorization.partition(" ")
    key = credentials.strip(" ").encode("latin-1")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(key, validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return key if scheme.lower() == "bearer" else b""


class AccessControl:
    """ASGI middleware that checks each request.

    Args:
        api_key: the key required as ``Authorization: Bearer`` or ``X-API-Key``, or from a browser
            as the password of ``Basic``; None requires none.
        local: answer only requests whose host is this machine, which prevents DNS rebinding by
            web pages elsewhere.
        max_body: bytes of a request's body, at most.
        is_draining: returns whether the server is shutting down; it then reads no more bodies.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None,
        local: bool,
        max_body: int,
        is_draining: Callable[[], bool],
    ):
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._local = local
        self._max_body = max_body
        self._is_draining = is_draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # web sockets aren't supported
        headers = Headers(scope=scope)
        error = self._refusal(scope, headers)
        if error is not None:
            await error.response()(scope, receive, send)
            return
        n_left, more_body = self._max_body, True

        async def receive_bounded() -> Message:
            nonlocal n_left, more_body
            message = await (self._next_part(receive) if more_body else receive())
            more_body = message.get("more_body", False)
            n_left -= len(message.get("body", b""))
            if n_left < 0:
                raise HTTPException(413, self._too_large())
            return message

        await self._app(scope, receive_bounded, send)

    async def _next_part(self, receive: Receive) -> Message:
        part = asyncio.ensure_future(receive())
        try:
            while not (await asyncio.wait({part}, timeout=POLL_INTERVAL))[0]:
                if self._is_draining():
                    headers = {"Retry-After": "10", "Connection": "close"}
                    raise HTTPException(503, "the server is shutting down", headers)
            return part.result()
        finally:
            part.cancel()

    def _refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        if self._local and not _names_this_machine(scope, headers):
            return ApiError(
                403,
                f"the request is for the host {short(headers.get('host', ''), 80)}, and without a "
                "key only localhost and 127.0.0.1 are answered: start the server with --api_key or "
                "LLAMA_API_KEY, or let the proxy send 'Host: localhost'",
                code="forbidden_host",
            )
        if not self._is_public(route_path(scope)) and not self._has_key(headers):
            return ApiError(
                401,
                "an API key is needed: send it as 'Authorization: Bearer KEY', as 'X-API-Key: KEY' "
                "or as the password",
                headers={"WWW-Authenticate": 'Basic realm="llama", charset="UTF-8"'},
            )
        if "transfer-encoding" in headers and "content-length" in headers:
            # A proxy may use the other header, and so find another end of the request.
            return ApiError(
                400,
                "Content-Length and Transfer-Encoding exclude each other: send one",
                headers={"Connection": "close"},
            )
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._max_body:
            return ApiError(413, self._too_large())
        return None

    def _is_public(self, path: str) -> bool:
        return self._key is None or path in PUBLIC_PATHS or path.startswith(PUBLIC_FILES)

    def _has_key(self, headers: Headers) -> bool:
        given = [
            _credentials(headers.get("authorization", "")),
            headers.get("x-api-key", "").strip(" ").encode("latin-1"),
        ]
        return self._key is not None and any(hmac.compare_digest(k, self._key) for k in given)

    def _too_large(self) -> str:
        return f"the request is larger than {self._max_body} bytes"
