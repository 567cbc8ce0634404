"""The sampling that a checkpoint's authors recommend, for ``sampling="checkpoint"``."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llama.sampling import SamplingParams

logger = logging.getLogger(__name__)

_FILE = "generation_config.json"
_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# llama.cpp's names, in whose files converters put the values of a generation_config.json.
_GGUF_NAMES = {"temp": "temperature", "penalty_repeat": "repetition_penalty"}
_IDS = {"bos_token_id", "eos_token_id", "pad_token_id"}


@dataclass(frozen=True)
class Recommended:
    """Recommended values of ``SamplingParams``.

    Attributes:
        source: the file that recommends them; empty if none does.
        values: by names of fields.
    """

    source: str = ""
    values: dict[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.values)

    def __str__(self) -> str:
        return ", ".join(f"{name}={self.values[name]!r}" for name in _NAMES if name in self.values)

    def apply(self, params: SamplingParams) -> SamplingParams:
        """Return parameters with the recommended values, if they ask for them.

        Raises:
            ValueError: nothing is recommended, or a value makes no sense.
        """
        if params.sampling is None:
            return params
        if not self.values:
            raise ValueError(
                f"sampling is {params.sampling!r}, but this checkpoint has no {_FILE} that "
                "recommends any: leave sampling out, and give temperature and top_p"
            )
        usual = SamplingParams()
        names = [name for name in self.values if getattr(params, name) == getattr(usual, name)]
        try:
            return replace(params, **{name: self.values[name] for name in names})
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{self.source}: {error}; or leave sampling={params.sampling!r} out"
            ) from error


def recommended_sampling(files: Mapping[str, Path | bytes], where: object) -> Recommended:
    """Read and log what ``generation_config.json`` recommends, by transformers' names.

    As in transformers, one without ``do_sample`` recommends the most probable token each time; one
    with it stands for a temperature and a top-p of 1 where it gives none. A file that gives ids
    only recommends nothing.

    Args:
        files: the files next to the weights, JSON objects among them.
        where: the checkpoint's name, for one whose files are inside of it.
    """
    file = files.get(_FILE, b"{}")
    config = json.loads(file if isinstance(file, bytes) else file.read_bytes())
    if isinstance(file, bytes) and config.keys() <= _IDS:  # of another file's ids
        return Recommended()
    values = {name: config[name] for name in _NAMES if config.get(name) is not None}
    if config.get("do_sample"):
        values = {"temperature": 1.0, "top_p": 1.0, **values}
    else:
        values = {"temperature": 0.0, **_without_draws(values)}
    recommended = Recommended(str(where if isinstance(file, bytes) else file), values)
    logger.info("%s recommends %s: sampling='checkpoint' uses it", recommended.source, recommended)
    return recommended


def gguf_sampling(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a GGUF file recommends, by transformers' names; empty if it does nothing."""
    prefix = "general.sampling."
    found = {
        _GGUF_NAMES.get(name, name): value
        for key, value in metadata.items()
        if key.startswith(prefix) and (name := key.removeprefix(prefix))
    }
    values = {name: found[name] for name in _NAMES if name in found}
    return {"do_sample": True, **values} if values else {}


def _without_draws(values: dict[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in values if name == "repetition_penalty"}
