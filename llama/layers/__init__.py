"""The parts of ``llama.model``: attention, the cache, linear layers and their kernels."""
