"""The chat formats of fine-tuned models of the Llama family, by name, and the choice of one.

A format is given by its literal pieces; ``_lay_out`` puts a dialog into them. In a docstring's
layout, SYSTEM, USER, INPUT and ANSWER stand for the messages, which are stripped of the white
space around them, and ``<s>`` and ``</s>`` for the tokenizer's begin and end of a sequence.

A system message replaces the format's own system text; an empty one leaves the head of the prompt
out. In formats without a system text it is put before the first user's message, with a blank line
between.

Formats for single questions have earlier turns one after another, each as in training: ``</s>``
ends an answer, so that the model sees where the next one has to end.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

from llama.chat.prompts import (
    SPECIAL_TAGS,
    Dialog,
    check_dialog,
    check_messages,
    inst_tokens,
    refuse_inputs,
    turn_based_tokens,
)
from llama.chat.template import ChatTemplate
from llama.tokenizer import BaseTokenizer
from llama.tokenizers import Files, chat_template


class ChatFormat(NamedTuple):
    """The chat format of a family of models.

    Attributes:
        prompt: returns the prompt for a dialog's next answer; raises TypeError or ValueError for
            a dialog that is not well formed (see ``check_dialog``) or doesn't fit the format.
        stop: the strings, other than the end of the sequence, that end an answer. A control piece
            of the tokenizer among them is compared as an id, not as text.
        tags: texts that no message may contain; one that does is answered with an error.
    """

    prompt: Callable[[BaseTokenizer, Dialog], list[int]]
    stop: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


def _lay_out(
    tokenizer: BaseTokenizer,
    dialog: Dialog,
    *,
    head: str = "",
    system: tuple[str, str] = ("", ""),
    user: str,
    task_input: str = "",
    answer: str,
) -> list[int]:
    """Return the ids of a dialog laid out in a format's pieces.

    Args:
        tokenizer: encodes the text and gives the ``{eos}`` of all pieces.
        dialog: the messages.
        head: the beginning, with ``{system}`` if the format has a place for it.
        system: the default system texts: for dialogs without and with an ``input``.
        user: a user's turn, ``{user}``, up to the beginning of the answer.
        task_input: the text after a ``{user}`` that has an ``{input}``; "" if the format has none.
        answer: the ``{answer}``, up to the beginning of the next turn.
    """
    check_dialog(dialog)
    if not task_input:
        refuse_inputs(dialog)
    eos = tokenizer.token_piece(tokenizer.eos_id) if tokenizer.eos_id >= 0 else ""
    contents = [tokenizer.protect(message["content"]).strip() for message in dialog]
    inputs = [tokenizer.protect(message.get("input", "")).strip() for message in dialog]

    text = contents[0] if dialog[0]["role"] == "system" else system[any(inputs)]
    if "{system}" in head:
        before_user, rendered = "", head.format(system=text, eos=eos) if text else ""
    else:
        before_user, rendered = f"{text}\n\n" if text else "", head

    for i, (message, content) in enumerate(zip(dialog, contents, strict=True)):
        if message["role"] == "user":
            if inputs[i]:
                content += task_input.format(input=inputs[i])
            rendered += user.format(user=before_user + content, eos=eos)
            before_user = ""
        elif message["role"] == "assistant":
            rendered += answer.format(answer=content, eos=eos)
    return [tokenizer.bos_id] * tokenizer.add_bos + tokenizer.encode_rendered(rendered)


def alpaca_tokens(tokenizer: BaseTokenizer, dialog: Dialog) -> list[int]:
    r"""Return a dialog in Alpaca's format.

    <s>SYSTEM\n\n### Instruction:\nUSER\n\n### Response:ANSWER</s>### Instruction:\nUSER…

    With an input: ### Instruction:\nUSER\n\n### Input:\nINPUT\n\n### Response:

    Source: https://github.com/tatsu-lab/stanford_alpaca (train.py)
    """
    return _lay_out(
        tokenizer,
        dialog,
        head="{system}\n\n",
        system=(
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.",
            "Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately completes the request.",
        ),
        user="### Instruction:\n{user}\n\n### Response:",
        task_input="\n\n### Input:\n{input}",
        answer="{answer}{eos}",
    )


def vicuna_tokens(tokenizer: BaseTokenizer, dialog: Dialog) -> list[int]:
    """Return a dialog in Vicuna's format.

    <s>SYSTEM USER: USER ASSISTANT: ANSWER</s>USER: USER ASSISTANT:

    Vicuna from v1.1 on, KoVicuna, and WizardLM from v1.1 on.

    Source: https://github.com/lm-sys/FastChat (vicuna_v1.1 in fastchat/conversation.py),
    https://github.com/melodysdreamj/KoVicuna (README.md) and
    https://github.com/nlpxucan/WizardLM (WizardLM/src/infer_wizardlm13b.py)
    """
    chat = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    return _lay_out(
        tokenizer,
        dialog,
        head="{system} ",
        system=(chat, chat),
        user="USER: {user} ASSISTANT:",
        answer=" {answer}{eos}",
    )


def koala_tokens(tokenizer: BaseTokenizer, dialog: Dialog) -> list[int]:
    """Return a dialog in Koala's format.

    <s>BEGINNING OF CONVERSATION: USER: USER GPT: ANSWER</s>USER: USER GPT:

    The opening is part of the format, not a system text, and stays.

    Source: https://github.com/young-geng/EasyLM (docs/koala.md) and
    https://github.com/lm-sys/FastChat (koala_v1 in fastchat/conversation.py)
    """
    return _lay_out(
        tokenizer,
        dialog,
        head="BEGINNING OF CONVERSATION: ",
        user="USER: {user} GPT:",
        answer=" {answer}{eos}",
    )


def wizardlm_tokens(tokenizer: BaseTokenizer, dialog: Dialog) -> list[int]:
    r"""Return a dialog in WizardLM 7B's format.

    <s>USER\n\n### Response:ANSWER</s>USER\n\n### Response:

    WizardLM 7B v1.0; later versions have Vicuna's format.

    Source: https://github.com/nlpxucan/WizardLM (WizardLM/src/train_freeform.py)
    """
    return _lay_out(tokenizer, dialog, user="{user}\n\n### Response:", answer="{answer}{eos}")


def openassistant_tokens(tokenizer: BaseTokenizer, dialog: Dialog) -> list[int]:
    """Return a dialog in OpenAssistant's format.

    <s><|system|>SYSTEM</s><|prompter|>USER</s><|assistant|>ANSWER</s><|prompter|>USER</s>…

    The models tuned from Llama, which end a turn with ``</s>``.

    Source: https://github.com/LAION-AI/Open-Assistant (model/MESSAGE_AND_TOKEN_FORMAT.md,
    model/model_training/custom_datasets/formatting.py, inference/worker/work.py) and
    https://github.com/lm-sys/FastChat (oasst_llama in fastchat/conversation.py)
    """
    return _lay_out(
        tokenizer,
        dialog,
        head="<|system|>{system}{eos}",
        user="<|prompter|>{user}{eos}<|assistant|>",
        answer="{answer}{eos}",
    )


def koalpaca_tokens(tokenizer: BaseTokenizer, dialog: Dialog) -> list[int]:
    r"""Return a dialog in KoAlpaca's format.

    <s>SYSTEM\n\n### Instruction(명령어):\nUSER\n\n### Response(응답):ANSWER</s>…

    With an input: …USER\n\n### Input(입력):\nINPUT\n\n### Response(응답):

    The model tuned from LLaMA 7B; those tuned from Polyglot-ko have another format.

    Source: https://github.com/Beomi/KoAlpaca (train.py, Inference Test.ipynb)
    """
    return _lay_out(
        tokenizer,
        dialog,
        head="{system}\n\n",
        system=(
            "Below is an instruction that describes a task.\n"
            "아래는 작업을 설명하는 명령어입니다.\n\n"
            "Write a response that appropriately completes the request.\n"
            "명령어에 따른 요청을 적절히 완료하는 응답을 작성하세요.",
            "Below is an instruction that describes a task, "
            "paired with an input that provides further context.\n"
            "아래는 작업을 설명하는 명령어와 "
            "추가적 맥락을 제공하는 입력이 짝을 이루는 예제입니다.\n\n"
            "Write a response that appropriately completes the request.\n"
            "요청을 적절히 완료하는 응답을 작성하세요.",
        ),
        user="### Instruction(명령어):\n{user}\n\n### Response(응답):",
        task_input="\n\n### Input(입력):\n{input}",
        answer="{answer}{eos}",
    )


def kullm_tokens(tokenizer: BaseTokenizer, dialog: Dialog) -> list[int]:
    r"""Return a dialog in KULLM's format.

    <s>SYSTEM\n\n### 명령어:\nUSER\n\n### 응답:\nANSWER</s>### 명령어:\nUSER…

    With an input: ### 명령어:\nUSER\n\n### 입력:\nINPUT\n\n### 응답:\n

    Source: https://github.com/nlpai-lab/KULLM (templates/kullm.json); used with Llama 2 by
    https://huggingface.co/kfkas/Llama-2-ko-7b-Chat
    """
    return _lay_out(
        tokenizer,
        dialog,
        head="{system}\n\n",
        system=(
            "아래는 작업을 설명하는 명령어입니다. 요청을 적절히 완료하는 응답을 작성하세요.",
            "아래는 작업을 설명하는 명령어와 "
            "추가 컨텍스트를 제공하는 입력이 짝을 이루는 예제입니다. "
            "요청을 적절히 완료하는 응답을 작성하세요.",
        ),
        user="### 명령어:\n{user}\n\n### 응답:\n",
        task_input="\n\n### 입력:\n{input}",
        answer="{answer}{eos}",
    )


def korani_tokens(tokenizer: BaseTokenizer, dialog: Dialog) -> list[int]:
    r"""Return a dialog in KORani's format.

    <s>SYSTEM\n\n### Human: USER\n### Assistant: ANSWER\n### Human: USER\n### Assistant:

    KORani v2 and v3. Its own prompts and stop strings show the turns; the system text and the
    blank line after it are those of Vicuna v0, whose training code it used.

    Source: https://github.com/krafton-ai/KORani (inference.py, prompts/QA.txt) and
    https://github.com/lm-sys/FastChat (docs/vicuna_weights_version.md)
    """
    chat = (
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions."
    )
    return _lay_out(
        tokenizer,
        dialog,
        head="{system}\n\n",
        system=(chat, chat),
        user="### Human: {user}\n### Assistant:",
        answer=" {answer}\n",
    )


def chatml_tokens(tokenizer: BaseTokenizer, dialog: Dialog) -> list[int]:
    r"""Return a dialog in the ChatML format.

    <s><|im_start|>system\nSYSTEM<|im_end|>\n<|im_start|>user\nUSER<|im_end|>\n
    <|im_start|>assistant\nANSWER<|im_end|>\n<|im_start|>user\n…

    The marks are ordinary text where the tokenizer has no such control pieces.

    Source: https://github.com/openai/openai-python (chatml.md)
    """
    return _lay_out(
        tokenizer,
        dialog,
        head="<|im_start|>system\n{system}<|im_end|>\n",
        user="<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n",
        answer="{answer}<|im_end|>\n",
    )


FORMATS = {
    "inst": ChatFormat(inst_tokens, tags=SPECIAL_TAGS),
    "turn-based": ChatFormat(turn_based_tokens, tags=SPECIAL_TAGS),
    "alpaca": ChatFormat(alpaca_tokens),
    "vicuna": ChatFormat(vicuna_tokens),
    "koala": ChatFormat(koala_tokens),
    "wizardlm": ChatFormat(wizardlm_tokens),
    "openassistant": ChatFormat(openassistant_tokens, stop=("<|prompter|>", "<|assistant|>")),
    "koalpaca": ChatFormat(koalpaca_tokens),
    "kullm": ChatFormat(kullm_tokens),
    # Its answers weren't trained to end with </s>: its authors' code stops at these strings.
    "korani": ChatFormat(korani_tokens, stop=("\n### Human:", "\n### Assistant")),
    "chatml": ChatFormat(chatml_tokens, stop=("<|im_end|>",)),
}


def choose_chat(name: str | None, files: Files, tokenizer: BaseTokenizer) -> ChatFormat:
    """Return the chat format of a name or, for None, the checkpoint's own.

    That is its chat template or, if it has none, the format of Meta's models with this tokenizer.

    Args:
        name: one of ``FORMATS``.
        files: the files next to the checkpoint's weights.
        tokenizer: the checkpoint's tokenizer.

    Raises:
        ValueError: there is no format of that name.
    """
    if name is None:
        template = chat_template(files)
        if template is not None:
            return template_format(template)
        name = "inst" if tokenizer.step_id is None else "turn-based"
    if name not in FORMATS:
        raise ValueError(f"chat_format is {name!r}: known are {', '.join(FORMATS)}")
    return FORMATS[name]


def template_format(source: str) -> ChatFormat:
    """Return the format that a chat template describes; it is parsed when it is first used."""
    template = functools.cache(lambda: ChatTemplate(source))

    def prompt(tokenizer: BaseTokenizer, dialog: Dialog) -> list[int]:
        check_messages(dialog)
        messages = [
            {key: tokenizer.protect(str(text)) for key, text in message.items()}
            for message in dialog
        ]
        names = {
            f"{role}_token": tokenizer.token_piece(i) if i >= 0 else ""
            for role, i in (
                ("bos", tokenizer.bos_id),
                ("eos", tokenizer.eos_id),
                ("pad", tokenizer.pad_id),
            )
        }
        return tokenizer.encode_rendered(template().render(messages, **names))

    return ChatFormat(prompt)
