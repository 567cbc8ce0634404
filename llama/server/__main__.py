"""Serve a model: a page to talk to, and OpenAI's API.

python -m llama.server                                          # the embedded model
python -m llama.server --ckpt_dir llama-2-7b-chat/ --max_seq_len 4096
torchrun --nproc_per_node 2 -m llama.server --ckpt_dir llama-2-13b-chat/
"""

import asyncio
import gc
import inspect
import logging
import os
import signal
import threading
from types import FrameType
from typing import Any

import uvicorn

from llama.cli import dtype_of, run
from llama.generation import Llama
from llama.llama_guard import LlamaGuard
from llama.parallel import rank, world_size
from llama.server.api import make_app
from llama.server.config import ServerConfig
from llama.server.loop import EngineLoop
from llama.server.service import Service
from llama.server.workers import worker_loop

logger = logging.getLogger("llama.server")


class Server(uvicorn.Server):
    """A web server that stops when its engine does.

    The first SIGTERM or SIGINT lets running requests finish, the second one ends all at once.
    """

    def __init__(self, config: uvicorn.Config, loop: EngineLoop):
        super().__init__(config)
        self._loop = loop

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)
        # A signal comes between any two steps of this thread, which may hold any lock.
        asyncio.get_running_loop().call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        logger.info("shutting down: %d sequences are running", self._loop.n_active)
        self._loop.drain()

    def run_engine(self) -> None:
        """Run until the engine is drained or fails; the web server ends then, too."""
        try:
            self._loop.run()
        except BaseException:
            logger.exception("the engine failed")
        finally:
            self.should_exit = True


def serve(config: ServerConfig) -> None:
    """Load a model and serve it; see ``ServerConfig``."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    llama = Llama.build(
        config.ckpt_dir,
        config.tokenizer_path,
        config.max_seq_len,
        config.max_batch_size,
        device=config.device,
        dtype=dtype_of(config.dtype),
        adapter=config.adapter,
        chat_format=config.chat_format,
        compile=config.compile,
        quantize=config.quantize,
        group_size=config.group_size,
        kv_cache_dtype=config.kv_cache_dtype,
    )
    if config.guard_dir is not None:
        if world_size() > 1:
            raise ValueError(
                "--guard_dir is for one process: the guard's own calls don't reach the others"
            )
        guard = LlamaGuard.build(config.guard_dir, device=config.device)
        llama.input_guard, llama.output_guard = guard.input_guard, guard.output_guard
    if rank() > 0:
        _work(llama)
        return
    service = Service(llama, config)
    app = make_app(service)
    if config.page:
        from llama.server.page import mount_page

        app = mount_page(app, service)
    uvicorn_config = uvicorn.Config(
        app, config.host, config.port, ws="none", timeout_graceful_shutdown=60
    )
    server = Server(uvicorn_config, service.loop)
    engine = threading.Thread(target=server.run_engine, name="engine", daemon=True)
    engine.start()
    # The collector would look through all that is loaded whenever a large body is parsed.
    gc.freeze()
    try:
        server.run()
    finally:
        service.loop.drain()
        engine.join(timeout=20)
    if engine.is_alive() or service.loop.failure is not None:
        # The other ranks, or the threads that talk to them, may hang: nothing is left to wait for.
        logging.shutdown()
        os._exit(1)


def _work(llama: Llama) -> None:
    """Take part in rank 0's steps until it is done; its end, however it comes, is this one's."""
    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, signal.SIG_IGN)
    try:
        worker_loop(llama.engine)
    except RuntimeError as error:
        logger.error("this rank failed, or rank 0 is gone: %s", error)
        os._exit(1)


def main(*args: Any, **flags: Any) -> None:
    serve(ServerConfig(*args, **flags))


main.__doc__ = ServerConfig.__doc__
main.__signature__ = inspect.signature(ServerConfig)  # type: ignore[attr-defined]

if __name__ == "__main__":
    run(main, "llama.server")
