"""The commands of ``python -m llama`` that are nothing but commands; ``llama/cli.py`` runs them."""
