"""The files next to a checkpoint's weights, and the chat templates in them."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Files = Mapping[str, Path | bytes]
"""Files by Hugging Face's names: paths or contents (``Checkpoint.files``)."""

TEMPLATES = "additional_chat_templates"
"""The folder of chat templates besides the default one."""


def read(files: Files, name: str) -> bytes:
    """Return a file's content."""
    source = files[name]
    return source if isinstance(source, bytes) else source.read_bytes()


def name_of(files: Files, name: str) -> str:
    """Return a file's name in errors."""
    source = files[name]
    return name if isinstance(source, bytes) else str(source)


def read_json(files: Files, name: str) -> dict[str, Any]:
    """Return a JSON file's object; an empty one if the file is missing.

    Raises:
        ValueError: the file is malformed.
    """
    if name not in files:
        return {}
    try:
        value = json.loads(read(files, name))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name_of(files, name)} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name_of(files, name)} holds a {type(value).__name__}, not an object")
    return value


def _read_text(files: Files, name: str) -> str:
    try:
        return read(files, name).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name_of(files, name)} is not UTF-8: {error}") from error


def chat_templates(files: Files) -> dict[str, str]:
    """Return the checkpoint's own chat templates, in Jinja's language, by name.

    "default" is one of them; the mapping is empty if there is none.
    """
    template = read_json(files, "tokenizer_config.json").get("chat_template")
    named = template if isinstance(template, list) else [{"name": "default", "template": template}]
    templates = {t.get("name"): t.get("template") for t in named if isinstance(t, dict)}
    if "chat_template.jinja" in files:
        templates["default"] = _read_text(files, "chat_template.jinja")
    for name in files:
        folder, _, file = name.partition("/")
        if folder == TEMPLATES:
            templates[file.removesuffix(".jinja")] = _read_text(files, name)
    found = {n: t for n, t in templates.items() if isinstance(n, str) and isinstance(t, str)}
    return found if "default" in found else {}


def with_template(files: Files, template: str | Path) -> dict[str, Path | bytes]:
    """Return the files with another chat template in place of the checkpoint's own.

    Args:
        files: the files next to the weights.
        template: a file's path, or the template itself.

    Raises:
        FileNotFoundError: there is no such file, and the text can't be a template.
    """
    # A template has a tag, and hardly any path has one.
    source: Path | bytes = Path(template)
    if isinstance(template, str) and ("{{" in template or "{%" in template):
        source = template.encode()
    elif not os.path.isfile(template):  # no error for a text that is too long
        raise FileNotFoundError(
            f"no chat template at {template}: give the path of a file, or a template in Jinja's "
            "language"
        )
    config = read_json(files, "tokenizer_config.json")
    config.pop("chat_template", None)
    kept = {n: f for n, f in files.items() if n.partition("/")[0] != TEMPLATES}
    kept |= {"tokenizer_config.json": json.dumps(config).encode()} if config else {}
    return {**kept, "chat_template.jinja": source}
