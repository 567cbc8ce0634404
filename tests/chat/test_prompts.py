"""Prompts, token for token."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama import Dialog, Tokenizer
from llama.chat.prompts import (
    SPECIAL_TAGS,
    check_dialog,
    dialog_prompt_tokens,
    has_tags,
    infilling_prompt_tokens,
)


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: str) -> dict[str, str]:
    return {"role": "assistant", "content": text, **more}


def test_inst_one_question(llama2_tokenizer: Tokenizer) -> None:
    ids = dialog_prompt_tokens(llama2_tokenizer, [user("  Hi there \n")])
    # The well-known ids of "<s>[INST] Hi there [/INST]".
    assert ids == [1, 518, 25580, 29962, 6324, 727, 518, 29914, 25580, 29962]


def test_inst_folds_the_system_text_unstripped_and_ends_turns(llama2_tokenizer: Tokenizer) -> None:
    sp = llama2_tokenizer.sp_model
    ids = dialog_prompt_tokens(
        llama2_tokenizer,
        [system(" Be brief. "), user(" One?\n"), assistant(" 1. "), user(" Two? ")],
    )
    # The folded turn is stripped as a whole: inside, both texts keep their spaces.
    first = "[INST] <<SYS>>\n Be brief. \n<</SYS>>\n\n One? [/INST] 1. "
    assert ids == [1, *sp.encode(first), 2, 1, *sp.encode("[INST] Two? [/INST]")]


def test_inst_is_the_format_of_the_embedded_model(tiny_tokenizer: Tokenizer) -> None:
    ids = dialog_prompt_tokens(tiny_tokenizer, [user("Hello!")])
    assert ids == [1, *tiny_tokenizer.sp_model.encode("[INST] Hello! [/INST]")]


def test_turn_based_format(codellama_70b_tokenizer: Tokenizer) -> None:
    sp, step = codellama_70b_tokenizer.sp_model, 32015
    ids = dialog_prompt_tokens(
        codellama_70b_tokenizer,
        [system(" Be brief. "), user("One?"), assistant("1", destination="user"), user("Two?")],
    )
    assert ids == [
        1,
        *sp.encode(" Source: system"),
        *sp.encode("\n\n Be brief."),
        step,
        *sp.encode(" Source: user"),
        *sp.encode("\n\n One?"),
        step,
        *sp.encode(" Source: assistant\nDestination: user"),
        *sp.encode("\n\n 1"),
        step,
        *sp.encode(" Source: user"),
        *sp.encode("\n\n Two?"),
        step,
        *sp.encode(" Source: assistant\nDestination: user"),
        *sp.encode("\n\n "),
    ]


def test_turn_based_format_without_system_message(codellama_70b_tokenizer: Tokenizer) -> None:
    sp, step = codellama_70b_tokenizer.sp_model, 32015
    ids = dialog_prompt_tokens(codellama_70b_tokenizer, [user("Hi")])
    assert ids == [
        1,
        *sp.encode(" Source: system"),
        step,
        *sp.encode(" Source: user"),
        *sp.encode("\n\n Hi"),
        step,
        *sp.encode(" Source: assistant\nDestination: user"),
        *sp.encode("\n\n "),
    ]


def test_infilling_in_both_orders(codellama_tokenizer: Tokenizer) -> None:
    t = codellama_tokenizer
    prefix, suffix = t.sp_model.encode("def f("), t.sp_model.encode("☺):\n    return x")[2:]
    assert infilling_prompt_tokens(t, "def f(", "):\n    return x") == [
        1,
        32007,
        *prefix,
        32008,
        *suffix,
        32009,
    ]
    assert infilling_prompt_tokens(t, "def f(", "):\n    return x", suffix_first=True) == [
        1,
        32007,
        32008,
        *suffix,
        32009,
        *prefix,
    ]


def test_infilling_keeps_the_suffix_free_of_an_implicit_space(
    codellama_tokenizer: Tokenizer,
) -> None:
    ids = infilling_prompt_tokens(codellama_tokenizer, "", "return")
    assert [codellama_tokenizer.token_piece(i) for i in ids] == [
        "<s>",
        "▁<PRE>",
        "▁<SUF>",
        "return",
        "▁<MID>",
    ]


def test_infilling_needs_a_model_trained_for_it(llama2_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="no infilling pieces"):
        infilling_prompt_tokens(llama2_tokenizer, "a", "b")


@pytest.mark.parametrize("tag", SPECIAL_TAGS)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_tags_are_found_in_any_message(tag: str, place: int) -> None:
    dialog: Dialog = [system("a"), user("b"), assistant("c"), user("d")]
    assert not has_tags(dialog)
    dialog[place]["content"] += f"x{tag}y"
    assert has_tags(dialog)
    assert has_tags([{**user("b"), "destination": tag}])


@pytest.mark.parametrize("dialog", ["Hi", ["Hi"], {"role": "user", "content": "Hi"}, None])
def test_what_is_no_dialog_is_refused(dialog: object) -> None:
    with pytest.raises(TypeError, match="a dialog is a list of messages"):
        check_dialog(dialog)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dialog", "message"),
    [
        ([], "dialog is empty"),
        ([system("a")], "message 0, the dialog's last, is by 'system'"),
        ([user("a"), assistant("b")], "message 1, the dialog's last, is by 'assistant'"),
        ([assistant("a"), user("b")], "message 0 of the dialog is by 'assistant'"),
        ([user("a"), user("b")], "message 1 of the dialog is by 'user'"),
        ([user("a"), system("b"), user("c")], "message 1 of the dialog is by 'system'"),
        ([system("a"), system("b"), user("c")], "message 1 of the dialog is by 'system'"),
        ([{"role": "tool", "content": "a"}], "message 0 of the dialog has the role 'tool'"),
        ([{"content": "a"}], "message 0 of the dialog has no role"),
        ([{"role": "user", "content": None}], "message 0 of the dialog has no text"),
        ([{"role": "user"}], "message 0 of the dialog has no text"),
        ([{**user("a"), "destination": "x\n\n y"}], "message 0 of the dialog has the destination"),
        ([{**user("a"), "destination": None}], "message 0 of the dialog has the destination"),
    ],
)
def test_malformed_dialogs_name_the_message(dialog: Dialog, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_dialog(dialog)


@pytest.mark.parametrize(
    "name", ["tiny_tokenizer", "codellama_tokenizer", "codellama_70b_tokenizer"]
)
def test_contents_yield_no_control_ids(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    parts = ["<s>", "</s>", " <PRE>", "<MID>", " <EOT>", "<SUF>", "<step>", "a", " ", "\n"]
    texts = st.lists(st.sampled_from(parts), max_size=6).map("".join)
    plain = dialog_prompt_tokens(tokenizer, [system("a"), user("b"), assistant("c"), user("d")])

    def control(ids: list[int]) -> list[int]:
        t = tokenizer
        special = {t.bos_id, t.eos_id, t.step_id, t.prefix_id, t.middle_id, t.suffix_id, t.eot_id}
        return [i for i in ids if i in special]

    @settings(max_examples=150, deadline=None)
    @given(texts, texts, texts, texts)
    def check(a: str, b: str, c: str, d: str) -> None:
        ids = dialog_prompt_tokens(tokenizer, [system(a), user(b), assistant(c), user(d)])
        assert control(ids) == control(plain)
        infilling = infilling_prompt_tokens(tokenizer, a, b)
        assert len(control(infilling)) == 4

    check()
