"""Regular expressions from files, refused where a search with them could take forever."""

import re

from llama.errors import printable

# Of a pattern's ways to match a module's name, and about the length of one.
_N_TRIES, _LENGTH = 100_000, 30


def compiled(
    pattern: str, key: str, source: object, before: str = "", behind: str = ""
) -> re.Pattern[str]:
    """Compile a pattern for the names of modules.

    Args:
        pattern: from a file.
        key: the setting that holds it, for errors.
        source: the file, for errors.
        before: what stands before it in the whole expression.
        behind: what stands behind it.

    Raises:
        ValueError: it is malformed, or a search could take exponential time.
    """
    # A quantified group, many quantifiers or alternatives can take exponential time, and flags
    # give a pattern another meaning.
    n_quantifiers = len(re.findall(r"(?<!\()[*+?{]", pattern))
    is_quick = n_quantifiers <= 3 and _n_choices(pattern) * _LENGTH**n_quantifiers <= _N_TRIES
    if not is_quick or re.search(r"\)[*+?{]|\(\?(?![:=!<])", pattern):
        raise ValueError(
            f"{key} in {source} has the pattern {printable(pattern)}, which could take forever: "
            "write it with at most three of *, + and ?, none behind a group, without flags and "
            "with few groups of alternatives"
        )
    try:
        return re.compile(f"{before}{pattern}{behind}")
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{key} in {source} has the malformed pattern {printable(pattern)} ({error})"
        ) from error


def _n_choices(pattern: str) -> int:
    """Return in how many ways the alternatives of a pattern's groups combine, or a few too many."""
    # In sets and behind a backslash brackets and bars stand for themselves: they count too, and
    # a bracket there that would end a group doesn't.
    bars, n, in_set = [0], 1, False
    for character in re.sub(r"\\.", "", pattern, flags=re.DOTALL):
        if character in "[]":
            in_set = character == "["
        elif character == "|":
            bars[-1] += 1
        elif character == "(" and not in_set:
            bars.append(0)
        elif character == ")" and not in_set and len(bars) > 1:
            n = min(n * (1 + bars.pop()), _N_TRIES + 1)
    return n
