"""Answers of a form: ``response_format`` becomes a grammar of tokens, through llguidance."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch

from llama import parallel
from llama.errors import WrongForm, need
from llama.sampling import SamplingParams
from llama.structure import trial
from llama.structure.formats import check_warnings, fault, grammar_of, unchecked
from llama.structure.grammar import TokenGrammar
from llama.structure.vocabulary import Compiled, Vocabulary, vocabulary_of
from llama.structure.worker import compile_grammar
from llama.tokenizer import BaseTokenizer

logger = logging.getLogger(__name__)

Ranks = Literal["alone", "together", "later"]

_FRAME = 1024  # bytes of rank 0's verdict
_FAILED = "failed: "  # begins the verdict of a trial that couldn't be made


class _Sequence(Protocol):
    """The part of an engine's sequence, which is above this package, that forms need."""

    params: SamplingParams
    output: Any
    in_context: bool
    visible: Mapping[int, str]
    grammar: Any


def hold_to_form(
    sequences: Sequence[_Sequence], tokenizer: BaseTokenizer, ranks: Ranks = "alone"
) -> None:
    """Give the sequences of a call, which have the same parameters, their ``grammar``.

    Raises:
        WrongForm: the form can't be compiled.
        ImportError, RuntimeError: see ``compile_format``.
    """
    form = sequences[0].params.response_format if sequences else None
    if form is not None:
        stops, visible = sequences[0].params.stop_token_ids, sequences[0].visible
        grammars: dict[bool, TokenGrammar | None] = {}
        for sequence in sequences:
            in_context = sequence.in_context or sequence.output == "infilling"
            if in_context not in grammars:
                try:
                    compiled = compile_format(form, tokenizer, stops, in_context, visible, ranks)
                except ValueError as error:
                    raise WrongForm(str(error)) from error
                grammars[in_context] = compiled
            grammar = grammars[in_context]
            sequence.grammar = grammar and grammar.copy()


def compile_format(
    response_format: Mapping[str, Any],
    tokenizer: BaseTokenizer,
    stop_ids: Iterable[int],
    in_context: bool,
    visible: Mapping[int, str] | None = None,
    ranks: Ranks = "alone",
) -> TokenGrammar | None:
    """Return the grammar of an answer, which several sequences may ``copy``.

    Args:
        response_format: as ``SamplingParams`` has it.
        stop_ids: the tokens that end the answer.
        in_context: whether the text keeps a space at its beginning.
        visible: control pieces whose spelling is part of the text, by id.
        ranks: "alone" if this process decides which grammars take too long; "together" if all
            ranks make this call, and rank 0 decides; "later" if another has decided.

    Returns:
        None if the answer may be any text.

    Raises:
        ImportError: llguidance is missing.
        ValueError: the form can't be compiled, or takes too long; names the keyword at fault.
        RuntimeError: the worker process doesn't start.
    """
    need("llguidance", "structure", "response_format")
    grammar = grammar_of(response_format)
    if grammar is None:
        return None
    vocabulary = vocabulary_of(tokenizer, visible or {})
    kept = vocabulary.kept(grammar)
    error = kept.error if kept else ""
    agrees = ranks == "together" and parallel.world_size() > 1
    if kept is None and ranks != "later" and not (agrees and parallel.rank()):
        try:
            error = trial.error_of(vocabulary, grammar)
        except RuntimeError as failure:
            error = f"{_FAILED}{failure}"
    if agrees:
        error = _of_rank_0(error)
    if error.startswith(_FAILED):  # on all ranks
        raise RuntimeError(error.removeprefix(_FAILED))
    if kept is None:
        kept = Compiled(None, error=error) if error else _compile(vocabulary, grammar)
        vocabulary.keep(grammar, kept)
    if error or kept.error:
        raise ValueError(fault(error or kept.error, response_format))
    unenforced = (*kept.unenforced, *unchecked(response_format))
    return TokenGrammar(kept.matcher.deep_copy(), vocabulary, stop_ids, not in_context, unenforced)


def _compile(vocabulary: Vocabulary, grammar: str) -> Compiled:
    matcher = compile_grammar(vocabulary.tokenizer, grammar)
    if matcher.is_error():
        return Compiled(None, error=matcher.get_error())
    try:
        unenforced = check_warnings(matcher.get_grammar_warnings())
    except ValueError as error:
        return Compiled(None, error=str(error))
    if unenforced:
        logger.warning("response_format asks for what isn't enforced: %s", ", ".join(unenforced))
    return Compiled(matcher, unenforced)


def _of_rank_0(text: str) -> str:
    """Return rank 0's text, cut to the length of a frame."""
    data = text.encode()[:_FRAME].ljust(_FRAME, b"\0")
    frame = parallel.broadcast(torch.tensor(list(data), dtype=torch.uint8, device="cpu"))
    return bytes(frame.tolist()).rstrip(b"\0").decode(errors="ignore")
