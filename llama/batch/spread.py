"""A file of requests on a Ray cluster: Ray Data spreads it among replicas of the model.

The file is read on the machine of the command, in chunks, and its answers are written there: so one
process alone decides what is answered, and other machines need no access to the files. A replica is
an actor of Ray Data, which has Ray start the processes of its model-parallel group.
"""

import asyncio
import pickle
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import (
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from llama.batch.cluster import ClusterConfig
from llama.batch.keys import Keys
from llama.batch.model import EngineFailed, Model, Result
from llama.batch.requests import Request, Requests
from llama.batch.results import Results, answered_keys
from llama.batch.run import Tally
from llama.engine.engine import AHEAD, Counts
from llama.server.config import ModelConfig
from llama.server.loading import load
from llama.server.ray_ranks import end_process, start_ranks

CHUNKS_AHEAD = 3  # chunks that a replica has at once, so that its engine stays full
MAX_TRIES = 10  # of a chunk, each on a replica that is started again


class Chunk(NamedTuple):
    """Requests that go to one replica, and what the reader passed over up to here."""

    requests: list[Request]
    n_answered: int
    answered_bytes: int


class Answered(NamedTuple):
    """The answers to a chunk."""

    chunk: Chunk
    results: list[Result]
    n_read: int  # tokens
    n_written: int


def spread(
    requests: Requests, results: Results, cluster: ClusterConfig, config: ModelConfig
) -> Tally:
    """Have replicas on a Ray cluster answer the requests.

    Raises:
        ChildProcessError: Ray gave up.
    """
    if not ray.is_initialized():
        ray.init()
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # each chunk is a block, which is lost and tried again alone
    n_replicas, cpus, gpus = _resources(cluster, config)
    run = uuid.uuid4().hex
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    size = AHEAD * config.max_batch_size
    chunks = ray.data.read_datasource(
        Chunks(requests.path, results.snapshot(), size),
        override_num_blocks=1,
        ray_remote_args={"num_cpus": 0, "scheduling_strategy": here},
    )
    answered = chunks.map(
        Replica,
        fn_constructor_args=(run, config, cluster.model_parallel_size, cpus, gpus),
        compute=ActorPoolStrategy(
            size=n_replicas,
            max_tasks_in_flight_per_actor=CHUNKS_AHEAD + 1,
            enable_true_multi_threading=True,
        ),
        num_cpus=0,
        max_concurrency=CHUNKS_AHEAD,
        max_restarts=-1,
        max_task_retries=MAX_TRIES,
    )
    counts = Counts()
    tally = Tally(requests, results, counts)
    try:
        for row in answered.iter_rows():
            done: Answered = pickle.loads(row["data"])
            counts.prompt_tokens += done.n_read
            counts.generated_tokens += done.n_written
            requests.n_answered = max(requests.n_answered, done.chunk.n_answered)
            requests.answered_bytes = max(requests.answered_bytes, done.chunk.answered_bytes)
            for request, result in zip(done.chunk.requests, done.results, strict=True):
                tally.write(result, request.size)
    except RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ChildProcessError(f"Ray gave up, start again to go on: {reason}") from error
    finally:
        for group in placement_group_table().values():
            if group["name"].startswith(run) and group["state"] != "REMOVED":
                remove_placement_group(get_placement_group(group["name"]))
    return tally


def _resources(cluster: ClusterConfig, config: ModelConfig) -> tuple[int, float, float]:
    """Return the number of replicas, and the CPUs and GPUs of each of their processes."""
    size, total = cluster.model_parallel_size, ray.cluster_resources()
    n_gpus = 0 if config.device == "cpu" else int(total.get("GPU", 0))
    n_nodes = sum(node["Alive"] for node in ray.nodes())
    n_replicas = cluster.replicas or max(n_gpus // size if n_gpus else n_nodes, 1)
    if n_gpus:
        return n_replicas, 1, 1
    return n_replicas, max(total.get("CPU", 1) // (n_replicas * size), 1), 0


class Chunks(Datasource):
    """The chunks of a file, which one task reads on the machine of the command.

    Args:
        answers: files of answers and their sizes, of which no more is read: a task that is run
            again makes the same chunks.
        size: requests of a chunk.
    """

    def __init__(self, path: Path, answers: list[tuple[Path, int]], size: int):
        super().__init__()
        self._path, self._answers, self._size = path.resolve(), answers, size

    def estimate_inmemory_data_size(self) -> int:
        return self._path.stat().st_size

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        path, answers, size = self._path, self._answers, self._size
        metadata = BlockMetadata(
            num_rows=None, size_bytes=None, input_files=[str(path)], exec_stats=None
        )
        return [ReadTask(lambda: _read(path, answers, size), metadata)]


def _read(path: Path, answers: list[tuple[Path, int]], size: int) -> Iterator[pa.Table]:
    keys = Keys()
    for file, end in answers:
        for key in answered_keys(file, end):
            keys.answer(key)
    requests = Requests(path, keys)
    for window in requests.windows():
        while some := window[:size]:
            del window[:size]
            chunk = Chunk(some, requests.n_answered, requests.answered_bytes)
            yield pa.table({"data": [pickle.dumps(chunk)]})


class Replica:
    """A model that answers chunks, in processes of its own which are placed together.

    If one of them ends, this process does too: Ray then starts both again, perhaps on another
    machine, and has the chunks answered that had no answer.
    """

    def __init__(self, run: str, config: ModelConfig, size: int, cpus: float, gpus: float):
        """Start the processes.

        Args:
            run: begins the name of their placement group.
            size: their number.
            cpus, gpus: those of each.
        """
        each = {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
        largest = max(node["Resources"].get("GPU" if gpus else "CPU", 0) for node in ray.nodes())
        fits = size * (gpus or cpus) <= largest
        name = f"{run} {ray.get_runtime_context().get_actor_id()}"
        try:  # that of this replica before it was started again: its room is still reserved
            group = get_placement_group(name)
        except ValueError:
            strategy = "STRICT_PACK" if fits else "PACK"
            group = placement_group([each] * size, strategy, name=name)
        place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        options = {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": place}
        self._leader = ray.remote(Leader).options(**options).remote()
        ray.get(self._leader.load.remote(size, cpus, gpus, config))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Answer a chunk."""
        try:
            return {"data": ray.get(self._leader.answer.remote(row["data"]))}
        except (EngineFailed, RayActorError):
            end_process()


class Leader:
    """The first process of a replica's group, which has the requests."""

    def load(self, size: int, cpus: float, gpus: float, config: ModelConfig) -> None:
        """Start the other processes, load the model together with them, and start its engine."""
        ready: Future[Model] = Future()

        def run() -> None:
            try:
                start_ranks(size, cpus, gpus, config, streams=False)
                model = Model(load(config), config)
            except BaseException as error:
                ready.set_exception(error)
                return
            ready.set_result(model)
            model.run()

        threading.Thread(target=run, name="engine", daemon=True).start()
        self._model = ready.result()
        self._told = Counts()

    async def answer(self, data: bytes) -> bytes:
        """Return the answers to a chunk.

        Raises:
            EngineFailed: a process of the group has ended.
        """
        chunk: Chunk = pickle.loads(data)
        results = await asyncio.gather(*map(self._model.answer, chunk.requests))
        counts, told = self._model.counts, self._told
        n_read = counts.prompt_tokens - told.prompt_tokens
        n_written = counts.generated_tokens - told.generated_tokens
        told.prompt_tokens += n_read
        told.generated_tokens += n_written
        return pickle.dumps(Answered(chunk, results, n_read, n_written))
