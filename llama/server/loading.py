"""The model that answers requests, as the flags say."""

from llama.generation import Llama
from llama.llama_guard import LlamaGuard
from llama.parallel import world_size
from llama.server.config import ModelConfig


def load(config: ModelConfig) -> Llama:
    """Load the model with its adapters and its guard, on all ranks.

    Raises:
        ValueError: there is a guard and more than one process, or as in ``Llama.build``.
    """
    llama = Llama.build(**config.build_arguments())
    for name, directory in config.lora_directories().items():
        llama.load_adapter(name, directory)
    if config.guard_dir is not None:
        if world_size() > 1:
            raise ValueError(
                "--guard_dir works with one process only: the guard runs on rank 0 alone"
            )
        guard = LlamaGuard.build(config.guard_dir, device=config.device)
        llama.input_guard, llama.output_guard = guard.input_guard, guard.output_guard
    return llama
