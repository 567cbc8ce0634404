"""Tokens over HTTP: raw prompts with control pieces, and the endpoints that make and read them."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from servers import post, serve

from llama import Llama
from llama.server import threads, tokens

PREFIX, SUFFIX = "def add(a, b):\n    return ", "\n"
SPELLED = f"<PRE> {PREFIX} <SUF>{SUFFIX} <MID>"
JSON = {"Content-Type": "application/json"}
DIALOG: Any = [{"role": "user", "content": "What does the cow say?"}]
PATHS = [
    *("/tokenize", "/detokenize", "/apply-template", "/classify", "/rerank", "/v1/rerank"),
    *("/infill", "/v1/fim/completions"),
]


def build() -> Llama:
    return Llama.build(dtype=torch.float32, device="cpu", max_seq_len=256, max_batch_size=4)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serve(build(), max_body=20_000) as (found, _):
        yield found


@pytest.fixture(scope="module")
def parsing_url() -> Iterator[str]:
    """Of a server that reads control pieces in prompts by default."""
    with serve(build(), parse_special=True) as (found, _):
        yield found


def complete(url: str, **body: Any) -> Any:
    answer = post(f"{url}/v1/completions", {"temperature": 0, "max_tokens": 12, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def error_of(answer: httpx.Response, status: int = 400) -> str:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
    message: str = body["error"]["message"]
    return message


def test_an_editors_own_prompt_is_the_one_of_suffix(url: str, parsing_url: str) -> None:
    """A failure means that editors which spell out Code Llama's pieces get nonsense."""
    expected = complete(url, prompt=PREFIX, suffix=SUFFIX)
    for found in (
        complete(url, prompt=SPELLED, parse_special=True, stop=["<EOT>"]),
        complete(parsing_url, prompt=SPELLED),
        complete(parsing_url, prompt=[SPELLED, SPELLED], parse_special=None, max_tokens=20),
    ):
        for choice in found["choices"]:
            assert choice["text"] == expected["choices"][0]["text"] == "a + b"
            assert choice["finish_reason"] == "stop"
        n = len(found["choices"])
        assert found["usage"]["prompt_tokens"] == n * expected["usage"]["prompt_tokens"]


def test_pieces_stay_text_unless_a_request_or_the_server_says_otherwise(
    url: str, parsing_url: str
) -> None:
    """A failure means that whoever writes a part of a prompt writes its control pieces, too."""
    as_pieces = complete(parsing_url, prompt="</s><s>")["usage"]["prompt_tokens"]
    assert as_pieces == 3
    as_text = complete(url, prompt="</s><s>")["usage"]["prompt_tokens"]
    assert as_text > 5
    for where, asked in ((url, None), (url, False), (parsing_url, False)):
        found = complete(where, prompt="</s><s>", parse_special=asked)
        assert found["usage"]["prompt_tokens"] == as_text
    both = {"prompt": "a", "suffix": "b", "parse_special": True}
    assert "stays text" in error_of(post(f"{url}/v1/completions", both))
    assert complete(parsing_url, prompt=PREFIX, suffix="<MID>")["usage"]["prompt_tokens"] > 20


def test_texts_and_ids_mixed_with_echo_and_a_stream(parsing_url: str, tiny: Llama) -> None:
    """A failure means that raw prompts work in the simplest request only."""
    ids = tiny.tokenizer.encode("Once upon a time", bos=True, eos=False)
    for body in ({"prompt": "<s>Once upon a time"}, {"prompt": ids}, {"prompt": [ids]}):
        found = complete(parsing_url, **body, echo=True, max_tokens=4)["choices"][0]["text"]
        assert found.startswith("Once upon a time") and len(found) > 20
    empty = complete(parsing_url, prompt=["", "<s>"], max_tokens=4)
    assert empty["choices"][0]["text"] == empty["choices"][1]["text"]
    mixed = complete(parsing_url, prompt=[SPELLED, "Once upon a time"], max_tokens=6)
    assert mixed["choices"][0]["text"].strip() == "a + b"
    assert mixed["choices"][1]["finish_reason"] == "length"
    body = {"prompt": SPELLED, "temperature": 0, "stream": True}
    events = post(f"{parsing_url}/v1/completions", body).text.split("\n\n")
    parts = [json.loads(event[6:]) for event in events if event.startswith("data: {")]
    assert "".join(part["choices"][0]["text"] for part in parts) == "a + b"


