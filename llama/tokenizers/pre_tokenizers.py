"""The rules by which byte-level tokenizers split a text before they merge pairs."""

import logging
from dataclasses import dataclass

from llama.errors import printable

logger = logging.getLogger(__name__)

# The regular expressions are those of the models' own tokenizer.json, as llama.cpp
# (src/llama-vocab.cpp) quotes them. Each splits what the one before it left.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGITS = r"\p{N}"
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# DeepSeek LLM's letters that have cases: some of Unicode's.
_CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293"
    "\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c"
    "\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5"
    "\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59"
    "\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc"
    "\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107"
    "\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee"
    "\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e"
    "\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
RULES: dict[str, tuple[str, ...]] = {
    "llama3": (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}",),
    "tekken": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
        rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
    ),
    "qwen2": (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_SYMBOLS}|{_SPACES}",),
    "seed-coder": (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",),
    "gpt-2": (_GPT2,),
    "starcoder": (_DIGITS, _GPT2),
    "deepseek-llm": (
        r"[\r\n]",
        rf"\s?[{_CASED}]+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        _CJK,
        r"\p{N}+",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, _DIGITS),
    "viking": (" ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+", _DIGITS),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
# Other names of the rules in ``tokenizer.ggml.pre``.
_LLAMA3 = ("llama-bpe", "llama-v3", "falcon3", "falcon-h1", "lfm2", "midm-2.0", "pixtral")
_NAMES = {
    "llama3": (*_LLAMA3, "smaug-bpe", "dbrx"),
    "qwen2": ("megrez", "stablelm2", "deepseek-r1-qwen", "hunyuan", "kormo"),
    "gpt-2": ("trillion", "mpt", "olmo", "phi-2", "jais", "exaone4", "gigachat", "mellum"),
    "starcoder": ("smollm", "refact", "minerva-7b", "command-r", "codeshell", "exaone"),
}
ALIASES = {name: rule for rule, names in _NAMES.items() for name in names}
_WHOLE_WORDS = ("llama3", *_LLAMA3, "tekken")
_NFC = ("qwen2",)


@dataclass(frozen=True)
class Rule:
    """The rule by which one vocabulary splits texts.

    Attributes:
        patterns: regular expressions, each of which splits the pieces that the one before it left.
        whole_words: a piece that is a token stays whole, whatever the merges would give, and
            texts begin with the beginning-of-sequence token unless the file says otherwise.
        nfc: the model's own tokenizer normalises texts to NFC before.
    """

    patterns: tuple[str, ...]
    whole_words: bool
    nfc: bool


def find_rule(name: object, source: str) -> Rule:
    """Return the rule with a name; without one it is llama.cpp's ``default``, with a warning.

    Args:
        name: the value of ``tokenizer.ggml.pre``, None if there is none.
        source: the file's name in errors.

    Raises:
        ValueError: no rule has this name.
    """
    if name in (None, ""):
        logger.warning(
            "%s has no tokenizer.ggml.pre: texts are split by llama.cpp's rule 'default', "
            "which may not be the model's; convert the model again",
            source,
        )
        name = "default"
    rule = ALIASES.get(name, name) if isinstance(name, str) else None
    if rule not in RULES:
        names = ", ".join(sorted([*RULES, *ALIASES]))
        raise ValueError(
            f"{source} has tokenizer.ggml.pre = {printable(repr(name))}: known rules are {names}"
        )
    return Rule(RULES[rule], name in _WHOLE_WORDS, name in _NFC)
