"""Damaged JSON files: odd values anywhere in them, and odd texts."""

import copy
import json
import random
from typing import Any

ODD_NUMBERS = (
    *(0, 1, -1, 2, 3, 64, 255, 768, 10**6, 2**31 - 1, 2**31, 2**32, 10**9, 2**63 - 1, 2**63, 2**64),
    *(-(2**63), 0.5, -0.0, 1e-300, 1e308, 10**300, 10**400, 10**4000),
)
ODD_TEXTS = (
    *("", " ", "\0", "\n\x1b[2J", "64", "x" * 10**5, "\ud800", "../x", "/etc/passwd", "é" * 300),
    *(
        "llama",
        "LlamaForCausalLM",
        "LORA",
        "BPE",
        "Sequence",
        "<s>",
        "</s>",
        "▁",
        "▁<PRE>",
        "default",
    ),
    *("linear", "llama3", "yarn", "dynamic", "longrope", "os.system", "builtins.eval"),
)
ODD_OTHERS: tuple[Any, ...] = (
    *(None, True, False, [], {}, [[]], [None], [1], ["a"], {"a": {"b": [1]}}, {"": 0}),
    *(float("nan"), float("inf"), -float("inf")),
)
# Patterns that take exponential time where nothing limits them.
REGEXES = (
    *(
        r"(a+)+$",
        r"(\s*)*\S",
        r"(.*)*x",
        r"((a|aa)+)+b",
        r"(.|[^!])" * 26 + "!",
        r"(?x:(.+) +!)",
        r"(?=(\w+)+)\1x",
        r"[",
        r"(?P<",
        r"\p{Nope}",
    ),
    *("a{1000}{1000}", "(" * 5000 + ")" * 5000, "|" * 5000, r"(?i)" * 1000, r"\1", r"(?R)", r"^|$"),
)


def odd_value(rng: random.Random) -> Any:
    return rng.choice(rng.choice((ODD_NUMBERS, ODD_NUMBERS, ODD_TEXTS, ODD_OTHERS, REGEXES)))


def _brief(value: Any) -> str:
    if isinstance(value, int) and abs(value) > 10**30:
        return "a huge number"
    return ascii(value)[:30]


def _places(value: Any, depth: int = 0) -> list[tuple[Any, Any]]:
    """All containers with their keys, of long lists a few entries."""
    if depth > 8:
        return []
    found: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        found = [(value, key) for key in list(value)[:60]]
    elif isinstance(value, list):
        found = [(value, i) for i in {0, 1, len(value) // 2, len(value) - 1} if 0 <= i < len(value)]
    return found + [place for c, k in found for place in _places(c[k], depth + 1)]


def change(rng: random.Random, data: Any) -> tuple[Any, str]:
    """Put odd values, missing keys or new ones anywhere into an object."""
    data = copy.deepcopy(data)
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = _places(data)
        if not places:
            return odd_value(rng), "replaced"
        # As many changes of outer keys as of the many inner ones.
        outer = [place for place in places if place[0] is data]
        where, key = rng.choice(outer if outer and rng.random() < 0.5 else places)
        kind = rng.choice(("value", "value", "value", "drop", "add", "swap", "repeat", "wrap"))
        if kind == "drop":
            del where[key]
        elif kind == "add" and isinstance(where, dict):
            key = rng.choice(("unknown", "", "\0", "k" * 10**5, "type", "quantization_config"))
            where[key] = odd_value(rng)
        elif kind == "swap":
            other_where, other = rng.choice(places)
            where[key], other_where[other] = copy.deepcopy((other_where[other], where[key]))
        elif kind == "repeat" and isinstance(where, list):
            where += [copy.deepcopy(where[key])] * rng.choice((1, 10**4))
        elif kind == "wrap":
            where[key] = rng.choice(([where[key]], {"a": where[key]}, str(where[key])[: 10**5]))
        else:
            where[key] = odd_value(rng)
        value = where.get(key) if isinstance(where, dict) else None
        done.append(f"{kind} {ascii(key)[:30]} {_brief(value)}")
    return data, ", ".join(done)


def dump(data: Any) -> bytes:
    return json.dumps(data).encode()


def odd_text(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """A text that is almost JSON, or a strange kind of it."""
    text = data.decode().strip()
    texts: dict[str, str | bytes] = {
        "deep list": '{"a": ' + "[" * 10**5 + "]" * 10**5 + "}",
        "deep object": '{"a":' * 10**5 + "1" + "}" * 10**5,
        "unclosed depth": "[" * 10**6,
        "not UTF-8": text.encode()[:-1] + b', "\xff\xfe": 1}',
        "BOM": b"\xef\xbb\xbf" + text.encode(),
        "UTF-16": text.encode("utf-16"),
        "5000 digits": text[:-1] + ', "a": ' + "9" * 5000 + "}",
        "4000 digits": text[:-1] + ', "vocab_size": ' + "9" * 4000 + "}",
        "many keys": "{" + ",".join(f'"k{i}": {i}' for i in range(10**5)) + "}",
        "list": f"[{text}]",
        "number": "1",
        "null": "null",
        "string": '"text"',
        "NUL": text + "\0",
        "two": text + text,
        "half surrogate key": text[:-1] + ', "\\ud800": 1}',
        "control characters in a key": text[:-1] + ', "\\n\\n\\u001b[2J": 1}',
        "cut": text[: rng.randrange(len(text) + 1)],
        "page": "<!DOCTYPE html><html>" + text,
        "pointer": "version https://git-lfs.github.com/spec/v1\n",
    }
    kind = rng.choice(sorted(texts))
    content = texts[kind]
    return content if isinstance(content, bytes) else content.encode(), kind
