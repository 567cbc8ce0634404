"""One vector a text: what the network makes of all of it, rather than of what comes next."""

from collections.abc import Sequence

import torch

from llama.decoding import checked_forward
from llama.model import Transformer
from llama.packing import prefill_passes


def pool(model: Transformer, prompts: Sequence[list[int]], pooling: str) -> torch.Tensor:
    """The last layer's hidden states after its norm, pooled.

    Args:
        prompts: token ids of at most ``max_batch_size`` texts, none of them empty.
        pooling: ``"mean"`` of all tokens, or the ``"last"`` token's.

    Returns:
        float32, shape (len(prompts), dim).
    """
    pooled = torch.zeros(len(prompts), model.params.dim, device=model.freqs_cis.device)
    for segments in prefill_passes([len(prompt) for prompt in prompts]):
        tokens = [t for row, start, n in segments for t in prompts[row][start : start + n]]
        hidden = checked_forward(model, tokens, segments, hidden=True)  # (n_tokens, dim)
        pieces = hidden.split([segment.length for segment in segments])
        for (row, _, _), piece in zip(segments, pieces, strict=True):
            if pooling == "mean":
                pooled[row] += piece.sum(0) / len(prompts[row])
            else:
                pooled[row] = piece[-1]
    return pooled


def last_logits(model: Transformer, prompts: Sequence[list[int]]) -> torch.Tensor:
    """The logits after each prompt's last token; arguments as in ``pool``.

    Returns:
        float32, shape (len(prompts), n_outputs).
    """
    found = torch.zeros(len(prompts), model.params.n_outputs, device=model.freqs_cis.device)
    for segments in prefill_passes([len(prompt) for prompt in prompts]):
        tokens = [t for row, start, n in segments for t in prompts[row][start : start + n]]
        ends = torch.tensor([segment.length for segment in segments]).cumsum(0) - 1
        logits = checked_forward(model, tokens, segments, ends.tolist())
        for (row, _, _), row_logits in zip(segments, logits, strict=True):
            found[row] = row_logits  # the last piece's stay
    return found


def label_scores(logits: torch.Tensor) -> list[float]:
    """The likeliest label's probability; a single label's stands against its absence."""
    if not len(logits):
        return []
    single = logits.shape[-1] == 1
    scores: list[float] = (logits.sigmoid() if single else logits.softmax(-1)).amax(-1).tolist()
    return scores
