"""What a browser sends to the page, checked before Gradio sees it."""

import json
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


def checked_input(app: ASGIApp) -> ASGIApp:
    """ASGI middleware: lets no message pass that isn't JSON or that names a file.

    Gradio would copy any file of this machine that a value names, whatever the component: its own
    check works only in an app that was launched, which a mounted one never is.
    """

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await app(scope, receive, send)
            return
        try:
            body = await Request(scope, receive).body()
            _parse(body)
        except ClientDisconnect:
            return
        except (HTTPException, ValueError) as error:
            await _refusal(error)(scope, receive, send)
            return
        parts = iter([body])

        async def replay() -> Message:
            for part in parts:
                return {"type": "http.request", "body": part, "more_body": False}
            return await receive()

        await app(scope, replay, send)

    return serve


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body, object_hook=_without_files)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError("the message is not JSON") from None


def _without_files(value: dict[str, Any]) -> dict[str, Any]:
    if "path" in value:
        raise ValueError("the page takes no files")
    return value


def _refusal(error: Exception) -> JSONResponse:
    if isinstance(error, HTTPException):
        return JSONResponse({"detail": error.detail}, error.status_code, error.headers)
    return JSONResponse({"detail": str(error)}, 400)
