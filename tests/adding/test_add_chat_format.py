"""A chat format, added: Zephyr's, which TinyLlama's chat models have, too."""

import pytest

from llama import Dialog, Llama, Tokenizer
from llama.chat.formats import FORMATS
from llama.chat.layout import ChatFormat, lay_out
from llama.chat.options import NO_OPTIONS, ChatOptions

DIALOG: Dialog = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": " 1."},
    {"role": "user", "content": "Two</s>?"},
]
PIECES = """
<s> ▁ < <0x7C> s y st e m <0x7C> > <0x0A> B e ▁b r i ef . </s>
▁ <0x0A> < <0x7C> u s er <0x7C> > <0x0A> O n e ? </s>
▁ <0x0A> < <0x7C> a s s ist an t <0x7C> > <0x0A> 1 . </s>
▁ <0x0A> < <0x7C> u s er <0x7C> > <0x0A> T w o < / s > ? </s>
▁ <0x0A> < <0x7C> a s s ist an t <0x7C> > <0x0A>
"""


def zephyr_tokens(
    tokenizer: Tokenizer, dialog: Dialog, options: ChatOptions = NO_OPTIONS
) -> list[int]:
    r"""Return a dialog in Zephyr's format.

    <s><|system|>\nSYSTEM</s>\n<|user|>\nUSER</s>\n<|assistant|>\nANSWER</s>\n<|user|>…

    Source: https://huggingface.co/TinyLlama/TinyLlama-1.1B-Chat-v1.0 (tokenizer_config.json)
    """
    return lay_out(
        tokenizer,
        dialog,
        options,
        head="<|system|>\n{system}{eos}\n",
        user="<|user|>\n{user}{eos}\n<|assistant|>\n",
        answer="{answer}{eos}\n",
    )


@pytest.fixture(autouse=True)
def zephyr(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of ``_FORMATS`` in llama/chat/formats.py, which gives a format its name."""
    monkeypatch.setitem(FORMATS, "zephyr", ChatFormat(zephyr_tokens, name="zephyr"))


def test_a_dialog_s_pieces_are_the_layout_s(tiny_tokenizer: Tokenizer) -> None:
    """A failure means that a model gets other tokens than it was trained with, or that a message
    can end its own turn."""
    ids = zephyr_tokens(tiny_tokenizer, DIALOG)
    assert [tiny_tokenizer.token_piece(i) for i in ids] == PIECES.split()


def test_dialogs_are_answered_in_it() -> None:
    """A failure means that the format's name leads to another prompt."""
    llama = Llama.build(chat_format="zephyr")
    [ids], _ = llama.generate([zephyr_tokens(llama.tokenizer, DIALOG)], 8, temperature=0)
    stream = llama.chat_completion_stream(DIALOG, temperature=0, max_gen_len=8)
    assert [i for piece in stream for i in piece.token_ids] == ids
    with pytest.raises(ValueError, match=r"chat_format is 'zefyr': known are .*, zephyr"):
        Llama.build(chat_format="zefyr")
