"""Llama 3's dialogs against Meta's own code, and what it has no say in."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_files import published, small_tiktoken

from llama.chat.ends import answer_ends
from llama.chat.formats import FORMATS, choose_chat
from llama.chat.options import ChatOptions
from llama.tokenizer import Tokenizer
from llama.tokenizers.tiktoken import TiktokenTokenizer

CONTINUE = ChatOptions(continue_final_message=True)
PROMPT = FORMATS["llama3"].prompt
PARTS = [
    "<|eot_id|>",
    "<|start_header_id|>",
    "user",
    "\n",
    "\n\n",
    " ",
    "a",
    "é",
    ".",
    "\ufdd0",
    "1",
]
CONTENTS = st.one_of(st.text(max_size=20), st.lists(st.sampled_from(PARTS)).map("".join))
VALUES = st.one_of(st.text(max_size=5), st.integers(-9, 9), st.booleans(), st.none())
CALLS = st.one_of(
    st.tuples(st.sampled_from(["weather", "f"]), st.dictionaries(st.text(max_size=4), VALUES)),
    st.tuples(
        st.sampled_from(["brave_search", "wolfram_alpha", "photogen"]),
        st.fixed_dictionaries({"query": st.text(max_size=9)}),
    ),
    st.tuples(st.just("code_interpreter"), st.fixed_dictionaries({"code": st.text(max_size=9)})),
)


@st.composite
def dialogs(draw: Any) -> list[dict[str, Any]]:
    """Turns of all roles; an answer may call tools, whose results follow."""
    dialog: list[dict[str, Any]] = []
    if draw(st.booleans()):
        dialog.append({"role": "system", "content": draw(CONTENTS)})
    dialog.append({"role": "user", "content": draw(CONTENTS)})
    for _ in range(draw(st.integers(0, 3))):
        answer: dict[str, Any] = {"role": "assistant", "content": draw(CONTENTS)}
        calls = draw(st.lists(CALLS, max_size=2))
        dialog.append(answer)
        if calls:
            answer["tool_calls"] = [
                {"id": str(i), "type": "function", "function": {"name": n, "arguments": a}}
                for i, (n, a) in enumerate(calls)
            ]
        for _ in calls:
            dialog.append({"role": "ipython", "content": draw(CONTENTS)})
        if not calls or draw(st.booleans()):
            dialog.append({"role": "user", "content": draw(CONTENTS)})
    return dialog


@pytest.fixture(scope="module")
def ours() -> TiktokenTokenizer:
    return TiktokenTokenizer(published().read_bytes(), "tokenizer.model")


@pytest.fixture(scope="module")
def small() -> TiktokenTokenizer:
    return TiktokenTokenizer(small_tiktoken(), "tokenizer.model")


@pytest.fixture(scope="module")
def metas_ids() -> Any:
    """Returns the prompt of a dialog in our form, as Meta's package writes it."""
    tokenizer = published()
    from llama_models.datatypes import RawMessage, ToolCall
    from llama_models.llama3.chat_format import ChatFormat
    from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

    chat = ChatFormat(MetaTokenizer(tokenizer))

    def raw(message: dict[str, Any]) -> RawMessage:
        functions = [call["function"] for call in message.get("tool_calls", ())]
        calls = [
            ToolCall(call_id="", tool_name=f["name"], arguments=f["arguments"]) for f in functions
        ]
        role = {"ipython": "tool"}.get(message["role"], message["role"])
        more = {"tool_calls": calls} if role == "assistant" else {}
        more |= {"call_id": ""} if role == "tool" else {}
        return RawMessage(role=role, content=message["content"], **more)

    return lambda dialog: chat.encode_dialog_prompt([raw(message) for message in dialog]).tokens


def test_dialogs_are_metas(ours, metas_ids) -> None:
    """A failure means that a published model gets a prompt that it wasn't trained on."""

    @settings(max_examples=300, deadline=None)
    @given(dialogs())
    def check(dialog: list[dict[str, Any]]) -> None:
        assert PROMPT(ours, dialog) == metas_ids(dialog)

    check()


