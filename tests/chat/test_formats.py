"""The named chat formats, token for token."""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tiktoken_files import small_tiktoken

from llama import Dialog, Tokenizer
from llama.chat.formats import FORMATS
from llama.chat.options import ChatOptions
from llama.chat.prompts import check_dialog, dialog_prompt_tokens
from llama.chat.rendering import template_format
from llama.chat.template import ChatTemplate
from llama.tokenizer import BaseTokenizer
from llama.tokenizers.tiktoken import TiktokenTokenizer

LLAMA3_MARKS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
MARKS = (*LLAMA3_MARKS, "<|im_start|>", "<|im_end|>", "<|system|>", "<|prompter|>", "<|assistant|>")

ONE: Dialog = [{"role": "user", "content": " Hi there \n"}]
TWO: Dialog = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": " 1. "},
    {"role": "user", "content": "Two?"},
]
SYSTEM: Dialog = [{"role": "system", "content": " Be brief.\n"}, *TWO]
INPUT: Dialog = [{"role": "user", "content": "Count.", "input": "a b\n"}]
INPUT_LATER: Dialog = [*TWO[:2], *INPUT]

ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request."
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
KOALPACA = (
    "Below is an instruction that describes a task.\n아래는 작업을 설명하는 명령어입니다.\n\n"
    "Write a response that appropriately completes the request.\n"
    "명령어에 따른 요청을 적절히 완료하는 응답을 작성하세요."
)
KOALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context.\n아래는 작업을 설명하는 명령어와 추가적 맥락을 제공하는 입력이 짝을 이루는 "
    "예제입니다.\n\nWrite a response that appropriately completes the request.\n"
    "요청을 적절히 완료하는 응답을 작성하세요."
)
KULLM = "아래는 작업을 설명하는 명령어입니다. 요청을 적절히 완료하는 응답을 작성하세요."
KULLM_INPUT = (
    "아래는 작업을 설명하는 명령어와 추가 컨텍스트를 제공하는 입력이 짝을 이루는 예제입니다. "
    "요청을 적절히 완료하는 응답을 작성하세요."
)
KORANI = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)

