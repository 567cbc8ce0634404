"""What ``llama.model`` is made of: attention, the cache, linear layers and their kernels."""
