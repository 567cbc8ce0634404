"""Prompts of text requests in which control pieces are spelled out (``parse_special``)."""

from collections.abc import Sequence

from llama.engine.sequence import Output
from llama.engine.sequence import Sequence as EngineSequence
from llama.sampling import SamplingParams
from llama.server.service import Service


def continue_spelled(
    service: Service,
    prompts: Sequence[str | list[int]],
    params: SamplingParams,
    last: int | None = None,
) -> list[EngineSequence]:
    """Continue texts in which control pieces are spelled out, or prompts of token ids.

    Prompts that ask for a middle end as those of ``suffix`` do. Of each the last tokens are kept,
    or all.
    """
    tasks, tokenizer = service.llama.tasks, service.llama.tokenizer
    ids = [_spelled_ids(service, each) if isinstance(each, str) else each for each in prompts]
    ids = [each[-last:] if last else each for each in ids]
    asked = [tokenizer.middle_id in each for each in ids]
    ends = [tokenizer.eot_id] if any(asked) and tokenizer.eot_id is not None else []
    infills = all(asked) and not params.echo
    output: Output = "infilling" if infills else "text"
    return tasks.generate(ids, params, output, in_context=not infills, ends=ends)


def _spelled_ids(service: Service, text: str) -> list[int]:
    tokenizer = service.llama.tokenizer
    ids = service.spellings.encode(text, bos=tokenizer.add_bos)
    # An empty prompt needs something to continue.
    return ids or [tokenizer.bos_id] * (tokenizer.bos_id >= 0)
