"""Serve a model: OpenAI's API, and a web page to chat with it.

python -m llama.server                                          # the embedded model
python -m llama.server --ckpt_dir llama-2-7b-chat/ --max_seq_len 4096
torchrun --nproc_per_node 2 -m llama.server --ckpt_dir llama-2-13b-chat/
"""

import asyncio
import gc
import logging
import os
import signal
import socket
import threading
from types import FrameType

import uvicorn
from fastapi import FastAPI

from llama.errors import need
from llama.heartbeat import at_loss
from llama.parallel import rank
from llama.server.api import make_app
from llama.server.config import ServerConfig
from llama.server.connections import Connection, allow_files
from llama.server.loading import load
from llama.server.loop import EngineLoop
from llama.server.service import Service
from llama.server.workers import run_worker

logger = logging.getLogger("llama.server")


class Server(uvicorn.Server):
    """A web server that stops when its engine does.

    The first SIGTERM or SIGINT lets running requests finish, the second one ends the process.
    """

    def __init__(self, config: uvicorn.Config, loop: EngineLoop):
        super().__init__(config)
        self._loop = loop

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)
        # A signal may interrupt this thread anywhere, even while it holds a lock.
        asyncio.get_running_loop().call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        logger.info("shutting down: %d sequences are running", self._loop.n_active)
        self._loop.drain()

    def fail(self, error: BaseException) -> None:
        """End all answers and stop, from any thread."""
        self._loop.fail(error)
        self.should_exit = True

    def run_engine(self) -> None:
        """Run until the engine is drained or fails, then stop the web server."""
        try:
            self._loop.run()
        except BaseException:
            logger.exception("the engine failed")
        finally:
            self.should_exit = True


def main(config: ServerConfig) -> None:
    """Serve a model until SIGTERM or Ctrl-C, which let running requests finish."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    if os.environ.get("RANK", "0") == "0":
        check_address(config.host, config.port)  # before a model is loaded, which may take minutes
    llama = load(config)
    if rank() > 0:
        run_worker(llama)
        return
    service = Service(llama, config)
    Connection.most = min(Connection.most, allow_files())
    uvicorn_config = uvicorn.Config(
        application(service),
        config.host,
        config.port,
        http=Connection,
        ws="none",
        timeout_graceful_shutdown=60,
    )
    server = Server(uvicorn_config, service.loop)
    at_loss.append(server.fail)
    engine = threading.Thread(target=server.run_engine, name="engine", daemon=True)
    engine.start()
    # Otherwise the garbage collector visits all loaded objects whenever a large body is parsed.
    gc.freeze()
    try:
        server.run()
    finally:
        service.loop.drain()
        engine.join(timeout=0 if service.loop.failure else 20)
    if engine.is_alive() or service.loop.failure is not None:
        # The other ranks, or the threads that communicate with them, may hang: don't wait for them.
        logging.shutdown()
        os._exit(1)


def check_address(host: str, port: int) -> None:
    """Raise ``OSError`` unless a server can listen at an address."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            if os.name == "posix":  # as uvicorn's socket: a server that has ended leaves no trace
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise OSError(
            f"can't listen at {host}:{port} ({error.strerror}): end the program that does, or "
            "choose another port with --port"
        ) from error


def application(service: Service) -> FastAPI:
    """Return the app that serves a model, with the page if its flags say so."""
    app = make_app(service)
    if service.config.page:
        need("llama.server.page", "server", "the page").mount_page(app, service)
    return app