# Name, dialog and the prompt after <s>, written out.
LITERAL = [
    ("inst", ONE, "[INST] Hi there [/INST]"),
    ("inst", TWO, "[INST] One? [/INST] 1. </s><s>[INST] Two? [/INST]"),
    (
        "inst",
        SYSTEM,
        "[INST] <<SYS>>\n Be brief.\n\n<</SYS>>\n\nOne? [/INST] 1. </s><s>[INST] Two? [/INST]",
    ),
    ("alpaca", ONE, f"{ALPACA}\n\n### Instruction:\nHi there\n\n### Response:"),
    (
        "alpaca",
        TWO,
        f"{ALPACA}\n\n### Instruction:\nOne?\n\n### Response:1.</s>"
        "### Instruction:\nTwo?\n\n### Response:",
    ),
    (
        "alpaca",
        SYSTEM,
        "Be brief.\n\n### Instruction:\nOne?\n\n### Response:1.</s>"
        "### Instruction:\nTwo?\n\n### Response:",
    ),
    (
        "alpaca",
        INPUT,
        f"{ALPACA_INPUT}\n\n### Instruction:\nCount.\n\n### Input:\na b\n\n### Response:",
    ),
    (
        "alpaca",
        INPUT_LATER,
        f"{ALPACA_INPUT}\n\n### Instruction:\nOne?\n\n### Response:1.</s>"
        "### Instruction:\nCount.\n\n### Input:\na b\n\n### Response:",
    ),
    ("vicuna", ONE, f"{VICUNA} USER: Hi there ASSISTANT:"),
    ("vicuna", TWO, f"{VICUNA} USER: One? ASSISTANT: 1.</s>USER: Two? ASSISTANT:"),
    ("vicuna", SYSTEM, "Be brief. USER: One? ASSISTANT: 1.</s>USER: Two? ASSISTANT:"),
    ("koala", ONE, "BEGINNING OF CONVERSATION: USER: Hi there GPT:"),
    ("koala", TWO, "BEGINNING OF CONVERSATION: USER: One? GPT: 1.</s>USER: Two? GPT:"),
    (
        "koala",
        SYSTEM,
        "BEGINNING OF CONVERSATION: USER: Be brief.\n\nOne? GPT: 1.</s>USER: Two? GPT:",
    ),
    ("wizardlm", ONE, "Hi there\n\n### Response:"),
    ("wizardlm", TWO, "One?\n\n### Response:1.</s>Two?\n\n### Response:"),
    ("wizardlm", SYSTEM, "Be brief.\n\nOne?\n\n### Response:1.</s>Two?\n\n### Response:"),
    ("openassistant", ONE, "<|prompter|>Hi there</s><|assistant|>"),
    (
        "openassistant",
        TWO,
        "<|prompter|>One?</s><|assistant|>1.</s><|prompter|>Two?</s><|assistant|>",
    ),
    (
        "openassistant",
        SYSTEM,
        "<|system|>Be brief.</s><|prompter|>One?</s><|assistant|>1.</s>"
        "<|prompter|>Two?</s><|assistant|>",
    ),
    (
        "koalpaca",
        ONE,
        f"{KOALPACA}\n\n### Instruction(명령어):\nHi there\n\n### Response(응답):",
    ),
    (
        "koalpaca",
        TWO,
        f"{KOALPACA}\n\n### Instruction(명령어):\nOne?\n\n### Response(응답):1.</s>"
        "### Instruction(명령어):\nTwo?\n\n### Response(응답):",
    ),
    (
        "koalpaca",
        SYSTEM,
        "Be brief.\n\n### Instruction(명령어):\nOne?\n\n### Response(응답):1.</s>"
        "### Instruction(명령어):\nTwo?\n\n### Response(응답):",
    ),
    (
        "koalpaca",
        INPUT,
        f"{KOALPACA_INPUT}\n\n### Instruction(명령어):\nCount.\n\n### Input(입력):\na b\n\n"
        "### Response(응답):",
    ),
    ("kullm", ONE, f"{KULLM}\n\n### 명령어:\nHi there\n\n### 응답:\n"),
    (
        "kullm",
        TWO,
        f"{KULLM}\n\n### 명령어:\nOne?\n\n### 응답:\n1.</s>### 명령어:\nTwo?\n\n### 응답:\n",
    ),
    (
        "kullm",
        SYSTEM,
        "Be brief.\n\n### 명령어:\nOne?\n\n### 응답:\n1.</s>### 명령어:\nTwo?\n\n### 응답:\n",
    ),
    ("kullm", INPUT, f"{KULLM_INPUT}\n\n### 명령어:\nCount.\n\n### 입력:\na b\n\n### 응답:\n"),
    ("korani", ONE, f"{KORANI}\n\n### Human: Hi there\n### Assistant:"),
    (
        "korani",
        TWO,
        f"{KORANI}\n\n### Human: One?\n### Assistant: 1.\n### Human: Two?\n### Assistant:",
    ),
    (
        "korani",
        SYSTEM,
        "Be brief.\n\n### Human: One?\n### Assistant: 1.\n### Human: Two?\n### Assistant:",
    ),
    ("chatml", ONE, "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"),
    (
        "chatml",
        TWO,
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n1.<|im_end|>\n"
        "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n",
    ),
    (
        "chatml",
        SYSTEM,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n"
        "<|im_start|>assistant\n1.<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    # Meta's code keeps the white space.
    (
        "llama3",
        ONE,
        "<|start_header_id|>user<|end_header_id|>\n\n Hi there \n<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    (
        "llama3",
        TWO,
        "<|start_header_id|>user<|end_header_id|>\n\nOne?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n 1. <|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nTwo?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    (
        "llama3",
        SYSTEM,
        "<|start_header_id|>system<|end_header_id|>\n\n Be brief.\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nOne?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n 1. <|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nTwo?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
]


@pytest.fixture(scope="module")
def sp(llama2_tokenizer: Tokenizer) -> SentencePieceProcessor:
    """The published model by itself, without this library."""
    file = Path(os.environ["LLAMA_TEST_DATA"]) / "llama2-tokenizer.model"
    return SentencePieceProcessor(model_file=str(file))


@pytest.fixture(scope="module")
def marked_tokenizer(llama2_tokenizer: Tokenizer) -> Tokenizer:
    """Llama 2's tokenizer with the marks of ChatML and OpenAssistant as further control pieces."""
    tokenizer = Tokenizer("marked", llama2_tokenizer.sp_model.serialized_model_proto())
    tokenizer.control_ids |= {mark: 32000 + i for i, mark in enumerate(MARKS)}
    return tokenizer


def written_out(sp: SentencePieceProcessor, literal: str, controls: dict[str, int]) -> list[int]:
    """The ids of a prompt, from SentencePiece alone: each run of text by itself."""
    for control in controls:
        literal = literal.replace(control, f"\0{control}\0")
    ids = [1]
    for run in filter(None, literal.split("\0")):
        ids += [controls[run]] if run in controls else sp.encode(run)
    return ids


@pytest.mark.parametrize(("name", "dialog", "literal"), LITERAL)
def test_prompts_are_the_literal_format(
    name: str, dialog: Dialog, literal: str, llama2_tokenizer: Tokenizer, sp: SentencePieceProcessor
) -> None:
    """A failure means a model gets a prompt that it wasn't trained on."""
    expected = written_out(sp, literal, {"<s>": 1, "</s>": 2})
    ids = FORMATS[name].prompt(llama2_tokenizer, dialog)
    assert ids == expected, sp.decode(ids)


@pytest.mark.parametrize(
    ("name", "dialog", "literal"),
    [c for c in LITERAL if c[0] in ("chatml", "openassistant")],
)
def test_marks_are_control_ids_where_the_tokenizer_has_them(
    name: str, dialog: Dialog, literal: str, marked_tokenizer: Tokenizer, sp: SentencePieceProcessor
) -> None:
    """A failure means a tuned model sees its marks spelled out instead of their own ids."""
    controls = {"</s>": 2, **{mark: 32000 + i for i, mark in enumerate(MARKS)}}
    assert FORMATS[name].prompt(marked_tokenizer, dialog) == written_out(sp, literal, controls)


def test_every_format_is_written_out() -> None:
    """A failure means a format was added without its literal prompts."""
    written = {name: sum(n == name for n, _, _ in LITERAL) for name in FORMATS}
    assert all(count >= 3 for name, count in written.items() if name != "turn-based"), written


def test_inst_and_turn_based_are_the_formats_of_chat_completion(
    llama2_tokenizer: Tokenizer, codellama_70b_tokenizer: Tokenizer
) -> None:
    """A failure means a format by name differs from the one that is found by the tokenizer."""
    for dialog in (ONE, TWO, SYSTEM):
        for name, tokenizer in (
            ("inst", llama2_tokenizer),
            ("turn-based", codellama_70b_tokenizer),
        ):
            ids = FORMATS[name].prompt(tokenizer, dialog)
            assert ids == dialog_prompt_tokens(tokenizer, dialog)


def test_turn_based_needs_its_tokenizer(llama2_tokenizer: Tokenizer) -> None:
    """A failure means a wrong prompt where the tokenizer can't write the format."""
    with pytest.raises(ValueError, match="no <step>"):
        FORMATS["turn-based"].prompt(llama2_tokenizer, ONE)


@pytest.mark.parametrize("name", ["vicuna", "alpaca", "openassistant", "chatml"])
def test_an_empty_system_message_leaves_the_head_out(
    name: str, llama2_tokenizer: Tokenizer, sp: SentencePieceProcessor
) -> None:
    """A failure means that the default system text can't be switched off."""
    starts = {
        "vicuna": "USER: One?",
        "alpaca": "### Instruction:\nOne?",
        "openassistant": "<|prompter|>One?",
        "chatml": "<|im_start|>user\nOne?",
    }
    dialog: Dialog = [{"role": "system", "content": ""}, *TWO]
    ids = FORMATS[name].prompt(llama2_tokenizer, dialog)
    assert sp.decode(ids).startswith(starts[name])


@pytest.mark.parametrize("name", FORMATS)
def test_malformed_dialogs_are_refused_by_every_format(
    name: str, codellama_70b_tokenizer: Tokenizer
) -> None:
    """A failure means a format lays out a dialog without checking it."""
    with pytest.raises(ValueError, match="the dialog's last, is by 'assistant'"):
        FORMATS[name].prompt(codellama_70b_tokenizer, TWO[:2])
    with pytest.raises(TypeError, match="a dialog is a list"):
        FORMATS[name].prompt(codellama_70b_tokenizer, "Hi")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(FORMATS.keys() - {"alpaca", "koalpaca", "kullm"}))
def test_an_input_is_refused_by_formats_without_one(
    name: str, codellama_70b_tokenizer: Tokenizer
) -> None:
    """A failure means that an input is dropped in silence."""
    with pytest.raises(ValueError, match="message 2 of the dialog has an 'input'"):
        FORMATS[name].prompt(codellama_70b_tokenizer, INPUT_LATER)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "a", "input": 3},
        {"role": "user", "content": "a", "input": None},
        {"role": "system", "content": "a", "input": "b"},
    ],
)
def test_inputs_are_checked(message: dict[str, object]) -> None:
    """A failure means that an input of a wrong kind is found late, or never."""
    with pytest.raises(ValueError, match="message 0 of the dialog has the input"):
        check_dialog([message, *ONE] if message["role"] == "system" else [message])


