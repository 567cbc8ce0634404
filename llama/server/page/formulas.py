"""LaTeX's formulas as MathML, rebuilt from the elements and attributes that are known.

latex2mathml escapes nothing, and passes links, classes and styles through.
"""

import re
from html import escape, unescape
from xml.etree.ElementTree import Element

from latex2mathml.converter import convert_to_element

MAX_LENGTH = 2000  # characters of a formula
_MAX_DEPTH = 60  # of elements
# Definitions, which a few lines can make expand to gigabytes, and one that doubles what it holds.
_UNBOUNDED = re.compile(r"\\(?:\w*def|\w+command|\w+environment|Declare\w+|sideset)(?![a-zA-Z])")
_ESCAPED = re.compile(r"\\.", re.DOTALL)
_ALIGNED = re.compile(r"\\(begin|end) *\{aligned\}")  # which has the same meaning as split
# A character as latex2mathml writes it.
_CHARACTER = re.compile(r"&#x[0-9A-Fa-f]{1,6};")

_NAMES = """
math mrow mi mn mo mtext mspace mfrac msqrt mroot msub msup msubsup munder mover munderover
mmultiscripts mprescripts mtable mtr mtd mlabeledtr mstyle mpadded mphantom menclose
"""
ELEMENTS = frozenset(_NAMES.split())
# Two digits, so that no formula lies over the rest of a page.
_LENGTH = (
    r"[-+]{0,2}\d{0,2}(?:\.\d{1,4})?(?:em|ex|px|pt|mu|width)?|(?:negative)?[a-z]{4,6}mathspace"
)
_WORDS = r"[a-z][a-z -]{0,40}"
_BOOLEAN = "true|false"
_COLOUR = r"#[0-9a-fA-F]{3,6}|[a-zA-Z]{1,20}"
_VALUES = {
    "accent": _BOOLEAN,
    "columnalign": _WORDS,
    "columnlines": _WORDS,
    "columnspacing": rf"(?:{_LENGTH})(?: (?:{_LENGTH})){{0,30}}",
    "depth": _LENGTH,
    "display": "block|inline",
    "displaystyle": _BOOLEAN,
    "fence": _BOOLEAN,
    "form": "prefix|infix|postfix",
    "height": _LENGTH,
    "largeop": _BOOLEAN,
    "linebreak": "newline",
    "linethickness": _LENGTH,
    "lspace": _LENGTH,
    "mathbackground": _COLOUR,
    "mathcolor": _COLOUR,
    "mathsize": _LENGTH,
    "mathvariant": _WORDS,
    "maxsize": _LENGTH,
    "minsize": _LENGTH,
    "movablelimits": _BOOLEAN,
    "notation": _WORDS,
    "rowlines": _WORDS,
    "rowspacing": _LENGTH,
    "rspace": _LENGTH,
    "scriptlevel": r"[-+]?\d",
    "separator": _BOOLEAN,
    "stretchy": _BOOLEAN,
    "voffset": _LENGTH,
    "width": _LENGTH,
}
ATTRIBUTES = {name: re.compile(pattern) for name, pattern in _VALUES.items()}


def formula_html(latex: str, is_block: bool) -> str | None:
    """Return a formula as MathML; None for one that can't be read, or isn't safe to show.

    Args:
        is_block: whether it stands in a line of its own.
    """
    marks = _ESCAPED.sub("", latex)
    is_balanced = marks.count("{") == marks.count("}")
    if len(latex) > MAX_LENGTH or not is_balanced or _UNBOUNDED.search(latex):
        return None
    try:
        latex = _ALIGNED.sub(r"\\\1{split}", latex)
        tree = convert_to_element(latex, display="block" if is_block else "inline")
        del tree.attrib["xmlns"]  # HTML knows the element by its name
        return _markup(tree, 0)
    except Exception:  # of any kind: the library was written for formulas that are correct
        return None


def _markup(element: Element, depth: int) -> str:
    """Return an element as HTML.

    Raises:
        ValueError: it isn't one that is known, or an attribute isn't, or has an odd value.
    """
    tag = element.tag
    if tag not in ELEMENTS or depth > _MAX_DEPTH:
        raise ValueError(f"{tag} isn't shown")
    attributes = ""
    for name, value in element.attrib.items():
        pattern = ATTRIBUTES.get(name)
        if pattern is None or not pattern.fullmatch(value):
            raise ValueError(f"{name} isn't shown")
        attributes += f' {name}="{value}"'
    text = _CHARACTER.sub(lambda found: unescape(found[0]), element.text or "")
    children = "".join(_markup(child, depth + 1) for child in element)
    return f"<{tag}{attributes}>{escape(text)}{children}</{tag}>"
