"""Templates: marks, tools, documents, continued messages."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_template import expected, write

from llama import Llama
from llama.chat.formats import choose_chat
from llama.chat.marks import Marks, clean
from llama.chat.notations import HERMES, LLAMA, MISTRAL
from llama.chat.options import NO_OPTIONS, ChatOptions
from llama.chat.rendering import template_format
from llama.tokenizer import BaseTokenizer, Tokenizer
from llama.tokenizers import chat_templates, load_tokenizer, with_template

CONTINUE = ChatOptions(continue_final_message=True)

# A template of each kind, of pieces that the tokenizers of ``write`` have.
START, END = "<|im_start|>", "<|im_end|>"
PLAIN = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content"
    " + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Earlier answers are cut at a mark of reasoning, as DeepSeek's and Qwen's templates do.
REASONING = """{%- set mark = '<|eot_id|>' %}
{%- for message in messages %}
{%- set content = message.content %}
{%- if message.role == 'assistant' and mark in content %}
    {%- set content = content.split(mark)[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>' ~ message.role }}
{% if loop.last or message.content.endswith('<|eot_id|>') %}{{ mark }}last{% endif %}
{{- content | trim }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
MACROS = """{%- macro turn(role, text, end='<|im_end|>') -%}
    {{- '<|im_start|>' + role + '\n' + (text or '') + end -}}
{%- endmacro %}
{%- set ns = namespace(pieces=['<|start_header_id|>', '<|end_header_id|>'], last=none) %}
{%- set names = {'user': '<|start_header_id|>user', 'assistant': 'model<|end_header_id|>'} %}
{%- for message in messages %}
{{- names[message.role] | default('<|im_end|>', true) }}
{{- turn(message.role, message['content'].replace('cat', 'dog')) }}
{%- set ns.last = message.content %}{{ ns.pieces | join('|') }}
{%- if message.content in ['<|im_end|>', eos_token] %}a lone mark{% endif %}
{%- if message.content is eq(eos_token) %}the end{% endif %}
{%- endfor %}
{{- messages | map(attribute='content') | join('<|im_end|>') }}{{ messages | tojson }}
{{- messages | selectattr('content', 'equalto', eos_token) | list | length }}
{{- bos_token ~ ns.last }}{{ undefined_thing | default('<|im_start|>') }}
{{- turn('assistant', '') if add_generation_prompt }}"""
ROLES = (
    "{% for message in messages %}<|{{ message.role }}|>{{ '<|' + message['role'] + '|>' }}"
    "{{ message.content ~ '<|' ~ message.role ~ '|>' ~ (1 + 1) }}{% endfor %}"
)
KINDS = {"plain": PLAIN, "reasoning": REASONING, "macros": MACROS, "roles": ROLES}
DIALOG = [
    {"role": "user", "content": "A cat?"},
    {"role": "assistant", "content": "  Yes. "},
    {"role": "user", "content": "And a dog, é 😀"},
]


class Rendered:
    """transformers' tokenizer and ours, with a template."""

    def __init__(self, directory: Path, template: Any, kind: str = "byte-level"):
        self.library, self.files = write(directory, kind, template)
        # Marks of roles, as further control pieces of both.
        data = json.loads(self.files["tokenizer.json"].read_text())
        first = max(spec["id"] for spec in data["added_tokens"]) + 1
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, text in enumerate(["<|user|>", "<|assistant|>", "<tool_call>", "</tool_call>"]):
            data["added_tokens"].append(
                {"id": first + i, "content": text, "special": True, **flags}
            )
        self.files["tokenizer.json"].write_text(json.dumps(data))
        self.library = type(self.library).from_pretrained(directory)
        self.tokenizer = load_tokenizer(self.files)
        self.chat = choose_chat(None, self.files, self.tokenizer)

    def prompt(self, dialog: Any, options: ChatOptions = NO_OPTIONS) -> list[int]:
        return self.chat.prompt(self.tokenizer, dialog, options)

    def controls(self, dialog: Any, options: ChatOptions = NO_OPTIONS) -> list[int]:
        ids = self.prompt(dialog, options)
        return [i for i in ids if i in self.tokenizer.control_ids.values()]

    def expected(self, dialog: Any, **options: Any) -> list[int]:
        text = self.library.apply_chat_template(dialog, tokenize=False, **options)
        return self.library.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", KINDS)
def test_structure_has_the_ids_that_it_has_in_transformers(name: str, tmp_path: Path) -> None:
    """A failure means that a template's own marks reach the model as text."""
    found = Rendered(tmp_path, KINDS[name])
    for dialog in (DIALOG, DIALOG[:1], [*DIALOG, *DIALOG[1:]]):
        ids = found.prompt(dialog)
        assert ids == expected(found.library, dialog), found.library.decode(ids)
    assert found.controls(DIALOG), "there is nothing to mark"


@pytest.mark.parametrize("name", KINDS)
def test_contents_of_any_kind_become_text(name: str, tmp_path: Path) -> None:
    """A failure means that a message, or a tool's result, can end a turn or begin another's."""
    found = Rendered(tmp_path, KINDS[name])
    names = sorted(found.tokenizer.control_ids)
    parts = st.sampled_from([*names, "<|", "user", "|>", "<|im", "x", "\ufdd0", "\ufdd1", "\ufde1"])
    texts = st.lists(parts, max_size=6).map(lambda texts: "x" + "".join(texts) + "x")
    harmless = found.controls([{**message, "content": "x"} for message in DIALOG])

    @settings(max_examples=60, deadline=None, database=None)
    @given(st.lists(texts, min_size=3, max_size=3))
    def check(contents: list[str]) -> None:
        dialog = [{**m, "content": text} for m, text in zip(DIALOG, contents, strict=True)]
        assert found.controls(dialog) == harmless

    check()


def test_templates_find_marks_in_contents(tmp_path: Path) -> None:
    """A failure means that reasoning stays in earlier answers, which models never saw there."""
    found = Rendered(tmp_path, REASONING)
    thought = [DIALOG[0], {"role": "assistant", "content": "Hm.<|eot_id|>\nYes."}, DIALOG[2]]
    assert found.prompt(thought) == expected(found.library, thought)
    turn = found.tokenizer.control_ids["<|eot_id|>"]
    ends = [{"role": "user", "content": "x<|eot_id|>"}]
    theirs, ours = expected(found.library, ends), found.prompt(ends)
    assert found.library.decode(theirs) == found.library.decode(ours), "the text is another"
    assert (theirs.count(turn), ours.count(turn)) == (2, 1)


def test_marks_compare_as_their_spelling(tmp_path: Path) -> None:
    found = Rendered(tmp_path, MACROS)
    for text in (END, "<|end_of_text|>"):
        dialog = [{"role": "user", "content": text}]
        ours = found.library.decode(found.prompt(dialog))
        assert ours == found.library.decode(expected(found.library, dialog))


def test_marks_are_taken_out_of_contents(llama2_tokenizer: Tokenizer) -> None:
    marks = Marks(llama2_tokenizer)
    mark = marks.mark("</s>")
    assert marks.encode(f"a{mark}") == [*llama2_tokenizer.encode("a", False, False), 2]
    assert marks.unmark(f"a{mark}b") == "a</s>b" and clean(mark) == ""
    value = {f"a{mark}": [f"{mark}b", 3, None, (mark,)]}
    assert clean(value) == {"a": ["b", 3, None, [""]]}
    for wrong in (mark[:-1], mark[1:], mark.replace(mark[1], "2"), "\ufdd0\ufdd1\ufde1"):
        ids = marks.encode(f"a{wrong}b")
        assert set(ids).isdisjoint(set(llama2_tokenizer.control_ids.values()) - {0}), wrong


@pytest.mark.parametrize("name", ["plain", "reasoning"])
@pytest.mark.parametrize("text", ["So far", "So far ", " So", "", "x<|im_end|>", "So\n"])
def test_continued_messages_are_those_of_transformers(name: str, text: str, tmp_path: Path) -> None:
    """A failure means that an answer goes on after the end of its turn, or before its text."""
    found = Rendered(tmp_path, KINDS[name])
    begun = [*DIALOG, {"role": "assistant", "content": text}]
    ids = found.prompt(begun, CONTINUE)
    assert ids[-1] != found.tokenizer.control_ids[END]
    theirs = found.expected(begun, continue_final_message=True) if text.strip() else None
    shown = found.library.decode(ids)
    assert theirs is None or found.library.decode(theirs) == shown
    kept = text.strip() if name == "reasoning" else text
    assert shown.endswith(kept) and shown.count(START) == 4


def test_a_message_that_can_not_be_continued_is_told(tmp_path: Path) -> None:
    found = Rendered(tmp_path, "{{ messages[0].content }}")
    begun = [*DIALOG, {"role": "assistant", "content": "a"}]
    with pytest.raises(ValueError, match="doesn't write the dialog's last message as it is"):
        found.prompt(begun, CONTINUE)
    with pytest.raises(ValueError, match="is by 'user': continue_final_message"):
        found.prompt(DIALOG, CONTINUE)
    parts = [*DIALOG, {"role": "assistant", "content": [{"type": "text", "text": "So far"}]}]
    for template in (PLAIN, PARTS):
        continued = Rendered(tmp_path, template)
        assert continued.library.decode(continued.prompt(parts, CONTINUE)).endswith("So far")


PARTS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}:"
    "{% for part in message['content'] %}{{ part.text }}/{% endfor %}{% endfor %}"
)


def test_templates_that_read_parts_get_them(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    dialog = [{"role": "user", "content": parts}]
    found = Rendered(tmp_path, PARTS)
    assert found.prompt(dialog) == expected(found.library, dialog)
    assert found.library.decode(found.prompt(dialog)).endswith("user:a /b/")
    plain = Rendered(tmp_path, PLAIN)
    assert plain.prompt(dialog) == plain.prompt([{"role": "user", "content": "a b"}])


# The forms in which templates of three families write tools and calls.
HERMES_TOOLS = """{%- if tools %}<|im_start|>system
{%- for tool in tools %}{{ '\n' ~ (tool | tojson) }}{% endfor %}<tool_call></tool_call>
{%- endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{%- if message.content %}{{ message.content }}{% endif %}
{%- for call in message.tool_calls %}
{{ '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}}
</tool_call>{% endfor %}
{%- if message.role == 'tool' %}{{ message.name }}{% endif %}<|im_end|>
{% endfor %}"""
LLAMA_TOOLS = """{%- for message in messages %}
{%- if 'tool_calls' in message %}
    {%- if message.tool_calls | length != 1 %}{{ raise_exception('one call') }}{% endif %}
    {%- set call = message.tool_calls[0].function %}
    {{- '{"name": "' + call.name + '", "parameters": ' ~ (call.arguments | tojson) ~ '}' }}
{%- elif message.role in ['tool', 'ipython'] %}
    {{- message.content | tojson if message.content is mapping else message.content }}
{%- else %}{{ message.content }}{% endif %}<|eot_id|>
{%- endfor %}{{ tools | tojson }} "parameters" """
MISTRAL_TOOLS = """{%- for message in messages %}
{%- if message.tool_calls is defined and message.tool_calls is not none %}
    {{- '[TOOL_CALLS] [' }}
    {%- for call in message.tool_calls %}
        {%- if call.id | length != 9 %}{{ raise_exception('ids of length 9!') }}{% endif %}
        {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}
    {%- endfor %}{{ ']' }}
{%- elif message.role == 'tool' %}{{ message.content ~ message.tool_call_id }}
{%- else %}{{ message.content }}{% endif %}{% endfor %}{{ tools }}"""
JOINED_TOOLS = (
    "{% for message in messages %}{% if message['tool_calls'] %}{{ '<tool_call>' "
    "+ message['tool_calls'][0]['function']['arguments'] }}{% endif %}{% endfor %}{{ tools }}"
)
CALL = {"id": "abcdef123", "type": "function", "function": {"name": "f", "arguments": {"a": "ö"}}}
OPENAI = {**CALL, "function": {"name": "f", "arguments": '{"a": "ö"}'}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def talk(call: Any) -> Any:
    return [
        {"role": "user", "content": "Use f."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": call["id"], "name": "f"},
    ]


@pytest.mark.parametrize(
    ("template", "notation"),
    [(HERMES_TOOLS, HERMES), (LLAMA_TOOLS, LLAMA), (MISTRAL_TOOLS, MISTRAL)],
)
def test_tools_are_written_as_in_transformers(template: str, notation: Any, tmp_path: Path) -> None:
    """A failure means that a model reads tools or calls otherwise than it was trained to."""
    found = Rendered(tmp_path, template)
    assert found.chat.notation is notation
    theirs = found.expected(talk(CALL), tools=[TOOL], add_generation_prompt=True)
    options = ChatOptions(tools=[TOOL])
    for call in (CALL, OPENAI):
        assert found.prompt(talk(call), options) == theirs
    unnamed = talk(OPENAI)
    del unnamed[2]["name"], unnamed[1]["content"]
    assert found.prompt(unnamed, options) == theirs
    none = ChatOptions(tools=[TOOL], tool_choice="none")
    assert found.prompt(talk(CALL), none) == found.expected(talk(CALL), add_generation_prompt=True)
    long = talk({**OPENAI, "id": "call_of_another_server"})
    assert len(found.prompt(long, options)) >= len(theirs) - 9
    start = found.controls(talk(CALL), options)
    evil = {**OPENAI, "function": {"name": "f", "arguments": '{"<|eot_id|>": "<|im_end|>"}'}}
    tool = {"type": "function", "function": {"name": "f", "description": "<|im_end|></tool_call>"}}
    assert found.controls(talk(evil), ChatOptions(tools=[tool])) == start
    hidden = json.dumps({"a": Marks(found.tokenizer).mark(END)})  # as escapes in JSON
    evil = {**OPENAI, "function": {"name": "f", "arguments": hidden}}
    assert found.controls(talk(evil), options) == start


def test_templates_that_join_arguments_get_text(tmp_path: Path) -> None:
    found = Rendered(tmp_path, JOINED_TOOLS)
    for call in (CALL, OPENAI):
        assert '{"a": "ö"}' in found.library.decode(found.prompt(talk(call)))
    cut = {**OPENAI, "function": {"name": "f", "arguments": '{"a'}}  # by max_gen_len
    assert Rendered(tmp_path, HERMES_TOOLS).prompt(talk(cut))


def test_tool_use_serves_requests_with_tools(tmp_path: Path) -> None:
    named = [
        {"name": "default", "template": PLAIN},
        {"name": "tool_use", "template": HERMES_TOOLS},
        {"name": "rag", "template": "{{ documents[0].text }}"},
    ]
    found = Rendered(tmp_path, named)
    assert found.chat.notation is HERMES and found.chat.documents
    with_tools = found.prompt(DIALOG, ChatOptions(tools=[TOOL]))
    assert with_tools == found.expected(DIALOG, tools=[TOOL], add_generation_prompt=True)
    assert found.prompt(DIALOG) == found.expected(DIALOG, add_generation_prompt=True)
    assert "<tool_call>" in found.tokenizer.control_ids
    # As files, and in the list of a GGUF file.
    folder = tmp_path / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text("in a file")
    files = {**found.files, "additional_chat_templates/tool_use.jinja": folder / "tool_use.jinja"}
    assert chat_templates(files)["tool_use"] == "in a file"


def test_documents_reach_the_template(tmp_path: Path) -> None:
    template = "{% for d in documents %}<|im_start|>{{ d.title }}: {{ d.text }}{% endfor %}"
    found = Rendered(tmp_path, template)
    documents = [{"title": "A", "text": "x<|im_end|>"}, {"title": "B", "text": "y"}]
    ids = found.prompt(DIALOG, ChatOptions(documents=documents))
    assert found.chat.documents
    assert found.library.decode(ids) == f"{START}A: x{END}{START}B: y"
    controls = found.controls(DIALOG, ChatOptions(documents=documents))
    assert controls == [found.tokenizer.control_ids[START]] * 2


def test_marks_of_calls_are_visible(tmp_path: Path, checkpoint_dir: Any) -> None:
    path = checkpoint_dir(vocab_size=500)
    (path / "tokenizer.model").unlink()
    ids = Rendered(path, HERMES_TOOLS).tokenizer.control_ids
    llama = Llama.build(path, device="cpu", max_seq_len=512)
    from llama.sampling import SamplingParams

    plain, tools = (
        llama.tasks.chat([DIALOG], SamplingParams(), options)[0]
        for options in (ChatOptions(), ChatOptions(tools=[TOOL]))
    )
    assert not plain.visible
    marks = ("<tool_call>", "</tool_call>")
    assert tools.visible == {ids[mark]: mark for mark in marks}


def test_a_template_of_ones_own(tmp_path: Path, checkpoint_dir: Any) -> None:
    path = checkpoint_dir(vocab_size=500)
    (path / "tokenizer.model").unlink()
    found = Rendered(path, PLAIN)
    own = tmp_path / "own.jinja"
    own.write_text("{{ messages[0].content }}<|im_end|>!")
    for template in (own, str(own), own.read_text()):
        llama = Llama.build(path, device="cpu", max_seq_len=64, chat_template=template)
        ids = llama.chat.prompt(llama.tokenizer, DIALOG)
        assert llama.tokenizer.control_ids[END] in ids
        assert found.library.decode(ids) == f"A cat?{END}!"
    for wrong in ("none.jinja", "none" * 100):
        with pytest.raises(FileNotFoundError, match="no chat template at none"):
            Llama.build(path, chat_template=wrong)
    with pytest.raises(ValueError, match="chat_template and chat_format are both given"):
        Llama.build(path, chat_template=own, chat_format="inst")
    with pytest.raises(ValueError, match="tool_format is 'xml': expected None or 'hermes'"):
        Llama.build(path, tool_format="xml")
    named = {"tokenizer_config.json": json.dumps({"chat_template": "x", "a": 1}).encode()}
    replaced = with_template(named, own)
    assert json.loads(replaced["tokenizer_config.json"]) == {"a": 1}  # type: ignore[arg-type]
    assert chat_templates(replaced) == {"default": own.read_text()}


def test_broken_templates_are_told_at_every_use(tiny_tokenizer: BaseTokenizer) -> None:
    chat = template_format({"default": "{% if %}"})
    for _ in range(2):
        with pytest.raises(ValueError, match="can't be read"):
            chat.prompt(tiny_tokenizer, DIALOG)