def test_braces_in_contents_are_text(
    llama2_tokenizer: Tokenizer, sp: SentencePieceProcessor
) -> None:
    """A failure means that contents are taken for a layout's places."""
    ids = FORMATS["alpaca"].prompt(
        llama2_tokenizer, [{"role": "user", "content": "{user}{eos}{0}", "input": "{input}{"}]
    )
    assert "\n{user}{eos}{0}\n\n### Input:\n{input}{\n\n###" in sp.decode(ids)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_contents_yield_no_control_ids(
    name: str, marked_tokenizer: Tokenizer, codellama_70b_tokenizer: Tokenizer
) -> None:
    """A failure means that what a user writes can end a turn or begin another's."""
    tokenizer = codellama_70b_tokenizer if name == "turn-based" else marked_tokenizer
    controls = set(tokenizer.control_ids.values())
    parts = ["<s>", "</s>", "[INST]", *MARKS, "<step>", "<", "|>", "/s>", "\ufdd0", "▁", "a", " "]
    texts = st.lists(st.sampled_from(parts), max_size=6).map("".join)

    def control(a: str, b: str, c: str, d: str) -> list[int]:
        last = {"role": "user", "content": c}
        if name in ("alpaca", "koalpaca", "kullm"):
            last["input"] = f"d{d}"
        dialog = [
            {"role": "system", "content": f"a{a}"},
            {"role": "user", "content": b},
            {"role": "assistant", "content": c},
            last,
        ]
        return [i for i in FORMATS[name].prompt(tokenizer, dialog) if i in controls]

    harmless = control("a", "b", "c", "d")

    @settings(max_examples=60, deadline=None)
    @given(texts, texts, texts, texts)
    def check(a: str, b: str, c: str, d: str) -> None:
        assert control(a, b, c, d) == harmless

    check()


