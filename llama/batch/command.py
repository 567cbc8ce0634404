"""Answer a file of requests: ``python -m llama.batch IN.jsonl OUT.jsonl``."""

import logging
import os
from pathlib import Path

from llama.batch.cluster import ClusterConfig
from llama.batch.model import EngineFailed, Model
from llama.batch.requests import Requests
from llama.batch.results import Results
from llama.batch.run import Tally, answer_all, run_beside
from llama.errors import need
from llama.server.config import ModelConfig
from llama.server.loading import load
from llama.server.workers import run_worker

logger = logging.getLogger("llama.batch")


def main(
    in_file: str,
    out_file: str,
    *,
    errors: str | None = None,
    cluster: ClusterConfig,
    config: ModelConfig,
) -> None:
    """Answer a file of requests in OpenAI's batch format.

    Each line of IN_FILE is what a POST to the server is, with the same fields and errors. OUT_FILE
    gets the answers as they come. Started again, the command goes on where it was.

    Args:
        in_file: a line for each request: its custom_id, the url, such as /v1/chat/completions, and
            the body.
        out_file: the file of answers, which may have some already.
        errors: the file of requests that failed; by default OUT_FILE with .errors.jsonl.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    if os.environ.get("RANK", "0") != "0":
        run_worker(load(config), streams=False)
        return
    source, target = Path(in_file), Path(out_file)
    others = Path(errors) if errors else target.with_suffix(".errors.jsonl")
    if len({path.resolve() for path in (source, target, others)}) < 3:
        raise ValueError(f"{source}, {target} and {others}: the three files must differ")
    with source.open("rb"), Results(target, others) as results:
        requests = Requests(source, results.keys)
        if cluster.ray:
            tally = need("llama.batch.spread", "ray", "--ray").spread(
                requests, results, cluster, config
            )
        else:
            tally = _answer(requests, results, config)
    print(tally.summary(others))


def _answer(requests: Requests, results: Results, config: ModelConfig) -> Tally:
    """Answer the requests in this process and the other ranks; exit with 1 if one fails."""
    model = Model(load(config), config)
    tally = Tally(requests, results, model.counts)
    try:
        run_beside(model, answer_all(model, requests, tally))
    except EngineFailed:
        logger.error("the engine failed: start again to go on")
    if model.has_failed:
        results.sync()
        logging.shutdown()
        # The other ranks, or the threads that communicate with them, may hang: don't wait for them.
        os._exit(1)
    return tally
