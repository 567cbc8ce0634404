"""The ranks of one model in an actor of Ray and its neighbours, without torchrun."""

import logging
import os
import socket
from typing import NoReturn

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from llama.server.config import ModelConfig
from llama.server.loading import load
from llama.server.workers import worker_loop

logger = logging.getLogger(__name__)


class Rank:
    """A rank other than 0, in an actor of its own."""

    def node(self) -> str:
        """Return the id of the machine that it is on."""
        return str(ray.get_runtime_context().get_node_id())

    def follow(self, environment: dict[str, str], config: ModelConfig, streams: bool) -> None:
        """Take part in the work of rank 0; end the process if that fails."""
        os.environ.update(environment)
        try:
            llama = load(config)
            worker_loop(llama.engine, llama.adapters, streams)
        except BaseException:
            logger.exception("rank %s failed", environment["RANK"])
            end_process()  # rank 0 would wait for it


def start_ranks(
    n_ranks: int, num_cpus: float, num_gpus: float, config: ModelConfig, streams: bool = True
) -> None:
    """Make the actor that calls this rank 0, and start the others, if any, beside it.

    They are in the actor's placement group, which has a bundle for each of them, and end with it.
    ``Llama.build`` then connects them, as under torchrun. Called before CUDA is used.

    Args:
        n_ranks: how many there are, with this one.
        num_cpus, num_gpus: what each rank has of a machine.
        config: the model that they load.
        streams: as in ``EngineLoop``.
    """
    if n_ranks == 1:
        return
    group = ray.util.get_current_placement_group()
    for number in range(1, n_ranks):
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number)
        options = {"num_cpus": num_cpus, "num_gpus": num_gpus, "scheduling_strategy": strategy}
        _actors.append(ray.remote(Rank).options(**options).remote())
    nodes = [ray.get_runtime_context().get_node_id()]
    nodes += ray.get([actor.node.remote() for actor in _actors])
    address = ray.util.get_node_ip_address()
    with socket.socket() as free:
        free.bind((address, 0))
        port = free.getsockname()[1]
    for number, node in enumerate(nodes):
        environment = {
            "RANK": str(number),
            "WORLD_SIZE": str(n_ranks),
            "LOCAL_RANK": "0",  # of the GPUs that Ray shows to an actor, which are its own
            "LOCAL_WORLD_SIZE": str(nodes.count(node)),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
        }
        if number == 0:
            os.environ.update(environment)
        else:
            _ended.append(_actors[number - 1].follow.remote(environment, config, streams))


def end_process() -> NoReturn:
    """End this process, in whose place Ray may start another, whatever its threads wait for."""
    logging.shutdown()
    os._exit(1)


# Ray ends actors, and forgets their calls, when nothing refers to them.
_actors: list[ActorHandle] = []
_ended: list[ray.ObjectRef] = []