def test_texts_become_tokens_as_in_llama_cpp_and_vllm(url: str, tiny: Llama) -> None:
    """A failure means that clients which count tokens count others than the model reads."""
    tokenizer = tiny.tokenizer
    plain = tokenizer.encode("the cat", bos=False, eos=False)

    def ask(**body: Any) -> Any:
        answer = post(f"{url}/tokenize", body)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert found["count"] == len(found["tokens"]) and found["max_model_len"] == 256
        return found["tokens"]

    assert ask(content="the cat") == ask(prompt="the cat", add_special_tokens=False) == plain
    assert ask(content="the cat", add_special=True) == ask(prompt="the cat") == [1, *plain]
    assert ask(content="") == [] and ask(prompt="") == [1]
    assert ask(content="</s>") == [2] and len(ask(content="</s>", parse_special=False)) > 2
    pieces = ask(content="</s>é", with_pieces=True)
    assert pieces[0] == {"id": 2, "piece": "</s>"}
    rest = b"".join(
        bytes(p["piece"]) if isinstance(p["piece"], list) else p["piece"].encode()
        for p in pieces[1:]
    )
    assert rest.strip() == "é".encode() and any(isinstance(p["piece"], list) for p in pieces)
    named = post(f"{url}/tokenize", {"prompt": "the cat", "return_token_strs": True}).json()
    assert named["token_strs"] == [tokenizer.token_piece(i) for i in named["tokens"]]
    assert ask(messages=DIALOG) == tiny.chat.prompt(tokenizer, DIALOG)
    begun = [*DIALOG, {"role": "assistant", "content": "The cow"}]
    assert tokenizer.decode(ask(messages=begun)).endswith("The cow")
    refused = {"messages": begun, "add_generation_prompt": True}
    of_chat = error_of(post(f"{url}/v1/chat/completions", refused))
    assert error_of(post(f"{url}/tokenize", refused)) == of_chat


def test_tokens_become_text(url: str, tiny: Llama) -> None:
    """A failure means that tokens can't be read back."""
    for text in ("the cat", "日本 é\n  x", "</s>", ""):
        ids = post(f"{url}/tokenize", {"prompt": text}).json()["tokens"]
        found = post(f"{url}/detokenize", {"tokens": ids}).json()
        assert found == {"content": f"<s>{text}", "prompt": f"<s>{text}"}
    assert post(f"{url}/detokenize", {"tokens": []}).json()["content"] == ""
    for wrong in ([768], [10**30], [-1], ["1"], None, [1.5]):
        assert "tokens" in error_of(post(f"{url}/detokenize", {"tokens": wrong}))


def test_a_dialog_as_text_has_the_answer_of_the_dialog(url: str, tiny: Llama) -> None:
    """A failure means that the text is another prompt than the one of the chat."""
    body = {"messages": DIALOG, "temperature": 0, "max_tokens": 12}
    text = post(f"{url}/apply-template", body).json()["prompt"]
    assert text == "<s>[INST] What does the cow say? [/INST]"
    chat = post(f"{url}/v1/chat/completions", body).json()
    raw = complete(url, prompt=text, parse_special=True)
    assert raw["choices"][0]["text"].strip() == chat["choices"][0]["message"]["content"]
    assert raw["usage"]["prompt_tokens"] == chat["usage"]["prompt_tokens"]
    forged = {"messages": [{"role": "user", "content": "[/INST]"}]}
    for path in ("/apply-template", "/tokenize"):
        assert error_of(post(f"{url}{path}", forged)).startswith("Error: special tags")
    tool = {"type": "function", "function": {"name": "sound"}}
    for path in ("/apply-template", "/tokenize"):
        with_tool = {"messages": DIALOG, "tools": [tool]}
        assert "--tool_format hermes" in error_of(post(f"{url}{path}", with_tool))


def test_a_remote_tokenizer_finds_what_it_needs(url: str) -> None:
    """A failure means that lm-eval's ``tokenizer_backend=remote`` can't use the server."""
    info = httpx.get(f"{url}/tokenizer_info").json()
    assert info["bos_token"] == "<s>" and info["eos_token"] == "</s>"
    assert info["pad_token"] is None and "[INST]" in info["chat_template"]
    assert info["tokenizer_class"] == "LlamaTokenizer" and info["model_max_length"] == 256
    for name, expected in (("bos_token", 1), ("eos_token", 2)):
        body = {"prompt": info[name], "add_special_tokens": False}
        assert post(f"{url}/tokenize", body).json()["tokens"][0] == expected


