"""The arguments of lm-eval's requests for text (``generation_kwargs``) as ``SamplingParams``."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lm_eval.models.utils import normalize_gen_kwargs

from llama.sampling import SamplingParams

_MAX_TOKENS = 256  # as lm-eval's models have it
_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
_OTHERS = ("repetition_penalty", "presence_penalty", "frequency_penalty", "seed")


class Generation(NamedTuple):
    """The sampling parameters of a request of lm-eval, and the most tokens of its answer."""

    params: SamplingParams
    max_tokens: int

    @staticmethod
    def of(arguments: Mapping[str, Any]) -> "Generation":
        """Read a request's arguments.

        Raises:
            ValueError: an argument isn't known.
        """
        rest = dict(normalize_gen_kwargs(dict(arguments), _MAX_TOKENS))
        stop, max_tokens = rest.pop("until"), rest.pop("max_gen_toks")
        given = {name: rest.pop(name) for name in (*_SAMPLING, *_OTHERS) if name in rest}
        sampling = {**_SAMPLING, **given} if rest.pop("do_sample") else {"temperature": 0.0}
        params = {name: given[name] for name in _OTHERS if name in given} | sampling
        if rest.pop("num_beams", 1) != 1 or rest:
            unknown = ", ".join(rest) or "num_beams"
            known = ", ".join(("until", "max_gen_toks", "do_sample", *_SAMPLING, *_OTHERS))
            raise ValueError(f"generation_kwargs has {unknown}: known are {known}")
        stops = [text for text in stop if text]
        return Generation(SamplingParams(**params, max_gen_len=max_tokens, stop=stops), max_tokens)

    def room(self, max_length: int) -> int:
        """Return how many tokens a prompt may have: of a longer one the end is read.

        Raises:
            ValueError: the answer alone may be as long as the cache.
        """
        if self.max_tokens >= max_length:
            raise ValueError(
                f"max_gen_toks is {self.max_tokens}, which leaves no room for a prompt in "
                f"max_seq_len, {max_length}: give --max_seq_len more, or max_gen_toks less"
            )
        return max_length - self.max_tokens
