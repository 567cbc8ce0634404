"""A sampler, added: top-n-sigma, which draws from the logits that stand out from the others."""

import torch

from llama import Llama
from llama.sampling import LogitsProcessor

PROMPT = [1, 300]


def top_n_sigma(n: float) -> LogitsProcessor:
    """Return a processor that leaves tokens within ``n`` standard deviations of the largest logit.

    The deviation is that of the tokens which are allowed. The choice doesn't depend on temperature.

    Source: https://arxiv.org/abs/2411.07641
    """

    def process(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        allowed = logits[logits > -1e29]  # bans and grammars have set the others
        limit = logits.amax() - n * allowed.std(correction=0)
        return logits.masked_fill(logits < limit, -torch.inf)

    return process


def outliers(llama: Llama, tokens: list[int], n: float) -> int:
    """The number of tokens that were drawn from outside of the ``n`` deviations."""
    logits = llama.model(torch.tensor([[*PROMPT, *tokens]]))[0, len(PROMPT) - 1 : -1]
    drawn = logits.gather(1, torch.tensor(tokens)[:, None]).squeeze(1)
    return int((drawn < logits.amax(dim=1) - n * logits.std(dim=1, correction=0) - 1e-4).sum())


def test_only_tokens_near_the_largest_logit_are_drawn(tiny: Llama) -> None:
    """A failure means that a hot temperature draws from the tail, or nothing but the first."""
    how = {"temperature": 2.0, "top_p": 1.0, "seed": 5}
    [plain], _ = tiny.generate([PROMPT], 40, **how)
    [found], _ = tiny.generate([PROMPT], 40, **how, logits_processor=top_n_sigma(1.0))
    [greedy], _ = tiny.generate([PROMPT], 40, temperature=0)
    assert outliers(tiny, plain, 1.0) > 0
    assert outliers(tiny, found, 1.0) == 0
    assert found != greedy
    [nearest], _ = tiny.generate([PROMPT], 40, **how, logits_processor=top_n_sigma(0))
    assert nearest == greedy


def test_forbidden_tokens_do_not_count(tiny: Llama) -> None:
    """A failure means that under a ban or a grammar nothing is left out, or all is."""
    form = {"type": "choice", "choice": ["moo", "buzz"]}
    bias = {tiny.tokenizer.eos_id: -100}
    hot = {"temperature": 50.0, "n": 8, "seed": 1, "response_format": form, "logit_bias": bias}
    found = tiny.text_completion(["The cow says"], **hot)
    assert {each["generation"] for each in found} == {"moo", "buzz"}
    found = tiny.text_completion(["The cow says"], **hot, logits_processor=top_n_sigma(0))
    assert {each["generation"] for each in found} == {"moo"}