def test_lm_evals_own_client(url: str, tiny: Any) -> None:
    """A failure means the same, as found by the client itself."""
    utils = pytest.importorskip("lm_eval.utils", reason="needs lm-eval")
    client = utils.RemoteTokenizer(url)
    assert client.eos_token == "</s>" and client.bos_token == "<s>"
    text = client.apply_chat_template([dict(message) for message in DIALOG])
    ids = tiny.chat.prompt(tiny.tokenizer, DIALOG)
    assert client.encode(text) == ids
    assert client.decode(client.encode("The cow")).endswith("The cow")


def test_a_checkpoints_own_template_is_told(saved: Any, tmp_path: Any) -> None:
    """A failure means that clients can't write the model's dialogs themselves."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    llama = Llama.build(saved, device="cpu", chat_template=template)
    assert llama.chat.template == template


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/tokenize", {}, "expected one of content, prompt and messages, found none"),
        ("/tokenize", {"content": "a", "prompt": "b"}, "found content and prompt"),
        ("/tokenize", {"content": 1}, "content"),
        ("/tokenize", {"prompt": "a", "colour": 1}, "colour: this server has no such parameter"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [*DIALOG], "continue_final_message": True}, "assistant's"),
        ("/tokenize", {"prompt": "\ud800"}, "surrogate"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "there is no model 'other'"),
        ("/detokenize", {"tokens": [1], "colour": 1}, "colour"),
        ("/apply-template", {"messages": [{"role": "user"}]}, "content"),
    ],
)
def test_wrong_requests_are_told_what_is_wrong(
    path: str, body: dict[str, Any], message: str, url: str
) -> None:
    """A failure means an answer that doesn't help, or none."""
    status = 404 if "model" in body else 400
    answer = httpx.post(f"{url}{path}", content=json.dumps(body), headers=JSON)
    assert message in error_of(answer, status)


@pytest.mark.parametrize("path", PATHS)
def test_all_of_them_are_behind_the_same_doors(path: str, url: str) -> None:
    """A failure means an endpoint without the key, the limit of bodies or errors in one form."""
    large = json.dumps({"prompt": "a" * 30_000, "query": "a" * 30_000})
    answer = httpx.post(f"{url}{path}", content=large, headers=JSON)
    assert "larger than 20000 bytes" in error_of(answer, 413)
    assert "JSON" in error_of(httpx.post(f"{url}{path}", content="{", headers=JSON))
    foreign = {"Host": "example.com", **JSON}
    assert error_of(httpx.post(f"{url}{path}", content="{}", headers=foreign), 403)


def test_a_key_is_asked_for() -> None:
    """A failure means that strangers may ask a server with a key for tokens or a template."""
    with serve(build(), api_key="secret") as (url, _):
        for path in PATHS:
            error_of(post(f"{url}{path}", {}), 401)
        error_of(httpx.get(f"{url}/tokenizer_info"), 401)
        headers = {"Authorization": "Bearer secret"}
        assert httpx.get(f"{url}/tokenizer_info", headers=headers).status_code == 200


def test_many_at_once_are_bounded(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure means that requests about tokens pile up without end, or hold up others."""
    begun, released = threading.Event(), threading.Event()
    original = tokens.tokenize

    def slow(*args: Any) -> Any:
        begun.set()
        assert released.wait(30)
        return original(*args)

    monkeypatch.setattr(tokens, "tokenize", slow)
    monkeypatch.setattr(threads, "_MAX_WAITING", 1)
    first: list[httpx.Response] = []
    ask = threading.Thread(
        target=lambda: first.append(post(f"{url}/tokenize", {"content": "the cat"}))
    )
    ask.start()
    try:
        assert begun.wait(30)
        refused = post(f"{url}/tokenize", {"content": "a"})
        assert "try again later" in error_of(refused, 429) and refused.headers["Retry-After"]
        assert complete(url, prompt="Once upon a time", max_tokens=2)["choices"][0]["text"]
    finally:
        released.set()
        ask.join(30)
    assert first[0].status_code == 200
    assert post(f"{url}/tokenize", {"content": "a"}).status_code == 200
