"""Serve a model: a page to talk to, and OpenAI's API.

python -m llama.server                                          # the embedded model
python -m llama.server --ckpt_dir llama-2-7b-chat/ --max_seq_len 4096
torchrun --nproc_per_node 2 -m llama.server --ckpt_dir llama-2-13b-chat/
"""

import asyncio
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

import uvicorn

from llama.cli import dtype_of, run
from llama.generation import TINY, Llama
from llama.llama_guard import LlamaGuard
from llama.parallel import rank, world_size
from llama.server import ranks
from llama.server.api import make_app
from llama.server.door import is_loopback
from llama.server.engine import Engine
from llama.server.service import Service

logger = logging.getLogger("llama.server")


class Server(uvicorn.Server):
    """A web server that stops when its engine does.

    The first SIGTERM or SIGINT lets running requests finish, the second one ends all at once.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine):
        super().__init__(config)
        self._engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)
        # A signal comes between any two steps of this thread, which may hold any lock.
        asyncio.get_running_loop().call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        logger.info("shutting down: %d requests are at work", self._engine.n_active)
        self._engine.drain()

    def run_engine(self) -> None:
        """Work until the engine is drained or fails; the web server ends then, too."""
        try:
            self._engine.run()
        except BaseException:
            logger.exception("the engine failed")
        finally:
            self.should_exit = True


def main(
    ckpt_dir: str = str(TINY),
    tokenizer_path: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    model_name: str | None = None,
    max_seq_len: int = 2048,
    max_batch_size: int = 8,
    max_queue: int = 64,
    timeout: float = 600.0,
    max_body: int = 1_000_000,
    cors: str = "",
    page: bool = True,
    log_prompts: bool = False,
    guard_dir: str | None = None,
    prompt_lookup_num_tokens: int = 10,
    device: str | None = None,
    dtype: str | None = None,
    adapter: str | tuple[str, ...] = (),
    chat_format: str | None = None,
    compile: bool = False,
    quantize: str | None = None,
    group_size: int | None = None,
    kv_cache_dtype: str | None = None,
) -> None:
    """Serve a model until SIGTERM or Ctrl-C, which let running requests finish.

    Args:
        ckpt_dir: a checkpoint of any format; the embedded one by default.
        tokenizer_path: its tokenizer, where it doesn't bring its own.
        host: the address to listen on. Any but this machine's own needs a key.
        port: 0 for any that is free.
        api_key: what clients must send; the environment variable LLAMA_API_KEY hides it better.
        model_name: what clients call the model; the checkpoint's own name by default.
        max_seq_len: tokens of a prompt and its answer together, at most.
        max_batch_size: requests at work at once; others wait.
        max_queue: requests that may wait; others are told to come back later.
        timeout: seconds that a request may take, at most.
        max_body: bytes of a request, at most.
        cors: origins whose web pages may call the API, such as https://example.com, with commas
            between several.
        page: whether there is a page to talk to at /.
        log_prompts: whether the log may hold prompts.
        guard_dir: a checkpoint of Llama Guard, which then judges all prompts and answers.
        prompt_lookup_num_tokens: how many tokens are guessed from a text itself, at most, while few
            are being written.
        device: cpu, cuda or mps; the quickest that there is by default.
        dtype: float32, bfloat16 or float16; by default what suits checkpoint and device.
        adapter: a LoRA adapter's directory, or several.
        chat_format: how dialogs are written; by default as the checkpoint says.
        compile: whether to compile decoding steps.
        quantize: int8 or int4, for weights of as many bits.
        group_size: how many weights share a scale in int4.
        kv_cache_dtype: int8 for a cache of half the size.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    api_key = api_key or os.environ.get("LLAMA_API_KEY") or None
    if api_key is None and not is_loopback(host):
        sys.exit(
            f"{host} can be reached by others: set the environment variable LLAMA_API_KEY to a key "
            "that clients must send, or leave --host out to serve this machine alone"
        )
    llama = Llama.build(
        ckpt_dir,
        tokenizer_path,
        max_seq_len,
        max_batch_size,
        device=device,
        dtype=dtype_of(dtype),
        adapter=adapter,
        chat_format=chat_format,
        compile=compile,
        quantize=quantize,
        group_size=group_size,
        kv_cache_dtype=kv_cache_dtype,
    )
    if guard_dir is not None:
        if world_size() > 1:
            sys.exit("--guard_dir is for one process: the guard's own calls don't reach the others")
        guard = LlamaGuard.build(guard_dir, device=device)
        llama.input_guard, llama.output_guard = guard.input_guard, guard.output_guard
    if rank() > 0:
        _follow(llama)
        return
    path = Path(ckpt_dir).resolve()
    service = Service(
        llama,
        model_name or (path.stem if path.is_file() else path.name),
        max_queue,
        timeout,
        prompt_lookup_num_tokens,
        log_prompts,
    )
    origins = [origin.strip().rstrip("/") for origin in cors.split(",") if origin.strip()]
    # A key tells friends from strangers, also where a proxy calls this machine by another name.
    local = is_loopback(host) and api_key is None
    app = make_app(service, origins, api_key, local, max_body)
    if page:
        from llama.server.page import mount_page

        app = mount_page(app, service)
    config = uvicorn.Config(app, host, port, ws="none", timeout_graceful_shutdown=60)
    server = Server(config, service.engine)
    engine = threading.Thread(target=server.run_engine, name="engine", daemon=True)
    engine.start()
    try:
        server.run()
    finally:
        service.engine.drain()
        engine.join(timeout=20)
    if engine.is_alive() or service.engine.failure is not None:
        # The other ranks, or the threads that talk to them, may hang: nothing is left to wait for.
        logging.shutdown()
        os._exit(1)


def _follow(llama: Llama) -> None:
    """Take part in rank 0's passes until it is done; its end, however it comes, is this one's."""
    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, signal.SIG_IGN)
    try:
        ranks.follow(llama.model)
    except RuntimeError as error:
        logger.error("this rank failed, or rank 0 is gone: %s", error)
        os._exit(1)


if __name__ == "__main__":
    run(main, "llama.server")
