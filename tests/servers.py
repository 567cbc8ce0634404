"""A server of the tests' own, on a free port of this machine."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import torch
import uvicorn
from fastapi import FastAPI
from processes import wait_until

from llama import Llama
from llama.server.api import make_app
from llama.server.config import ServerConfig
from llama.server.connections import Connection
from llama.server.service import Service


@contextlib.contextmanager
def serve(
    llama: Llama,
    *,
    mount: Callable[[FastAPI, Service], FastAPI] | None = None,
    **flags: object,
) -> Iterator[tuple[str, Service]]:
    """The address of a running server, and what it serves. Its engine runs in a thread."""
    defaults = {"model_name": "tiny", "max_body": 100_000, "prompt_lookup_num_tokens": 0}
    service = Service(llama, ServerConfig(**defaults | flags))  # type: ignore[arg-type]
    app = make_app(service)
    if mount is not None:
        app = mount(app, service)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", http=Connection))
    threads = [threading.Thread(target=run) for run in (server.run, service.loop.run)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", service
    finally:
        service.loop.drain()
        server.should_exit = True
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads), "the server doesn't end"


def idle(service: Service) -> bool:
    return not service.loop.n_active and not service.loop.n_waiting


def post(url: str, body: object, **more: object) -> httpx.Response:
    return httpx.post(url, json=body, timeout=60, **more)  # type: ignore[arg-type]


def slow(llama: Llama, seconds: float = 0.03) -> None:
    """Make passes take their time, and texts as long as they may get."""
    llama.tokenizer.stop_ids = frozenset()
    forward = llama.model.hidden_states

    def slowly(*args: Any) -> torch.Tensor:
        time.sleep(seconds)
        return forward(*args)

    llama.model.hidden_states = slowly  # type: ignore[method-assign]
