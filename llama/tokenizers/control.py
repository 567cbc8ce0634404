"""Control pieces in generated texts: those that end one, and those that are written out."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from llama.sampling import SamplingParams
from llama.tokenizer import BaseTokenizer

# The control pieces that end a text, a turn or a message in published vocabularies, by which
# llama.cpp too (src/llama-vocab.cpp) finds the ends that a checkpoint's files don't name. Code
# Llama's ▁<EOT> isn't one: it ends what is filled in, and nothing else.
END_PIECES = frozenset(
    {
        *("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "[EOS]"),
        *("<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>", "<|im_end|>", "<|end|>"),
        *("<end_of_turn>", "<|end_of_turn|>", "<end_of_utterance>"),
        *("<EOT>", "_<EOT>", "[EOT]", "<|EOT|>"),
    }
)

# The marks that this library's chat formats write, and those that published templates put
# together from a role. No text becomes one, even where no file tells that they are marks.
FORMAT_MARKS = frozenset(
    {
        *("<|im_start|>", "<|im_end|>"),
        *("<|prompter|>", "<|assistant|>", "<|system|>", "<|user|>"),
        *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|python_tag|>",
    }
)

End = int | str
"""The end of a text: a token's id or a string."""


def end_ids(tokenizer: BaseTokenizer, named: Iterable[int]) -> frozenset[int]:
    """Return all ids that end a text.

    Args:
        tokenizer: the tokenizer, whose ``bos_id`` and ``eos_id`` are set.
        named: ids that the checkpoint's configuration names.
    """
    controls = tokenizer.control_ids
    by_name = {controls[piece] for piece in END_PIECES & controls.keys()}
    # A piece that begins texts ends none, unless it is the model's mark between two.
    found = {*named, *by_name} - {tokenizer.bos_id} | {tokenizer.eos_id}
    return frozenset(i for i in found if i >= 0)


def with_ends(
    params: SamplingParams, tokenizer: BaseTokenizer, ends: Collection[End] = ()
) -> tuple[SamplingParams, frozenset[End]]:
    """Return the parameters with all strings and ids that end a text.

    A string that is a control piece's spelling ends a text as this piece's id too.

    Args:
        params: the caller's, with the caller's stops.
        tokenizer: brings its own end tokens.
        ends: those of the format of the prompt.

    Returns:
        The parameters, and which of their stops are the tokenizer's or the format's own: those
        that the caller didn't give. There are none with ``ignore_eos``.
    """

    def spelled(stops: Iterable[End]) -> set[End]:
        return {tokenizer.control_ids[s] for s in stops if s in tokenizer.control_ids}

    given = {*params.stop, *params.stop_token_ids, *spelled(params.stop)}
    own = set() if params.ignore_eos else {*ends, *spelled(ends), *tokenizer.stop_ids} - given
    stops = [*params.stop, *sorted(end for end in own if isinstance(end, str))]
    ids = [end for end in given | own if isinstance(end, int)]
    return replace(params, stop=stops, stop_token_ids=ids), frozenset(own)


def with_marks(
    decode: Callable[[Sequence[int]], str], tokenizer: BaseTokenizer, marks: Mapping[int, str]
) -> Callable[[Sequence[int]], str]:
    """Return a function that decodes as ``decode`` does, with some control pieces written out.

    A text after such a piece begins as ``encode_parts`` reads it.

    Args:
        decode: decodes the text up to the first of them.
        tokenizer: the tokenizer.
        marks: the spellings of control pieces by id.
    """
    if not marks:
        return decode
    after = tokenizer.decode if tokenizer.spaced else tokenizer.decode_infilling

    def decode_marked(ids: Sequence[int]) -> str:
        text, begin, read = "", 0, decode
        for i, token in enumerate(ids):
            if token in marks:
                text += read(ids[begin:i]) + marks[token]
                begin, read = i + 1, after
        return text + read(ids[begin:])

    return decode_marked
