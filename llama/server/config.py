"""The flags of the server."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama.checkpoint.flags import CheckpointFlags
from llama.errors import short
from llama.server.access import is_loopback


@dataclass(frozen=True)
class ModelConfig(CheckpointFlags):
    """The flags that say which model answers requests.

    Args:
        model_name: the model's id for clients; the checkpoint's own name by default.
        alias: other names of the model for clients, separated by commas.
        any_model: answer requests for any model by the served one; adapters keep their names.
        lenient: ignore fields of requests that the server doesn't know, and name them in the
            header X-Llama-Ignored.
        max_batch_size: requests that run at once; others wait.
        guard_dir: a checkpoint of Llama Guard to check all prompts and answers with.
        lora_modules: adapters that a request chooses as its model, name=directory, separated by
            commas; they aren't merged.
        tool_format: how tools are described and called where the template has no place for them;
            "hermes" is known.
        sampling: "checkpoint" takes what the checkpoint recommends for the sampling parameters
            that a request doesn't set.
        parse_special: let /v1/completions read control pieces that a prompt spells out, such as
            <PRE>, unless a request says otherwise; whoever writes a part of a prompt then writes
            such pieces too.
    """

    model_name: str | None = None
    alias: str | tuple[str, ...] = ()
    any_model: bool = False
    lenient: bool = False
    max_batch_size: int = 8
    guard_dir: str | None = None
    lora_modules: str | tuple[str, ...] = ()
    tool_format: str | None = None
    sampling: str | None = None
    parse_special: bool = False

    def __post_init__(self) -> None:
        adapters = self.lora_directories()
        for name in self.aliases:
            if not name or name == self.name or name in adapters or self.aliases.count(name) > 1:
                raise ValueError(
                    f"--alias has the name {short(name, 80)}: expected names that aren't empty and "
                    "that no adapter, the model or another alias has, separated by commas"
                )

    @property
    def name(self) -> str:
        """The model's id."""
        return self.model_name or self.root

    @property
    def root(self) -> str:
        """The checkpoint's own name."""
        path = Path(self.ckpt_dir).resolve()
        return path.stem if path.is_file() else path.name

    @property
    def aliases(self) -> list[str]:
        """The other names of the model."""
        names = [self.alias] if isinstance(self.alias, str) else self.alias
        return [name.strip() for name in names]

    def lora_directories(self) -> dict[str, str]:
        """Return the directories of ``lora_modules`` by the adapters' names.

        Raises:
            ValueError: an entry isn't ``name=directory``, or a name isn't the only one.
        """
        entries = [self.lora_modules] if isinstance(self.lora_modules, str) else self.lora_modules
        found: dict[str, str] = {}
        for entry in entries:
            name, _, directory = map(str.strip, entry.partition("="))
            if not name or not directory:
                raise ValueError(
                    f"--lora_modules has {short(entry, 80)}: expected name=directory, separated by "
                    "commas"
                )
            if name in found or name == self.name:
                raise ValueError(
                    f"--lora_modules has the name {short(name, 80)}, which another adapter or the "
                    "model has already: a request chooses by it, so give each its own"
                )
            found[name] = directory
        return found

    def build_arguments(self) -> dict[str, Any]:
        """Return the arguments of ``Llama.build``."""
        more = {"max_batch_size": self.max_batch_size, "tool_format": self.tool_format}
        return super().build_arguments() | more


@dataclass(frozen=True)
class ServerConfig(ModelConfig):
    """The flags of the server.

    Args:
        host: the address to listen on; other than a loopback address it needs a key.
        port: the port to listen on; 0 for a free one.
        api_key: the key that clients must send; the environment variable
            LLAMA_API_KEY sets it without showing it in the list of processes.
        max_queue: requests that may wait; others get status 429.
        timeout: seconds that a request may take, at most.
        max_body: bytes of a request, at most.
        cors: origins whose web pages may call the API, such as https://example.com, separated by
            commas.
        root_path: the path under which a proxy shows this server, such as /llama, whether or not
            it passes that on.
        page: serve a web page at /.
        log_prompts: write prompts to the log.
        prompt_lookup_num_tokens: draft tokens at most that prompt lookup proposes, while few
            sequences are being decoded.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_queue: int = 64
    timeout: float = 600.0
    max_body: int = 4_000_000
    cors: str = ""
    root_path: str = ""
    page: bool = True
    log_prompts: bool = False
    prompt_lookup_num_tokens: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        key = self.api_key or os.environ.get("LLAMA_API_KEY") or None
        object.__setattr__(self, "api_key", key)
        object.__setattr__(self, "root_path", _checked_root(self.root_path))
        if key is None and not is_loopback(self.host):
            raise ValueError(
                f"{self.host} can be reached from other machines: set the environment variable "
                "LLAMA_API_KEY to a key that clients must send, or leave --host out to serve this "
                "machine only"
            )

    @property
    def origins(self) -> list[str]:
        """The origins in ``cors``."""
        return [text.strip().rstrip("/") for text in self.cors.split(",") if text.strip()]

    @property
    def is_local(self) -> bool:
        """True if only requests whose host is this machine are answered.

        With a key this isn't checked, as a proxy may call this machine by another name.
        """
        return is_loopback(self.host) and self.api_key is None


def _checked_root(path: str) -> str:
    """Return a path that begins with a slash and doesn't end with one, or an empty text."""
    path = str(path).strip("/")
    if not re.fullmatch(r"([\w.~-]+(/[\w.~-]+)*)?", path, re.ASCII):
        raise ValueError(
            f"--root_path is {short(path, 80)}: expected a path alone, such as /llama, under which "
            "a proxy shows this server"
        )
    return f"/{path}" if path else ""
