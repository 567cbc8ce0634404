"""Commands of ``python -m llama`` without a module in the library; ``llama.cli`` runs them."""
