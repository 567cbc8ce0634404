"""Spellings and oddities of ``config.json`` that transformers takes, too."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_files import make_hf, save_hf
from safetensors.torch import load_file, save_file

from llama.checkpoint import open_checkpoint
from llama.checkpoint.base import Checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    save_hf(make_hf(), path)
    return path


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


def opened(directory: Path, **values: Any) -> Checkpoint:
    """The checkpoint with other values in its configuration."""
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **values}))
    return open_checkpoint(directory)


def test_a_null_is_the_default(directory: Path) -> None:
    """A failure means that a configuration which older versions read is refused."""
    nulls = dict.fromkeys(("attention_bias", "mlp_bias", "tie_word_embeddings"))
    params = opened(directory, **nulls).params
    assert [params[name] for name in nulls] == [False] * 3


def test_swish_is_silu(directory: Path) -> None:
    """A failure means that a second name of the same function is refused."""
    opened(directory, hidden_act="swish")


@pytest.mark.parametrize("tied", [1, 0, "true"])
def test_a_tie_is_true_or_false(tied: object, directory: Path) -> None:
    """A failure means that a wrong value loads as though it were true."""
    with pytest.raises(ValueError, match=r"tie_word_embeddings is .* expected true or false"):
        opened(directory, tie_word_embeddings=tied)


@pytest.mark.parametrize("kind", [{}, {"rope_type": "default"}, {"type": "default"}])
def test_scaling_without_a_kind_is_told(
    kind: dict[str, str], directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A failure means that a scaling which isn't applied goes unnoticed."""
    assert "rope_scaling" not in opened(directory, rope_scaling={**kind, "factor": 4.0}).params
    assert "'factor' in its default rotary scaling: ignored" in caplog.text
    caplog.clear()
    opened(directory, rope_scaling={**kind, "rope_theta": 5e5})
    assert not caplog.records


@pytest.mark.parametrize("scales", [(0, 0), (0.0, 0.7), (0.7, 0)])
def test_scales_of_zero_do_not_count(scales: tuple[float, float], directory: Path) -> None:
    """A failure means that a configuration of transformers is refused, or scales otherwise."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    mscales = dict(zip(("mscale", "mscale_all_dim"), scales, strict=True))
    assert opened(directory, rope_scaling={**yarn, **mscales}).params["rope_scaling"] == yarn


@pytest.mark.parametrize("stated", ["bfloat16", "float32", "torch.float64"])
def test_weights_of_one_dtype_keep_it(
    stated: str, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A failure means that bfloat16 weights take twice their memory for what a file says."""
    path = directory / "model.safetensors"
    save_file({name: t.bfloat16() for name, t in load_file(path).items()}, path)
    assert opened(directory, dtype=stated).dtype == torch.bfloat16
    assert not caplog.records


def test_a_dtype_with_the_name_of_torch(directory: Path) -> None:
    """A failure means that mixed weights don't have the dtype that their file gives them."""
    path = directory / "model.safetensors"
    tensors = {name: t.bfloat16() for name, t in load_file(path).items()}
    save_file({**tensors, "model.norm.weight": torch.ones(64)}, path)
    assert opened(directory, dtype="torch.float32").dtype == torch.float32


def test_weights_without_files_name_a_remedy(directory: Path) -> None:
    """A failure means that a clone without its weights leaves the user alone."""
    (directory / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no weights: .*; download them, or run git"):
        open_checkpoint(directory)


def test_errors_name_tensors_as_their_file_does(directory: Path) -> None:
    """A failure means that someone looks for a name which the file doesn't have."""
    path = directory / "model.safetensors"
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**load_file(path), name: torch.ones(160, 64, dtype=torch.int32)}, path)
    with pytest.raises(ValueError, match=f"^{name} in .* is torch.int32"):
        open_checkpoint(directory)


def test_a_file_of_metas_layout_alone_is_a_leftover(directory: Path) -> None:
    """A failure means that a whole directory is refused for a file beside it."""
    stray = directory / "consolidated.00.pth"
    stray.write_bytes(b"1")
    assert Path(open_checkpoint(directory).source).name == "config.json"
    with pytest.raises(ValueError, match="hidden_act 'gelu'"):
        opened(directory, hidden_act="gelu")
    (directory / "params.json").write_text("{}")
    with pytest.raises(ValueError, match=r"consolidated\.00\.pth"):
        open_checkpoint(directory)
