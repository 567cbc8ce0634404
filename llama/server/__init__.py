"""The HTTP server: ``python -m llama.server``. No other package imports it."""