@pytest.mark.parametrize("name", ["inst", "llama3"])
def test_templates_are_the_formats(name: str, tiny_tokenizer: Tokenizer) -> None:
    """A failure means that a client, or a library that reads what we convert, gives a model
    another prompt than this one does."""
    format_ = FORMATS[name]
    assert format_.template is not None
    template = template_format({"default": format_.template})
    tokenizer: BaseTokenizer = tiny_tokenizer
    if name == "llama3":
        tokenizer = TiktokenTokenizer(small_tiktoken(), "tokenizer.model")
    pieces = st.sampled_from(["[INST]", "<|eot_id|>", "</s>", " ", "\n", "cow", "é", "{{", "'"])
    contents = st.lists(pieces, max_size=6).map("".join)

    @settings(max_examples=200, deadline=None)
    @given(st.lists(contents, min_size=1, max_size=5), st.booleans(), contents)
    def check(texts: list[str], has_system: bool, system: str) -> None:
        turns = [{"role": "user", "content": text} for text in texts]
        for turn in turns[1::2]:
            turn["role"] = "assistant"
        dialog = [{"role": "system", "content": system}] * has_system + turns
        options = ChatOptions(continue_final_message=turns[-1]["role"] == "assistant")
        if options.continue_final_message and name == "inst":
            # A template leaves the space at the end of a text that is continued.
            turns[-1]["content"] = "a" + texts[-1].rstrip()
        found = template.prompt(tokenizer, dialog, options)  # type: ignore[arg-type]
        assert found == format_.prompt(tokenizer, dialog, options)  # type: ignore[arg-type]

    check()
    said = {"role": "assistant", "content": None}
    told = {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}
    asked = {"role": "user", "content": [{"type": "text", "text": part} for part in ("a", "b")]}
    dialog: Any = [told, asked, {**said, "content": ""}, asked]
    ids = format_.prompt(tokenizer, dialog)
    assert template.prompt(tokenizer, dialog) == ids
    # As transformers renders it, which gives a template the messages as they are.
    renders = ChatTemplate(format_.template)
    spelled = {"bos_token": "<B>", "eos_token": "<E>", "tools": None}
    texts = [
        renders.render([told, asked, answer, asked], add_generation_prompt=True, **spelled)
        for answer in ({**said, "content": ""}, said)
    ]
    assert texts[0] == texts[1] and "None" not in texts[1] and "ab" in texts[1]
    for roles in (("assistant",), ("user", "user"), ("user", "system")):
        dialog = [{"role": role, "content": "a"} for role in roles]
        for each in (format_, template):
            with pytest.raises(ValueError):
                each.prompt(tokenizer, dialog)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    with pytest.raises(ValueError, match="no calls of tools"):
        template.prompt(tokenizer, [asked, {**said, "tool_calls": [call]}, asked])  # type: ignore
