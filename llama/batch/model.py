"""A model that answers the requests of a file, by the API's own code."""

import asyncio
import logging
import math
import uuid
from dataclasses import fields
from typing import NamedTuple

from llama.batch.calls import post
from llama.batch.keys import Key
from llama.batch.requests import Request
from llama.batch.results import result_line
from llama.engine.engine import AHEAD, Counts
from llama.generation import Llama
from llama.server.api import make_core
from llama.server.config import ModelConfig, ServerConfig
from llama.server.paths import UniformRequests
from llama.server.service import Service

_QUEUE = 1 << 20  # sequences, never reached: the caller bounds the requests
_PAUSE = 0.05  # seconds until a request is sent again that found no place

logger = logging.getLogger(__name__)


class EngineFailed(RuntimeError):
    """The engine has ended, and with it the requests that it had."""


class Result(NamedTuple):
    """The line that answers a request."""

    key: Key
    line: bytes
    failed: bool


class Model:
    """A model that answers requests while its engine runs.

    Attributes:
        n_ahead: requests that should be asked at once, to keep the engine full.
    """

    def __init__(self, llama: Llama, config: ModelConfig):
        """Wrap a model.

        Raises:
            ValueError: as in ``Service``.
        """
        n_slots = llama.model.params.max_batch_size
        self.n_ahead = AHEAD * n_slots
        chosen = {field.name: getattr(config, field.name) for field in fields(ModelConfig)}
        served = ServerConfig(
            **chosen,
            max_queue=_QUEUE,
            timeout=math.inf,
            prompt_lookup_num_tokens=0,  # drafts pay while few sequences run
        )
        self._service = Service(llama, served, streams=False)
        self._app = UniformRequests(make_core(self._service), "")

    @property
    def counts(self) -> Counts:
        """The engine's counts."""
        return self._service.loop.counts

    async def answer(self, request: Request) -> Result:
        """Return the answer to a request, be it an error.

        Raises:
            EngineFailed: the request has none.
        """
        status, body = 0, b""
        if request.refusal is None:
            status, body = await post(self._app, request.url, request.body)
            while status == 429 and not self._service.loop.draining:
                await asyncio.sleep(_PAUSE)
                status, body = await post(self._app, request.url, request.body)
            if self._service.loop.draining:
                raise EngineFailed("the engine has ended")
        line = result_line(request, status, body, uuid.uuid4().hex)
        return Result(request.key, line, status != 200)

    def run(self) -> None:
        """Run the engine until ``stop`` is called, or until it fails.

        The thread that loaded the model should: in another one PyTorch has threads of its own for
        operators, and where these are more than there are cores, each operator waits for them.
        """
        try:
            self._service.loop.run()
        except Exception:
            logger.exception("the engine failed")

    def stop(self) -> None:
        """Have ``run`` return when the present requests have been answered; from any thread."""
        self._service.loop.drain()

    @property
    def has_failed(self) -> bool:
        """True if the engine, or one on another rank, has ended by an error."""
        return self._service.loop.failure is not None
