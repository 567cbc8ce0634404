"""Generation: prompts in, the model's continuations out, whole or token by token."""

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llama import guards
from llama.chat.formats import choose_chat
from llama.chat.layout import ChatFormat
from llama.chat.options import ChatArguments, split_options
from llama.chat.prompts import *  # noqa: F403 (Meta's names are imported from here)
from llama.chat.prompts import UNSAFE_ERROR, Dialog, has_tags
from llama.chat.tools import answer_message
from llama.checkpoint.pretrained import TINY as TINY
from llama.checkpoint.pretrained import LoadConfig, load_adapter, load_model
from llama.engine.engine import Engine
from llama.engine.graphs import decoding_steps
from llama.engine.lock import CacheLock
from llama.engine.results import ChatPrediction as ChatPrediction
from llama.engine.results import Classification as Classification
from llama.engine.results import CompletionPrediction as CompletionPrediction
from llama.engine.results import InfillingPrediction as InfillingPrediction
from llama.engine.results import StreamPiece, classification, prediction, stream_pieces
from llama.engine.sequence import Event, Output
from llama.engine.sequence import Sequence as EngineSequence
from llama.engine.tasks import Chosen, Tasks
from llama.errors import checked_list
from llama.model import Transformer
from llama.sampling import SamplingOptions, SamplingParams, sample_top_p  # noqa: F401
from llama.tokenizer import BaseTokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Llama:
    """A model, its tokenizer and its chat format. Calls from several threads wait for each other.

    Attributes:
        tasks: makes sequences of prompts, which ``engine`` runs.
        adapters: those that calls may choose, by name.
        input_guard: judges dialogs before they are answered (``llama.guards``); None lets all pass.
        output_guard: judges the answers.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: BaseTokenizer,
        seed: int = 1,
        chat: ChatFormat | None = None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.chat = chat or choose_chat(None, {}, tokenizer)
        self.engine = Engine(model, tokenizer)
        self.tasks = Tasks(model.params, tokenizer, self.chat, seed)
        self.adapters = self.tasks.adapters
        self.input_guard: guards.InputGuard | None = None
        self.output_guard: guards.OutputGuard | None = None
        self._lock = CacheLock()

    @staticmethod
    def build(
        ckpt_dir: str | Path = TINY,
        tokenizer_path: str | Path | None = None,
        max_seq_len: int = 512,
        max_batch_size: int = 8,
        model_parallel_size: int | None = None,
        seed: int = 1,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        *,
        adapter: str | Path | Sequence[str | Path] = (),
        chat_format: str | None = None,
        compile: bool = False,
        quantize: str | None = None,
        group_size: int | None = None,
        kv_cache_dtype: str | None = None,
        chat_template: str | Path | None = None,
        tool_format: str | None = None,
    ) -> "Llama":
        """Load a checkpoint, in one process or with the others that ``torchrun`` started.

        Args:
            ckpt_dir: a directory in Meta's or Hugging Face's layout, a GGUF file or one of
                llama2.c; the embedded checkpoint by default.
            tokenizer_path: a ``tokenizer.model`` or ``tokenizer.json``, where the checkpoint
                doesn't bring its own.
            max_seq_len: positions in the cache: prompt and generated tokens together.
            max_batch_size: slots in the cache; more prompts wait for a free one.
            model_parallel_size: where given, must equal the number of processes.
            seed: the source of later calls' seeds; the same in all processes.
            device: where to run; CUDA, else Apple's MPS, else the CPU by default.
            dtype: of the computation; by default as the checkpoint and the device suggest.
            adapter: a directory with a LoRA adapter to merge in, or several in order.
            chat_format: how dialogs are written, one of ``llama.chat.formats.FORMATS``; by default
                as the checkpoint's own template says, else as Meta's models were trained.
            compile: compile decoding steps and, on CUDA, how prompts widen a file's weights; needs
                Triton, or a C++ compiler on a CPU.
            quantize: "int8", "int4" (about 4.8 bits), or "none" to widen a quantised checkpoint.
            group_size: how many weights share a scale in int4: 32, 64, 128 or 256; by default 64,
                and more bits, up to llama.cpp's Q4_K_M, for the weights that need them most.
            kv_cache_dtype: "int8" halves the cache, with slower steps after a long text.
            chat_template: a Jinja template, or its file, in place of the checkpoint's own.
            tool_format: "hermes" describes tools in the system message, for chat formats without a
                place for them (``llama.chat.hermes``).

        Raises:
            FileNotFoundError: the directory, a weight file or the tokenizer is missing.
            ImportError: the checkpoint's format needs a package that isn't installed.
            MemoryError: weights and cache need more memory than the machine has.
            RuntimeError: PyTorch can't compile here.
            ValueError: a file is malformed, or files, processes and arguments don't fit together.
        """
        config = LoadConfig(
            ckpt_dir,
            tokenizer_path,
            max_seq_len,
            max_batch_size,
            model_parallel_size,
            device,
            dtype,
            [adapter] if isinstance(adapter, str | Path) else adapter,
            chat_format,
            quantize,
            group_size,
            kv_cache_dtype,
            chat_template,
            tool_format,
            compile,
        )
        model, tokenizer, chat, recommended = load_model(config)
        llama = Llama(model, tokenizer, seed, chat)
        llama.tasks.recommended = recommended
        llama.engine.decode = decoding_steps(llama.model, compile)
        return llama

    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        stop_token: int | None = None,
        **options: "Unpack[SamplingOptions]",
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Continue prompts of token ids.

        Args:
            prompt_tokens: the prompts, of any lengths from 1 to ``max_seq_len``.
            max_gen_len, temperature, top_p, logprobs, echo, options: see ``SamplingParams``.
            stop_token: an id that ends a sequence, besides the end of sequence.

        Returns:
            The sequences' tokens, without stop token or string unless ``include_stop``, and
            log-probabilities or None. With ``n`` each prompt has so many in a row, in all tasks.

        Raises:
            TypeError, ValueError: an argument is wrong, or a prompt doesn't fit.
            RuntimeError: the logits aren't finite, or a second thread calls on several ranks.
        """
        if not isinstance(stop_token, int | None):
            raise TypeError(f"stop_token is {stop_token!r}: give one token id")
        params = SamplingParams(temperature, top_p, max_gen_len, logprobs, echo, **options)
        if stop_token is not None:
            params = replace(params, stop_token_ids={*params.stop_token_ids, stop_token})
        sequences = self.tasks.generate(prompt_tokens, params, "text" if params.stop else "ids")
        self._run(sequences)
        tokens = [s.prompt * params.echo + s.tokens for s in sequences]
        scores = [s.prompt_logprobs * params.echo + s.logprobs for s in sequences]
        return tokens, scores if logprobs else None

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        **options: "Unpack[SamplingOptions]",
    ) -> list[CompletionPrediction]:
        """Continue texts. Arguments and errors as in ``generate``.

        Returns:
            For each prompt ``{"generation": text}``, see ``Prediction``.
        """
        params = SamplingParams(temperature, top_p, max_gen_len, logprobs, echo, **options)
        sequences = self.tasks.text(prompts, params)
        self._run(sequences)
        decode = self.tokenizer.decode
        texts = [decode(s.prompt) * params.echo + s.text for s in sequences]
        pairs = zip(texts, sequences, strict=True)
        return [prediction(s, self.tokenizer, generation=text) for text, s in pairs]

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        **options: "Unpack[ChatArguments]",
    ) -> list[ChatPrediction]:
        """Answer dialogs. Arguments as in ``generate``, and as in ``ChatOptions``.

        Returns:
            For each dialog ``{"generation": {"role": "assistant", "content": text}}``, with
            "tool_calls" where the answer calls tools. A dialog whose messages contain the format's
            own tags is answered with an error text, and one that a guard refuses with its reason.

        Raises:
            ValueError: a dialog is not well formed (``llama.chat.prompts.check_dialog``), or as in
                ``generate``.
        """
        chat, rest = split_options(options)
        params = SamplingParams(temperature, top_p, max_gen_len, logprobs, **rest)
        dialogs = list(checked_list(dialogs, "dialogs"))
        sequences = self.tasks.chat(dialogs, params, chat)
        refusals = [self._refusal(dialog) for dialog in dialogs for _ in range(params.n)]
        asked = zip(sequences, refusals, strict=True)
        self._run([sequence for sequence, refused in asked if refused is None])
        dialogs = _repeated(dialogs, params.n)
        predictions: list[ChatPrediction] = []
        for dialog, sequence, refused in zip(dialogs, sequences, refusals, strict=True):
            if refused is None:
                refused = guards.output_refusal(self.output_guard, dialog, sequence.text)
            if refused is not None:
                sequence.tokens, sequence.logprobs = [], []
                sequence.finish_reason, sequence.stop_reason = "content_filter", None
            parser = None if refused else self.tasks.answer_parser(chat)
            answer = answer_message(refused or sequence.text, parser)
            if self.chat.name == "turn-based":
                answer["destination"] = "user"
            predictions.append(prediction(sequence, self.tokenizer, generation=answer))
            if "tool_calls" in answer and sequence.finish_reason == "stop":
                predictions[-1]["finish_reason"] = "tool_calls"
        return predictions

    def text_infilling(
        self,
        prefixes: Sequence[str],
        suffixes: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        suffix_first: bool = False,
        **options: "Unpack[SamplingOptions]",
    ) -> list[InfillingPrediction]:
        """Fill in between prefixes and suffixes; ``suffix_first`` prompts with the suffix first.

        Returns:
            For each pair ``{"generation": middle, "full_text": prefix + middle + suffix}``.

        Raises:
            ValueError: the model wasn't trained for infilling, or as in ``generate``.
        """
        params = SamplingParams(temperature, top_p, max_gen_len, logprobs, **options)
        sequences = self.tasks.infilling(prefixes, suffixes, params, suffix_first)
        self._run(sequences)
        predictions: list[InfillingPrediction] = []
        pairs = _repeated(zip(prefixes, suffixes, strict=True), params.n)
        for sequence, (prefix, suffix) in zip(sequences, pairs, strict=True):
            texts = {"generation": sequence.text, "full_text": prefix + sequence.text + suffix}
            predictions.append(prediction(sequence, self.tokenizer, **texts))
        return predictions

    def text_completion_stream(
        self,
        prompt: str,
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        **options: "Unpack[SamplingOptions]",
    ) -> Generator[StreamPiece, None, None]:
        """Yield the text of ``text_completion`` piece by piece.

        Until it is exhausted or closed, other threads wait; another call of the same thread takes
        the model over, and the iterator then raises RuntimeError.
        """
        params = SamplingParams(temperature, top_p, max_gen_len, True, False, **options)
        return self._stream(self.tasks.text([prompt], params))

    def chat_completion_stream(
        self,
        dialog: Dialog,
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        **options: "Unpack[ChatArguments]",
    ) -> Generator[StreamPiece, None, None]:
        """Yield ``chat_completion``'s answer to a dialog; an ``output_guard`` may hold it back.

        Calls of tools come as the model writes them: ``llama.tasks.answer_parser`` parses them.
        """
        chat, rest = split_options(options)
        params = SamplingParams(temperature, top_p, max_gen_len, True, False, **rest)
        sequences = self.tasks.chat([dialog], params, chat)
        refused = self._refusal(dialog)
        if refused is not None:
            return (piece for piece in [StreamPiece(refused, finish_reason="content_filter")])
        pieces = self._stream(sequences)
        if self.output_guard is None:
            return pieces
        return guards.guarded(pieces, guards.StreamGuard(dialog, self.output_guard))

    def text_infilling_stream(
        self,
        prefix: str,
        suffix: str,
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        suffix_first: bool = False,
        **options: "Unpack[SamplingOptions]",
    ) -> Generator[StreamPiece, None, None]:
        """Yield ``text_infilling``'s middle of one pair, as ``text_completion_stream`` does."""
        params = SamplingParams(temperature, top_p, max_gen_len, True, False, **options)
        return self._stream(self.tasks.infilling([prefix], [suffix], params, suffix_first))

    def embed(
        self, texts: Sequence[str], pooling: str = "mean", adapter: str | None = None
    ) -> torch.Tensor:
        """Return vectors of texts: the network's last hidden states.

        Args:
            texts: of any number and lengths up to ``max_seq_len`` tokens.
            pooling: ``"mean"`` over a text's tokens, or the ``"last"`` one's.
            adapter: see ``SamplingParams``.

        Returns:
            float32, shape (len(texts), dim); not normalised.

        Raises:
            TypeError, ValueError, RuntimeError: as in ``generate``.
        """
        if pooling not in ("mean", "last"):
            raise ValueError(f"pooling is {pooling!r}: expected 'mean' or 'last'")
        vectors = self._read(texts, pooling, adapter)  # type: ignore[arg-type]
        return vectors.reshape(-1, self.model.params.dim)

    def classify(self, texts: Sequence[str], adapter: str | None = None) -> list[Classification]:
        """Return the class of each text, for checkpoints or adapters with a classifier's head.

        Raises:
            ValueError: neither has labels, or as in ``embed``.
        """
        chosen = self.adapters.find(adapter)  # once: another thread may replace it
        labels, head = self.adapters.classifier(chosen, self.model.params.labels)
        found = self._read(texts, "logits" if head is None else "last", chosen)
        return [classification(each, labels, head) for each in found]

    def load_adapter(self, name: str, directory: str | Path, scale: float = 1.0) -> None:
        """Load an adapter in PEFT's format, on all ranks, for calls that name it (``adapter=``).

        One of this name is replaced, but for open streams. ``scale`` multiplies its changes.

        Raises:
            OSError, ImportError, RuntimeError, TypeError, ValueError: as in ``build``.
        """
        self._lock.check_thread()
        self.adapters.add(load_adapter(name, directory, self.model, self.tokenizer, scale))

    def unload_adapter(self, name: str) -> None:
        """Free an adapter, once its open streams have ended.

        Raises:
            ValueError: no adapter has this name.
        """
        self.adapters.remove(name)

    def reset_cache(self) -> None:
        """Forget the prompts of earlier calls, which later ones otherwise reuse."""
        self.engine.forget()

    def _events(self, sequences: Sequence[EngineSequence], is_open: bool) -> Iterator[Event]:
        """Run sequences, which a later call may take over if this one yields to its caller."""
        with self._lock.exclusive() as check_ownership:
            self.engine.cancel_all()  # those of a stream whose cache this call takes
            self.engine.submit(sequences, network_may_change=is_open)
            try:
                while self.engine.n_running or self.engine.n_waiting:
                    for event in self.engine.step():
                        yield event
                        check_ownership()
            finally:
                for sequence in sequences:
                    self.engine.cancel(sequence)

    def _run(self, sequences: Sequence[EngineSequence]) -> None:
        deque(self._events(sequences, is_open=False), maxlen=0)

    def _stream(self, sequences: Sequence[EngineSequence]) -> Generator[StreamPiece, None, None]:
        if len(sequences) > 1:
            raise ValueError(f"n is {len(sequences)}: a stream has one answer, leave n out")
        return stream_pieces(self._events(sequences, is_open=True))

    def _read(self, texts: Sequence[str], output: Output, adapter: Chosen) -> torch.Tensor:
        sequences = self.tasks.read(texts, output, adapter)
        self._run(sequences)
        pooled = [sequence.pooled for sequence in sequences if sequence.pooled is not None]
        return torch.stack(pooled) if pooled else torch.zeros(0)

    def _refusal(self, dialog: Dialog) -> str | None:
        """Return the error text or the refusal that answers a dialog; None if the model may."""
        if has_tags(dialog, self.chat.tags):
            return UNSAFE_ERROR
        return guards.input_refusal(self.input_guard, dialog)


def _repeated(items: Iterable[Any], n: int) -> list[Any]:
    return [item for item in items for _ in range(n)]
