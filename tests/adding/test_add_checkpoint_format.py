"""A checkpoint format, added: NumPy's ``.npz``, with ``params.json`` and a tokenizer beside it."""

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from llama import Llama, checkpoint
from llama.checkpoint.base import Checkpoint, Weights, text_files
from llama.checkpoint.description import describe
from llama.checkpoint.params import read_params
from llama.generation import TINY


def open_npz(path: Path) -> Checkpoint | None:
    """Open an archive that has Meta's tensors under their names; None for another file."""
    if path.suffix != ".npz":
        return None
    try:
        arrays = np.load(path)  # which reads an array each time it is asked for
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is damaged: copy it again") from error
    shapes = {}
    for name in arrays.files:
        with arrays.zip.open(f"{name}.npy") as file:  # whose header is enough
            np.lib.format.read_magic(file)
            shapes[name], *_ = np.lib.format.read_array_header_1_0(file)
    weights = Weights(shapes, lambda name: torch.from_numpy(arrays[name]))
    source = path.with_name("params.json")
    params, texts = read_params(source), dict(text_files(path.parent))
    return Checkpoint(str(source), params, [weights], [str(path)], torch.float32, texts)


@pytest.fixture
def npz(tiny: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The embedded model in the format."""
    monkeypatch.setitem(checkpoint.FORMATS, "npz", open_npz)  # a line of llama/checkpoint/
    path = shutil.copytree(TINY, tmp_path / "model") / "model.npz"
    (path.parent / "consolidated.00.pth").unlink()
    np.savez(path, **{name: part.numpy() for name, part in tiny.model.state_dict().items()})
    return path


def test_its_tokens_are_the_original_s(tiny: Llama, npz: Path) -> None:
    """A failure means that the format's weights aren't the checkpoint's."""
    llama, prompts = Llama.build(npz), [[1, 300], [1, 400, 500]]
    assert llama.generate(prompts, 24, temperature=0) == tiny.generate(prompts, 24, temperature=0)
    assert describe(npz)["format"] == "npz"


def test_what_is_wrong_is_named(npz: Path) -> None:
    """A failure means that a file with something else than a whole model is taken for one."""
    whole = npz.read_bytes()
    np.savez(npz, **{name: array for name, array in np.load(npz).items() if name != "norm.weight"})
    with pytest.raises(ValueError, match=r"model\.npz lacks norm\.weight"):
        Llama.build(npz)
    npz.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model\.npz is damaged .*its end is missing"):
        Llama.build(npz)
