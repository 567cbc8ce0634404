"""Changes of logits before a token is drawn from them. It can be skipped on a first reading.

``changes.py`` collects what the sequences of a pass ask for, and applies it in this order: biases,
penalties (``penalties.py``), bans, the masks of grammars (``masks.py``), callers' processors.
Temperature, top-k, top-p and min-p follow, in ``llama/sampling.py``.
"""
