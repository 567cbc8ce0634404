"""A file of requests on a Ray cluster: Ray Data spreads it among replicas of the model."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ClusterConfig:
    """The flags of a cluster.

    Args:
        ray: spread the file among replicas on a Ray cluster: the one that RAY_ADDRESS names, or one
            of this machine alone.
        replicas: the number of replicas; by default as many as have GPUs, or one for each machine.
        model_parallel_size: processes of each replica, which share its network.
    """

    ray: bool = False
    replicas: int | None = None
    model_parallel_size: int = 1

    def __post_init__(self) -> None:
        if not self.ray and (self.replicas is not None or self.model_parallel_size != 1):
            raise ValueError(
                "--replicas and --model_parallel_size go with --ray; without it, torchrun starts "
                "the processes of one model"
            )
        if min(1 if self.replicas is None else self.replicas, self.model_parallel_size) < 1:
            raise ValueError("--replicas and --model_parallel_size: expected 1 or more")
