"""Fields that a request has and this server can't honour: refused, or ignored with --lenient."""

from contextvars import ContextVar
from typing import Any

from pydantic import ValidationError, ValidationInfo, ValidatorFunctionWrapHandler, WrapValidator
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama.errors import short

HEADER = "X-Llama-Ignored"
MAX_NAMES = 20  # in the header, of up to 40 characters each

_names: ContextVar[list[str] | None] = ContextVar("ignored", default=None)


def ignore(name: str) -> bool:
    """Return True if the present request's field may be ignored, and note the field's name."""
    names = _names.get()
    if names is None:
        return False
    printed = "".join(c if c.isascii() and c.isprintable() and c != "," else "?" for c in name[:40])
    if printed not in names and len(names) < MAX_NAMES:
        names.append(printed)
    return True


def _unless_ignored(
    value: Any, validate: ValidatorFunctionWrapHandler, info: ValidationInfo
) -> Any:
    if value in ("", []):  # but {} asks for a search of the web, say
        return None
    try:
        return validate(value)
    except ValidationError:
        if info.field_name is not None and ignore(info.field_name):
            return None
        raise ValueError(
            f"this server doesn't support {short(value)}: leave it out, or start the server with "
            "--lenient, which ignores it"
        ) from None


# For a field whose type has only the values that ask for nothing; others need --lenient.
Unsupported = WrapValidator(_unless_ignored)


class LenientFields:
    """ASGI middleware that has a request's unknown fields ignored; a header names them."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        names: list[str] = []

        async def send_with_names(message: Message) -> None:
            if message["type"] == "http.response.start" and names:
                MutableHeaders(scope=message)[HEADER] = ", ".join(names)
            await send(message)

        token = _names.set(names)
        try:
            await self._app(scope, receive, send_with_names)
        finally:
            _names.reset(token)
