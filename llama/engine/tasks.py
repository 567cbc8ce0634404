"""Text completion, chat and infilling as sequences for the engine."""

import random
from collections.abc import Callable, Collection, Mapping
from collections.abc import Sequence as List
from contextvars import ContextVar
from functools import cached_property
from typing import Any

from llama.adapters import Adapter, Adapters, n_virtual
from llama.args import ModelArgs
from llama.chat.ends import answer_ends
from llama.chat.layout import ChatFormat
from llama.chat.options import NO_OPTIONS, ChatOptions
from llama.chat.prompts import Dialog, has_tags, infilling_prompt_tokens
from llama.chat.request import ChatRequest, answer_parser
from llama.chat.roles import prompt_tokens
from llama.chat.tools import AnswerParser
from llama.engine.sequence import Output, Sequence, checked_prompts
from llama.errors import checked_list
from llama.logits.recommended import Recommended
from llama.sampling import SamplingParams
from llama.structure import Ranks, hold_to_form
from llama.tokenizer import BaseTokenizer
from llama.tokenizers.control import End, with_ends

Chosen = str | Adapter | None  # an adapter by its name, or as it was found
# Called between prompts; while it prepares many, a server lets other threads run.
between_prompts: ContextVar[Callable[[], None]] = ContextVar("prompts", default=lambda: None)


class Tasks:
    """Makes sequences of prompts, for a model of ``args``.

    Args:
        chat: how dialogs are written.
        seed: the source of the seeds of calls without their own.

    Attributes:
        ranks: "alone" if other ranks don't make the same calls, see ``compile_format``.
        adapters: those that a call may name.
        recommended: what ``sampling="checkpoint"`` stands for.
    """

    ranks: Ranks = "together"

    def __init__(self, args: ModelArgs, tokenizer: BaseTokenizer, chat: ChatFormat, seed: int):
        self.args = args
        self.tokenizer = tokenizer
        self.chat_format = chat
        self.recommended = Recommended()
        self.adapters = Adapters()
        self._seeds = random.Random(seed)

    def generate(
        self,
        prompts: List[List[int]],
        params: SamplingParams,
        output: Output = "text",
        in_context: bool | List[bool] = False,
        ends: Collection[End] = (),
        visible: Mapping[int, str] | None = None,
    ) -> list[Sequence]:
        """Continue prompts of token ids, each ``params.n`` times in a row.

        Args:
            in_context: whether a text continues its prompt's; for all or for each of the prompts.
            ends: ids and strings that end a sequence as the tokenizer's own end tokens do.
            visible: control ids whose spelling is part of the text.

        Raises:
            ImportError: ``response_format`` needs a package that is missing.
            TypeError, ValueError: a prompt doesn't fit, the model generates nothing, or
                ``response_format`` can't be compiled.
        """
        if self.args.labels is not None:
            able = "classifies" if self.args.labels else "embeds (it has no head)"
            raise ValueError(f"this checkpoint {able} and writes no text: use classify or embed")
        params, own = with_ends(self.recommended.apply(params), self.tokenizer, ends)
        outside = [i for i in params.logit_bias if not 0 <= i < self.tokenizer.n_words]
        if outside:
            raise ValueError(
                f"logit_bias names the token id {outside[0]}, outside the vocabulary of "
                f"{self.tokenizer.n_words}"
            )
        adapter = self.adapters.find(params.adapter, writes=True)
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        sequences: list[Sequence] = []
        for i, ids in enumerate(checked_prompts(self.args, prompts, adapter)):
            continues = in_context if isinstance(in_context, bool) else in_context[i]
            limit = self.args.max_seq_len - len(ids) - n_virtual(adapter)
            if params.max_gen_len is not None:
                limit = min(limit, params.max_gen_len)
            for _ in range(params.n):
                between_prompts.get()()
                number = f"{seed} {len(sequences)}"
                shown = visible or {}
                one = Sequence(ids, params, number, limit, output, continues, own, shown, adapter)
                sequences.append(one)
        hold_to_form(sequences, self.tokenizer, self.ranks)
        return sequences

    def text(
        self, prompts: List[str | list[int]], params: SamplingParams, in_context: bool = False
    ) -> list[Sequence]:
        """Continue texts, or prompts of token ids.

        ``in_context`` keeps a space at the beginning of the continuation, which then fits its
        prompt.
        """
        ids = [
            prompt if _is_token_ids(prompt) else self._encode(prompt)
            for prompt in checked_list(prompts, "prompts")
        ]
        return self.generate(ids, params, in_context=in_context or params.echo)

    def chat(
        self, dialogs: List[Dialog], params: SamplingParams, options: ChatOptions = NO_OPTIONS
    ) -> list[Sequence]:
        """Answer dialogs; one that holds the format's own tags gets an empty prompt."""
        chat, ids, dialogs = self.chat_format, [], list(checked_list(dialogs, "dialogs"))
        request = ChatRequest(chat, self.tokenizer, options)
        for dialog in dialogs:
            prompt = prompt_tokens(chat, self.tokenizer, dialog, options)
            ids.append([] if has_tags(dialog, chat.tags) else prompt)
        params, continues = request.params(params), [request.continues(d) for d in dialogs]
        return self.generate(ids, params, "text", continues, self.answer_ends, request.visible)

    def answer_parser(self, options: ChatOptions) -> AnswerParser | None:
        """Return the parser of an answer's tool calls; None if the options offer no tools."""
        return answer_parser(self.chat_format, options)

    @cached_property
    def answer_ends(self) -> frozenset[End]:
        """The ids and strings that end an answer, besides the tokenizer's own end tokens."""
        return answer_ends(self.chat_format, self.tokenizer)

    def infilling(
        self,
        prefixes: List[str],
        suffixes: List[str],
        params: SamplingParams,
        suffix_first: bool = False,
    ) -> list[Sequence]:
        """Fill in the text between prefixes and suffixes."""
        prefixes = checked_list(prefixes, "prefixes")
        suffixes = checked_list(suffixes, "suffixes")
        if len(prefixes) != len(suffixes):
            raise ValueError(f"{len(prefixes)} prefixes but {len(suffixes)} suffixes: give pairs")
        pairs = zip(prefixes, suffixes, strict=True)
        ids = [infilling_prompt_tokens(self.tokenizer, *pair, suffix_first) for pair in pairs]
        end = self.tokenizer.eot_id
        return self.generate(ids, params, "infilling", ends=() if end is None else (end,))

    def read(
        self, texts: List[str | list[int]], output: Output, adapter: Chosen = None
    ) -> list[Sequence]:
        """Read texts for the result that ``output`` names."""
        changed = self.adapters.find(adapter)
        params = SamplingParams(adapter=changed.name if changed else None)
        prompts = [
            text if _is_token_ids(text) else self._encode(text)
            for text in checked_list(texts, "texts")
        ]
        checked = checked_prompts(self.args, prompts, changed)
        return [Sequence(prompt, params, output=output, adapter=changed) for prompt in checked]

    def _encode(self, text: str) -> list[int]:
        between_prompts.get()()
        tokenizer = self.tokenizer
        ids = tokenizer.encode(text, bos=tokenizer.add_bos, eos=False)
        # An empty prompt needs something to continue, also where texts have no beginning.
        return ids or [tokenizer.bos_id] * (tokenizer.bos_id >= 0)


def _is_token_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int)
