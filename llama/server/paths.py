"""Paths and methods of requests, made alike before anything looks at them."""

from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


def route_path(scope: Scope) -> str:
    """Return a request's path as routes have it, without the path of a proxy before it."""
    path: str = scope["path"]
    # Below a mounted app, root_path has that app's own path too.
    return path.removeprefix(scope.get("app_root_path", scope.get("root_path", "")))


class UniformRequests:
    """ASGI middleware that leaves one form of those requests that mean the same.

    A path may end with a slash: to redirect it would lose the body with many clients. HEAD gets
    the headers of GET.

    Args:
        root_path: the path under which a proxy shows this server, or an empty text. Proxies cut it
            off before they pass a request on, or they don't.
    """

    def __init__(self, app: ASGIApp, root_path: str):
        self._app = app
        self._root = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        if self._root and path == self._root:
            # The page's own links are relative, to a path that ends with a slash.
            await RedirectResponse(f"{self._root}/")(scope, receive, send)
            return
        path = path.removeprefix(self._root) if path.startswith(f"{self._root}/") else path
        path = self._root + (path.rstrip("/") or "/")
        is_head = scope["method"] == "HEAD"
        method = "GET" if is_head else scope["method"]
        uniform = {**scope, "path": path, "root_path": self._root, "method": method}
        await self._app(uniform, receive, _without_body(send) if is_head else send)


def _without_body(send: Send) -> Send:
    async def send_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            await send(message)
            await send({"type": "http.response.body", "body": b""})

    return send_headers
