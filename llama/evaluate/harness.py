"""The model that lm-eval evaluates, under the name ``llama``: its requests, run by the engine.

Importing this module registers the model, so that ``lm_eval.simple_evaluate("llama", …)`` finds it.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as List
from dataclasses import replace
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llama.chat.options import ChatOptions
from llama.chat.prompts import Dialog
from llama.chat.roles import prompt_tokens
from llama.checkpoint.pretrained import TINY
from llama.checkpoint.sharding import parameter_count
from llama.cli import progress
from llama.engine.sequence import Sequence
from llama.evaluate.flags import ModelFlags
from llama.evaluate.generation import Generation
from llama.evaluate.runner import Runner
from llama.evaluate.scoring import Pair, Score, scores
from llama.generation import Llama
from llama.tokenizers.spellings import Spellings


@register_model("llama")
class LlamaLM(TemplateLM):
    """A ``Llama`` as lm-eval's language model. Texts are read as lm-eval's ``hf`` model reads them.

    What a text spells out of control pieces becomes control pieces, since lm-eval has chat
    templates as texts only. Prompts that begin alike are read once.
    """

    def __init__(
        self,
        pretrained: str | Llama = str(TINY),
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        device: str | None = None,
        **flags: Any,
    ):
        """Load a model.

        Args:
            pretrained: a checkpoint of any format, or a model that is built.
            batch_size: prompts to process at once; "auto" for 32.
            max_batch_size: at most, with "auto".
            device: see ``ModelFlags``.
            flags: of ``ModelFlags``.

        Raises:
            As ``Llama.build``.
        """
        super().__init__()
        if isinstance(pretrained, str):
            if batch_size == "auto" and max_batch_size is not None:
                batch_size = max_batch_size
            config = ModelFlags(pretrained, batch_size=batch_size, device=device, **flags)
            pretrained = config.build(torch.initial_seed())  # the seed that lm-eval has set
        self.llama = pretrained
        self._device = self.llama.model.freqs_cis.device
        self._runner = Runner(self.llama.engine)
        self._spellings = Spellings(self.llama.tokenizer)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "LlamaLM":
        """Load a model; the model's arguments go before those that lm-eval adds."""
        return cls(**{**(additional_config or {}), **arg_dict})

    @property
    def max_length(self) -> int:
        """The tokens that the network reads at most."""
        return self.llama.model.params.max_seq_len

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.llama.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The id before a text without a context."""
        tokenizer = self.llama.tokenizer
        return tokenizer.bos_id if tokenizer.bos_id >= 0 else tokenizer.eos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """Return the ids of a text, which begin as a text on its own does."""
        is_own = add_special_tokens is None or add_special_tokens
        return self._spellings.encode(string, bos=is_own and self.llama.tokenizer.add_bos)

    def _loglikelihood_tokens(
        self,
        requests: List[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: object,
    ) -> list[Score]:
        found: dict[int, Score] = {}
        for i, score in self._scores([Pair(*request[1:]) for request in requests]):
            found[i] = score
            self.cache_hook.add_partial("loglikelihood", requests[i][0], score)
        return [found[i] for i in range(len(requests))]

    def loglikelihood_rolling(
        self, requests: List[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihoods of whole texts, read in windows."""
        texts: list[str] = [request.args[0] for request in requests]
        windows: list[Pair] = []
        owners: list[int] = []
        for i, text in enumerate(texts):
            ids = self.tok_encode(text)
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            windows += [Pair(*make_disjoint_window(window)) for window in rolling]
            owners += [i] * (len(windows) - len(owners))
        left = Counter(owners)
        totals = [0.0] * len(texts)
        for i, (logprob, _) in self._scores(windows):
            owner = owners[i]
            totals[owner] += logprob
            left[owner] -= 1
            if not left[owner]:
                key = (texts[owner],)
                self.cache_hook.add_partial("loglikelihood_rolling", key, totals[owner])
        return totals

    def generate_until(self, requests: List[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the continuations of contexts, each up to its stop strings."""
        asked = [Generation.of(request.args[1]) for request in requests]
        numbers: dict[Sequence, int] = {}

        def sequences() -> Iterator[Sequence]:
            for i, (request, generation) in enumerate(zip(requests, asked, strict=True)):
                ids = self.tok_encode(request.args[0])
                prompt = ids[-generation.room(self.max_length) :]
                [sequence] = self.llama.tasks.generate([prompt], generation.params)
                numbers[sequence] = i
                yield sequence

        texts = [""] * len(requests)
        with progress(len(requests), "generating", "answers") as show:
            for n_done, sequence in enumerate(self._runner.run(sequences()), 1):
                i = numbers.pop(sequence)
                texts[i] = sequence.text
                self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                show(n_done)
        return texts

    def _scores(self, pairs: List[Pair]) -> Iterator[tuple[int, Score]]:
        with progress(len(pairs), "scoring", "continuations") as show:
            found = scores(self._runner, self.llama.model.params, pairs)
            for n_done, (i, score) in enumerate(found, 1):
                yield i, score
                show(n_done)

    def apply_chat_template(self, chat_history: Dialog, add_generation_prompt: bool = True) -> str:
        """Return a dialog as the model's chat format writes it, with control pieces spelled out.

        Roles that the format has no place for are folded into those that it has.
        """
        chat, tokenizer = self.llama.chat, self.llama.tokenizer
        options = ChatOptions(continue_final_message=not add_generation_prompt)
        try:
            ids = prompt_tokens(chat, tokenizer, chat_history, options)
        except ValueError:
            folded = replace(options, merge_roles=True)
            ids = prompt_tokens(chat, tokenizer, chat_history, folded)
        return self._spellings.decode(ids)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the chat format's template, or its name if it has none, for the results."""
        return (self.llama.chat.template or self.llama.chat.name) if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """A name of the chat format, which lm-eval's cache of requests tells prompts apart by."""
        name = self.chat_template(True) or ""
        return f"llama-{hashlib.sha256(name.encode()).hexdigest()[:16]}"

    def get_model_info(self) -> dict[str, object]:
        """Return what the results say about the model."""
        args = self.llama.model.params
        return {
            "model_num_parameters": parameter_count(args),
            "model_dtype": str(self.llama.model.norm.weight.dtype),
            "max_length": args.max_seq_len,
            "chat_format": self.llama.chat.name,
        }