def spelled(tokenizer: TiktokenTokenizer, ids: list[int]) -> str:
    """A prompt with its control pieces written out."""
    names = {i: piece for piece, i in tokenizer.control_ids.items()}
    return "".join(names.get(i) or tokenizer.decode([i]) for i in ids)


def test_roles_and_arguments_in_openais_form(small) -> None:
    """A failure means that clients' names of roles, or JSON as a text, reach the model as such."""
    call = {"name": "weather", "arguments": json.dumps({"city": "Bern"})}
    dialog = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": " Hi\n"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": call}],
        },
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
    ]
    assert spelled(small, PROMPT(small, dialog)) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n Hi\n<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        '{"type": "function", "name": "weather", "parameters": {"city": "Bern"}}<|eot_id|>'
        "<|start_header_id|>ipython<|end_header_id|>\n\nsunny<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    call["arguments"] = '{"city": "Be'  # of an answer that was cut off
    assert r'"parameters": "{\"city\": \"Be"}<|eot_id|>' in spelled(small, PROMPT(small, dialog))


def test_an_answer_is_continued_where_it_ends(small) -> None:
    """A failure means that the model sees its own message as ended, or changed."""
    question = [{"role": "user", "content": "the cow"}]
    begun = [*question, {"role": "assistant", "content": " and "}]
    text = spelled(small, PROMPT(small, begun, CONTINUE))
    assert text.endswith("<|end_header_id|>\n\n and ")
    empty = [*question, {"role": "assistant", "content": ""}]
    assert PROMPT(small, empty, CONTINUE) == PROMPT(small, question)


@settings(max_examples=100, deadline=None)
@given(dialogs())
def test_contents_yield_no_control_ids(dialog) -> None:
    """A failure means that what a message says can end a turn or begin another's."""
    tokenizer = TiktokenTokenizer(small_tiktoken(), "tokenizer.model")
    controls = set(tokenizer.control_ids.values())
    ids = [i for i in PROMPT(tokenizer, dialog) if i in controls]
    calls = [message.get("tool_calls") or [None] for message in dialog]
    tags = sum(bool(c[0]) and c[0]["function"]["name"] == "code_interpreter" for c in calls)
    assert len(ids) == 1 + 3 * len(dialog) + 2 + tags


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (["user", "assistant"], "the dialog's last, is by 'assistant'"),
        (["user", "user"], "message 1 of the dialog is by 'user' where 'assistant' is expected"),
        (["system"], "the dialog's last, is by 'system'"),
        (["user", "robot"], "message 1 of the dialog has the role 'robot'"),
        (["tool", "assistant"], "the dialog's last, is by 'assistant'"),
    ],
)
def test_malformed_dialogs_are_refused(small, roles: list[str], message: str) -> None:
    """A failure means that a mistake in a dialog is answered by the model."""
    with pytest.raises(ValueError, match=message):
        PROMPT(small, [{"role": role, "content": "a"} for role in roles])


def test_the_format_is_chosen_by_the_vocabulary(small, llama2_tokenizer: Tokenizer) -> None:
    """A failure means that Llama 3's models are asked in Llama 2's format, or the other way."""
    assert choose_chat(None, {}, small).name == "llama3"
    assert choose_chat("inst", {}, small).name == "inst"
    assert choose_chat(None, {}, llama2_tokenizer).name == "inst"
    few = TiktokenTokenizer(small_tiktoken(), "t", len(small_tiktoken().splitlines()) + 6)
    assert choose_chat(None, {}, few).name == "inst"


def test_an_answer_ends_with_its_turn(small) -> None:
    """A failure means that an answer goes on into the user's next turn."""
    assert small.control_ids["<|eot_id|>"] in answer_ends(FORMATS["llama3"], small)
