"""From logits to the next tokens: pure functions of tensors."""

import torch


def next_tokens(
    logits: torch.Tensor, temperature: float, top_p: float, uniforms: torch.Tensor
) -> torch.Tensor:
    """The next token of each row.

    Args:
        logits: float32, shape (bsz, vocab_size).
        temperature: what logits are divided by; 0 (or less than 1e-6) takes the likeliest token.
        top_p: the probability mass to draw from (nucleus sampling).
        uniforms: one number in [0, 1) for each row, shape (bsz,): the draw.

    Returns:
        int64, shape (bsz,).
    """
    if temperature < 1e-6:
        return logits.argmax(dim=-1)
    # The maximum is taken off first, so that a small temperature can't overflow.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    return sample_top_p(scaled.softmax(dim=-1), top_p, uniforms)


def sample_top_p(probs: torch.Tensor, top_p: float, uniforms: torch.Tensor) -> torch.Tensor:
    """Draw from the smallest set of tokens whose probabilities reach ``top_p``.

    Inverse transform sampling (https://arxiv.org/abs/1904.09751 for the nucleus): the row's own
    number decides, so a row's draw doesn't depend on its neighbours.

    Args:
        probs: float32, shape (bsz, vocab_size), each row adding up to 1.
        top_p: 0 to 1; the likeliest token is always in the set.
        uniforms: in [0, 1), shape (bsz,).

    Returns:
        int64, shape (bsz,).
    """
    sorted_probs, order = probs.sort(dim=-1, descending=True)
    reached = sorted_probs.cumsum(dim=-1)
    nucleus = reached - sorted_probs <= top_p
    nucleus[:, 0] = True
    size = nucleus.sum(dim=-1, keepdim=True)
    mass = reached.gather(1, size - 1)
    uniforms = uniforms.clamp(max=1 - 2**-24)  # a draw just below 1 may have been rounded up
    drawn = (reached <= uniforms[:, None] * mass).sum(dim=-1, keepdim=True)
    return order.gather(1, torch.minimum(drawn, size - 1)).squeeze(1)


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of tokens under untempered logits.

    Args:
        logits: float32, shape (n, vocab_size).
        tokens: int64, shape (n,).

    Returns:
        float32, shape (n,).
    """
    return logits.log_softmax(dim=-1).gather(1, tokens[:, None]).squeeze(1)
