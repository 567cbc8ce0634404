"""The chat formats of fine-tuned models of the Llama family, by name, and the choice of one.

A format is given by its literal pieces; ``lay_out`` puts a dialog into them. In a docstring's
layout, SYSTEM, USER, INPUT and ANSWER stand for the messages, which are stripped of the white
space around them, and ``<s>`` and ``</s>`` for the tokenizer's begin and end of a sequence.

A system message replaces the format's own system text; an empty one leaves the head of the prompt
out. In formats without a system text it is put before the first user's message, with a blank line
between. Llama 3's format (``llama.chat.llama3``) has every message as it is.

Formats for single questions have earlier turns one after another, each as in training: ``</s>``
ends an answer, so that the model sees where the next one has to end.
"""

from llama.chat import jinja
from llama.chat.hermes import with_tools
from llama.chat.layout import ChatFormat, lay_out
from llama.chat.llama3 import is_llama3, llama3_tokens
from llama.chat.options import NO_OPTIONS, ChatOptions
from llama.chat.prompts import SPECIAL_TAGS, Dialog, inst_tokens, turn_based_tokens
from llama.chat.rendering import template_format
from llama.tokenizer import BaseTokenizer
from llama.tokenizers import Files, chat_templates


def alpaca_tokens(
    tokenizer: BaseTokenizer, dialog: Dialog, options: ChatOptions = NO_OPTIONS
) -> list[int]:
    r"""Return a dialog in Alpaca's format.

    <s>SYSTEM\n\n### Instruction:\nUSER\n\n### Response:ANSWER</s>### Instruction:\nUSER…

    With an input: ### Instruction:\nUSER\n\n### Input:\nINPUT\n\n### Response:

    Source: https://github.com/tatsu-lab/stanford_alpaca (train.py)
    """
    return lay_out(
        tokenizer,
        dialog,
        options,
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


def vicuna_tokens(
    tokenizer: BaseTokenizer, dialog: Dialog, options: ChatOptions = NO_OPTIONS
) -> list[int]:
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
    return lay_out(
        tokenizer,
        dialog,
        options,
        head="{system} ",
        system=(chat, chat),
        user="USER: {user} ASSISTANT:",
        answer=" {answer}{eos}",
    )


def koala_tokens(
    tokenizer: BaseTokenizer, dialog: Dialog, options: ChatOptions = NO_OPTIONS
) -> list[int]:
    """Return a dialog in Koala's format.

    <s>BEGINNING OF CONVERSATION: USER: USER GPT: ANSWER</s>USER: USER GPT:

    The opening is part of the format, not a system text, and stays.

    Source: https://github.com/young-geng/EasyLM (docs/koala.md) and
    https://github.com/lm-sys/FastChat (koala_v1 in fastchat/conversation.py)
    """
    return lay_out(
        tokenizer,
        dialog,
        options,
        head="BEGINNING OF CONVERSATION: ",
        user="USER: {user} GPT:",
        answer=" {answer}{eos}",
    )


def wizardlm_tokens(
    tokenizer: BaseTokenizer, dialog: Dialog, options: ChatOptions = NO_OPTIONS
) -> list[int]:
    r"""Return a dialog in WizardLM 7B's format.

    <s>USER\n\n### Response:ANSWER</s>USER\n\n### Response:

    WizardLM 7B v1.0; later versions have Vicuna's format.

    Source: https://github.com/nlpxucan/WizardLM (WizardLM/src/train_freeform.py)
    """
    return lay_out(
        tokenizer,
        dialog,
        options,
        user="{user}\n\n### Response:",
        answer="{answer}{eos}",
    )


def openassistant_tokens(
    tokenizer: BaseTokenizer, dialog: Dialog, options: ChatOptions = NO_OPTIONS
) -> list[int]:
    """Return a dialog in OpenAssistant's format.

    <s><|system|>SYSTEM</s><|prompter|>USER</s><|assistant|>ANSWER</s><|prompter|>USER</s>…

    The models tuned from Llama, which end a turn with ``</s>``.

    Source: https://github.com/LAION-AI/Open-Assistant (model/MESSAGE_AND_TOKEN_FORMAT.md,
    model/model_training/custom_datasets/formatting.py, inference/worker/work.py) and
    https://github.com/lm-sys/FastChat (oasst_llama in fastchat/conversation.py)
    """
    return lay_out(
        tokenizer,
        dialog,
        options,
        head="<|system|>{system}{eos}",
        user="<|prompter|>{user}{eos}<|assistant|>",
        answer="{answer}{eos}",
    )


def koalpaca_tokens(
    tokenizer: BaseTokenizer, dialog: Dialog, options: ChatOptions = NO_OPTIONS
) -> list[int]:
    r"""Return a dialog in KoAlpaca's format.

    <s>SYSTEM\n\n### Instruction(명령어):\nUSER\n\n### Response(응답):ANSWER</s>…

    With an input: …USER\n\n### Input(입력):\nINPUT\n\n### Response(응답):

    The model tuned from LLaMA 7B; those tuned from Polyglot-ko have another format.

    Source: https://github.com/Beomi/KoAlpaca (train.py, Inference Test.ipynb)
    """
    return lay_out(
        tokenizer,
        dialog,
        options,
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


def kullm_tokens(
    tokenizer: BaseTokenizer, dialog: Dialog, options: ChatOptions = NO_OPTIONS
) -> list[int]:
    r"""Return a dialog in KULLM's format.

    <s>SYSTEM\n\n### 명령어:\nUSER\n\n### 응답:\nANSWER</s>### 명령어:\nUSER…

    With an input: ### 명령어:\nUSER\n\n### 입력:\nINPUT\n\n### 응답:\n

    Source: https://github.com/nlpai-lab/KULLM (templates/kullm.json); used with Llama 2 by
    https://huggingface.co/kfkas/Llama-2-ko-7b-Chat
    """
    return lay_out(
        tokenizer,
        dialog,
        options,
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


def korani_tokens(
    tokenizer: BaseTokenizer, dialog: Dialog, options: ChatOptions = NO_OPTIONS
) -> list[int]:
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
    return lay_out(
        tokenizer,
        dialog,
        options,
        head="{system}\n\n",
        system=(chat, chat),
        user="### Human: {user}\n### Assistant:",
        answer=" {answer}\n",
    )


def chatml_tokens(
    tokenizer: BaseTokenizer, dialog: Dialog, options: ChatOptions = NO_OPTIONS
) -> list[int]:
    r"""Return a dialog in the ChatML format.

    <s><|im_start|>system\nSYSTEM<|im_end|>\n<|im_start|>user\nUSER<|im_end|>\n
    <|im_start|>assistant\nANSWER<|im_end|>\n<|im_start|>user\n…

    The marks are ordinary text where the tokenizer has no such control pieces.

    Source: https://github.com/openai/openai-python (chatml.md)
    """
    return lay_out(
        tokenizer,
        dialog,
        options,
        head="<|im_start|>system\n{system}<|im_end|>\n",
        user="<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n",
        answer="{answer}<|im_end|>\n",
    )


_FORMATS = {
    "inst": ChatFormat(inst_tokens, tags=SPECIAL_TAGS, template=jinja.INST),
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
    "llama3": ChatFormat(llama3_tokens, stop=("<|eot_id|>",), template=jinja.LLAMA3),
}
FORMATS = {name: format._replace(name=name) for name, format in _FORMATS.items()}


def choose_chat(
    name: str | None, files: Files, tokenizer: BaseTokenizer, tool_format: str | None = None
) -> ChatFormat:
    """Return the chat format of a name or, for None, the checkpoint's own.

    That is its chat template or, if it has none, the format of Meta's models with this tokenizer.

    Args:
        name: one of ``FORMATS``.
        files: the files next to the checkpoint's weights.
        tokenizer: the checkpoint's tokenizer.
        tool_format: "hermes" describes tools in the system message (``llama.chat.hermes``); None
            leaves them to the template.

    Raises:
        ValueError: there is no format of that name.
    """
    if tool_format not in (None, "hermes"):
        raise ValueError(f"tool_format is {tool_format!r}: expected None or 'hermes'")
    templates = chat_templates(files)
    known = {each.template: each for each in FORMATS.values() if each.template is not None}
    own = known.get(templates.get("default", "")) if len(templates) == 1 else None
    if name is None and templates:
        chat = own or template_format(templates)  # a converted checkpoint's is one of these
    else:
        if name is None and is_llama3(tokenizer):
            name = "llama3"
        name = name or ("inst" if tokenizer.step_id is None else "turn-based")
        if name not in FORMATS:
            raise ValueError(f"chat_format is {name!r}: known are {', '.join(FORMATS)}")
        chat = FORMATS[name]
    return chat if tool_format is None else with_tools(chat)
