"""The HTTP side: ``python -m llama.server``. Nothing outside this room imports it."""
