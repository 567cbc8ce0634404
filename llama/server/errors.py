"""Errors in OpenAI's format."""

import logging
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama.errors import short
from llama.server.paths import route_path
from llama.server.schemas import ErrorAnswer

logger = logging.getLogger(__name__)

_KINDS = {
    401: ("authentication_error", "invalid_api_key"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "queue_full"),
    503: ("server_error", "shutting_down"),
    504: ("server_error", "timeout"),
}


class ApiError(Exception):
    """A response with a status other than 200."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> Any:
        default = "invalid_request_error" if self.status < 500 else "server_error"
        kind, code = _KINDS.get(self.status, (default, None))
        return ErrorAnswer.of(str(self), kind, self.param, self.code or code)

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


class ContextLengthExceeded(ApiError):
    """A prompt leaves no room for an answer, told in OpenAI's words, by which clients know it.

    Args:
        limit: tokens of a prompt and its answer together, at most.
        n_virtual: the virtual tokens of an adapter in front of the prompt.
        field: the request's field that has the prompt.
    """

    def __init__(self, limit: int, n_tokens: int, n_virtual: int = 0, field: str = "prompt"):
        self._numbers = (limit, n_tokens, n_virtual)
        virtual = f" behind the adapter's {n_virtual} virtual ones" if n_virtual else ""
        super().__init__(
            400,
            f"This model's maximum context length is {limit} tokens. However, your {field} "
            f"resulted in {n_tokens} tokens{virtual}. Please reduce the length of the {field}, so "
            "that an answer fits too, or start the server with a larger --max_seq_len.",
            field,
            "context_length_exceeded",
        )

    def of(self, field: str) -> "ContextLengthExceeded":
        """Return the same error of another field."""
        return ContextLengthExceeded(*self._numbers, field)


def add_error_handlers(app: FastAPI) -> None:
    """Make an app answer all errors in OpenAI's format."""

    @app.exception_handler(ApiError)
    async def refuse(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        return _of_route(request, error).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        unread = _of_unread_body(request, error)
        if unread is not None:
            return unread.response()
        # Of the variants of a union, the one that fits best is wrong at the deepest place.
        first = max(error.errors(), key=lambda found: len(found["loc"]))
        param = _param(first["loc"][1:], error.body, first["type"] == "missing")
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "this server has no such parameter"
        if first["type"] == "json_invalid":
            param, message = None, "the body is not JSON"
        return ApiError(400, f"{param}: {message}" if param else message, param).response()


def _of_route(request: Request, error: HTTPException) -> ApiError:
    """Return the error of a path or a method that isn't served; others keep their text."""
    headers, message = dict(error.headers or {}), str(error.detail)
    path = short(route_path(request.scope), 80)
    if error.status_code == 404:
        message = f"there is nothing at {path}: the API's paths begin with /v1, and /docs lists all"
    elif error.status_code == 405:
        methods = {method.strip() for method in headers.get("Allow", "").split(",")}
        methods |= {"HEAD"} if "GET" in methods else set()
        headers["Allow"] = ", ".join(sorted(methods))
        message = f"{path} takes no {short(request.method)} requests: send {headers['Allow']}"
    return ApiError(error.status_code, message, headers=headers)


def _of_unread_body(request: Request, error: RequestValidationError) -> ApiError | None:
    """Return the error of a body that is missing or wasn't read as JSON; None for another one."""
    if isinstance(error.body, bytes):  # of another type, which any web page may send
        kind = request.headers.get("content-type")
        found = f"has the Content-Type {short(kind, 80)}" if kind else "has no Content-Type"
    elif error.body is None and error.errors()[0]["loc"] == ("body",):
        found = "has no body"
    else:
        return None
    return ApiError(400, f"the request {found}: send JSON with 'Content-Type: application/json'")


def _param(location: Sequence[str | int], body: Any, is_missing: bool) -> str | None:
    """Return the name of a wrong field, without the variants of a union that its location has."""
    return ".".join(_path(location, body, is_missing)) or None


def _path(location: Sequence[str | int], body: Any, is_missing: bool) -> list[str]:
    if not location:
        return []
    part, rest = location[0], location[1:]
    is_index = isinstance(body, list) and isinstance(part, int) and part < len(body)
    taken: list[str] = []
    if is_index or (isinstance(body, dict) and part in body):
        taken = [str(part), *_path(rest, body[part], is_missing)]
    elif is_missing and not rest:
        return [str(part)]
    skipped = _path(rest, body, is_missing)  # a variant may have the name of a field
    last = str(location[-1])
    return max(skipped, taken, key=lambda path: (path[-1:] == [last], len(path)))


def log_failure(error: BaseException) -> None:
    """Log an error's type and traceback, without its message, which may contain a prompt."""
    where = "".join(traceback.format_tb(error.__traceback__))
    logger.error("a request failed: %s\n%s", type(error).__name__, where)


class ErrorMiddleware:
    """ASGI middleware that answers unexpected exceptions with a 500."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_started = False

        async def send_and_note(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except Exception as error:
            log_failure(error)
            if has_started:  # the client notices that the rest is missing
                raise ConnectionAbortedError("a request failed") from None
            await ApiError(500, "the server failed: see its log").response()(scope, receive, send)
