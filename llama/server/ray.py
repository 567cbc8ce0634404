"""Serve copies of a model on a cluster, as an application of Ray Serve.

serve run llama.server.ray:app ckpt_dir=llama-2-7b-chat/ num_replicas=4
serve run llama.server.ray:app ckpt_dir=llama-2-70b-chat/ num_replicas=2 model_parallel_size=8

Arguments are the server's flags without their dashes, and those of ``deploy``.
"""

import asyncio
import logging
import os
import threading
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from llama.cli import parse
from llama.cli.signatures import call, flat_signature
from llama.heartbeat import at_loss
from llama.server.config import ServerConfig
from llama.server.errors import ApiError
from llama.server.loading import load
from llama.server.ray_ranks import start_ranks
from llama.server.serve import application
from llama.server.service import Service

logger = logging.getLogger(__name__)

_TRIES = 3  # to find a replica that lives, for a request of which nothing has been answered
_GRACE = 2.0  # seconds for the last words of streams, before a replica ends that has failed
_SCOPE = {"type", "http_version", "method", "scheme", "path", "raw_path", "query_string"}
_SCOPE |= {"root_path", "headers", "client", "server"}  # what can be sent to another process
_LOST = ApiError(
    503, "the replica that answered has ended: send the request again", code="replica_lost"
)


def app(arguments: Mapping[str, Any]) -> serve.Application:
    """Return the application, for ``serve run`` and for the files of ``serve deploy``.

    Raises:
        UsageError, ValueError: an argument is unknown or wrong.
    """
    for name in ("host", "port"):
        if name in arguments:
            raise ValueError(
                f"{name} isn't the application's to choose: give Ray Serve --http-{name} when it "
                "starts (serve start)"
            )
    flags = [f"--{name}={value}" for name, value in arguments.items()]
    return call(deploy, parse(flat_signature(deploy), flags).arguments)


def deploy(
    config: ServerConfig,
    num_replicas: int = 1,
    model_parallel_size: int = 1,
    num_cpus: float = 1.0,
    num_gpus: float | None = None,
) -> serve.Application:
    """Return an application of several replicas.

    Args:
        config: the server's flags.
        num_replicas: how many copies of the model there are.
        model_parallel_size: how many processes share each of them, on as few machines as possible.
        num_cpus: cores of each process.
        num_gpus: GPUs of each process; by default one where the cluster has any.
    """
    if num_gpus is None:
        has_gpus = ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0
        num_gpus = float(has_gpus and config.device != "cpu")
    resources = {"num_cpus": num_cpus, "num_gpus": num_gpus}
    options: dict[str, Any] = {"ray_actor_options": resources}
    if model_parallel_size > 1:
        bundle = {"CPU": num_cpus, "GPU": num_gpus}
        bundle = {name: n for name, n in bundle.items() if n}
        options["placement_group_bundles"] = [bundle] * model_parallel_size
        options["placement_group_strategy"] = "PACK"
    replicas = serve.deployment(
        Replica,
        name="replica",
        num_replicas=num_replicas,
        # As many as keep an engine full: the others wait for the first replica that has room.
        max_ongoing_requests=2 * config.max_batch_size,
        max_queued_requests=config.max_queue * num_replicas,
        **options,
    ).bind(config, model_parallel_size, num_cpus, num_gpus)

    def make_front() -> Front:
        name = serve.get_replica_context().app_name
        handle = serve.get_deployment_handle("replica", name)
        return Front(config.max_body, handle.options(stream=True))

    front = serve.deployment(
        serve.ingress(make_front)(),
        name="front",
        num_replicas=1 + num_replicas // 8,
        max_ongoing_requests=10_000,  # which wait for replicas
    )
    return front.bind(replicas)


class Replica:
    """A copy of the model, with all of its ranks."""

    def __init__(
        self, config: ServerConfig, model_parallel_size: int, num_cpus: float, num_gpus: float
    ):
        start_ranks(model_parallel_size, num_cpus, num_gpus, config)
        self._service = Service(load(config), config)
        self._app = application(self._service)
        at_loss.append(self._service.loop.fail)
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def _run(self) -> None:
        """Run the engine; where it fails, end the process, in whose place Ray starts another."""
        try:
            self._service.loop.run()
        except BaseException:
            logger.exception("the engine failed")
            time.sleep(_GRACE)
            os._exit(1)

    def check_health(self) -> None:
        """Raise an error if the engine has failed."""
        if self._service.loop.failure is not None:
            raise self._service.loop.failure

    async def answer(self, scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
        """Yield the ASGI messages that answer a request."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            # A client that disconnects cancels this call.
            return parts.pop() if parts else await asyncio.Future()

        task = asyncio.ensure_future(self._app(scope, receive, messages.put))
        task.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                yield message
            await task
        finally:
            task.cancel()


class Front:
    """The ASGI app that passes requests on to replicas.

    A replica may die while it answers. What hasn't begun is answered by another one, and a stream
    that has ends with an error event.

    Args:
        max_body: bytes of a body that are passed on; the replica refuses what is larger.
        replicas: makes the call that answers a request, an iterator of ASGI messages.
    """

    def __init__(self, max_body: int, replicas: DeploymentHandle):
        self._max_body = max_body
        self._replicas = replicas

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await self._read(receive)
        if body is None:
            return
        kept = {name: value for name, value in scope.items() if name in _SCOPE}
        for n in range(_TRIES):
            start: Message | None = None
            try:
                async for message in self._messages(kept, body):
                    start = start or message
                    await send(message)
                return
            except BackPressureError:
                busy = ApiError(429, "the queue is full: try again later")
                busy.headers["Retry-After"] = "1"
                return await busy.response()(scope, receive, send)
            except RayActorError:
                if start is not None:
                    return await _end(start, send)
                logger.warning("a replica died before it answered: try %d", n + 1)
        await _LOST.response()(scope, receive, send)

    async def _messages(self, scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
        messages = self._replicas.answer.remote(scope, body)
        try:
            async for message in messages:
                yield message
        finally:
            messages.cancel()  # where the client has disconnected

    async def _read(self, receive: Receive) -> bytes | None:
        """Return a request's body, or None if the client disconnects."""
        body, more = b"", True
        while more and len(body) <= self._max_body:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
        return body


async def _live(receive: Receive, send: Send) -> None:
    """Answer the events of an app's life, of which nothing depends."""
    kind = ""
    while kind != "lifespan.shutdown":
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})


async def _end(start: Message, send: Send) -> None:
    """End an answer that has begun: a stream with an error event, else by its connection.

    Raises:
        ConnectionAbortedError: it isn't a stream.
    """
    if not Headers(raw=start["headers"]).get("content-type", "").startswith("text/event-stream"):
        raise ConnectionAbortedError(str(_LOST))
    body = b"data: " + _LOST.response().body + b"\n\ndata: [DONE]\n\n"
    await send({"type": "http.response.body", "body": body, "more_body": False})
