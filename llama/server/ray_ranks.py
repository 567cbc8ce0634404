"""The ranks of one model in an actor of Ray and its neighbours, without torchrun."""

import os
import socket
from collections.abc import Callable

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


class Rank:
    """A rank other than 0, in an actor of its own."""

    def node(self) -> str:
        """Return the id of the machine that it is on."""
        return str(ray.get_runtime_context().get_node_id())

    def follow(self, environment: dict[str, str], work: Callable[[], None]) -> None:
        """Do the rank's work, which lasts as long as rank 0 does."""
        os.environ.update(environment)
        work()


def start_ranks(n_ranks: int, num_cpus: float, num_gpus: float, work: Callable[[], None]) -> None:
    """Make the actor that calls this rank 0, and start the others beside it.

    They are in the actor's placement group, which has a bundle for each of them, and end with it.
    ``Llama.build`` then connects them, as under torchrun. Called before CUDA is used.

    Args:
        n_ranks: how many there are, with this one.
        num_cpus, num_gpus: what each rank has of a machine.
        work: what the other ranks do: load the model, and follow rank 0.
    """
    group = ray.util.get_current_placement_group()
    actors: list[ActorHandle] = []
    for number in range(1, n_ranks):
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number)
        options = {"num_cpus": num_cpus, "num_gpus": num_gpus, "scheduling_strategy": strategy}
        actors.append(ray.remote(Rank).options(**options).remote())
    nodes = [ray.get_runtime_context().get_node_id()]
    nodes += ray.get([actor.node.remote() for actor in actors])
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
            _ended.append(actors[number - 1].follow.remote(environment, work))
    _actors.extend(actors)


# Ray ends actors, and forgets their calls, when nothing refers to them.
_actors: list[ActorHandle] = []
_ended: list[ray.ObjectRef] = []
