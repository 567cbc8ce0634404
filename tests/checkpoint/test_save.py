"""Saving: any number of shards is the same model, and nothing is half written."""

from pathlib import Path

import pytest
import torch
from conftest import make_model
from processes import forked

from llama import Llama
from llama.checkpoint.save import reshard, save
from llama.checkpoint.sharding import check_model_parallel_size
from llama.generation import TINY


def build(path: Path, **more: object) -> Llama:
    return Llama.build(path, max_seq_len=64, max_batch_size=2, device="cpu", **more)


class TestShards:
    @pytest.mark.parametrize("variant", [{}, {"n_kv_heads": 2}, {"n_kv_heads": 1}])
    def test_any_number_of_shards_is_the_same_model(self, checkpoint_dir, variant) -> None:
        path = checkpoint_dir(**variant)
        whole = build(path).model.state_dict()
        for n in (1, 2, 4, 8):
            out = path.parent / f"shards{n}"
            reshard(str(path), str(out), model_parallel_size=n)
            assert len(list(out.glob("*.pth"))) == n
            for name, tensor in build(out).model.state_dict().items():
                assert torch.equal(tensor, whole[name]), name
            back = path.parent / f"back{n}"
            reshard(str(out), str(back), model_parallel_size=1)
            again = torch.load(back / "consolidated.00.pth")
            assert again.keys() == whole.keys()
            assert all(torch.equal(again[name], whole[name]) for name in whole)

    def test_shards_hold_what_the_published_ones_hold(self, checkpoint_dir) -> None:
        path = checkpoint_dir(n_kv_heads=2)
        reshard(str(path), str(path.parent / "two"), model_parallel_size=2)
        whole = torch.load(path / "consolidated.00.pth")
        second = torch.load(path.parent / "two" / "consolidated.01.pth")
        columns = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0}
        rows = {"wo": 1, "w2": 1, "tok_embeddings": 1}
        for name, tensor in whole.items():
            dim = {**columns, **rows}.get(name.split(".")[-2])
            expected = tensor if dim is None else tensor.chunk(2, dim)[1]
            assert torch.equal(second[name], expected), name

    def test_a_vocabulary_that_does_not_divide(self, checkpoint_dir) -> None:
        path = checkpoint_dir(vocab_size=769)
        reshard(str(path), str(path.parent / "two"), model_parallel_size=2)
        sizes = [
            torch.load(path.parent / "two" / f"consolidated.0{i}.pth")["output.weight"].shape[0]
            for i in (0, 1)
        ]
        assert sizes == [385, 384]
        whole, two = build(path).model, build(path.parent / "two").model
        assert torch.equal(whole.output.weight, two.output.weight)

    @pytest.mark.slow
    def test_the_command_line_and_python_save(self, checkpoint_dir, tmp_path: Path) -> None:
        path = checkpoint_dir()
        command = ["-m", "llama.checkpoint", "reshard", str(path), str(tmp_path / "out")]
        done = forked(*command, "--model_parallel_size", "2")
        assert done.returncode == 0, done.stderr
        assert "wrote" in done.stderr
        assert "Warning" not in done.stderr
        assert build(tmp_path / "out").tokenizer.n_words == 768
        model = build(path).model
        save([model.state_dict()], model.params, tmp_path / "saved", 4)
        (tmp_path / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
        for name, tensor in build(tmp_path / "saved").model.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name])

    def test_nothing_is_overwritten_and_nothing_half_written_stays(
        self, checkpoint_dir, tmp_path: Path, monkeypatch
    ) -> None:
        path = checkpoint_dir()
        with pytest.raises(FileExistsError, match="already exists"):
            reshard(str(path), str(path))
        with pytest.raises(ValueError, match="3 parts can't be made of 8 heads"):
            reshard(str(path), str(tmp_path / "three"), model_parallel_size=3)

        def full(done: int) -> None:
            raise OSError("No space left on device")

        model = build(path).model
        with pytest.raises((OSError, RuntimeError), match="No space"):
            save([model.state_dict()], model.params, tmp_path / "out", progress=full)
        assert [p.name for p in tmp_path.iterdir()] == ["ckpt"]


@pytest.mark.parametrize("n", [3, 0, -2, 16, 1.5])
def test_sizes_that_do_not_fit_are_listed(n: int) -> None:
    model = make_model(n_kv_heads=2)
    with pytest.raises(ValueError, match=r"possible are 1, 2, 4, 8$|expected a whole number"):
        check_model_parallel_size(model.params, n)
