"""Meta's own directories of Llama 3, 3.1, 3.2 and 3.3: what differs from Llama 2's."""

import json
import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from hf_files import as_transformers
from tiktoken_files import small_pieces, small_tiktoken

from llama import Llama, ModelArgs, Transformer, cli
from llama.checkpoint import inspection
from llama.checkpoint.base import vocabulary_size
from llama.checkpoint.meta import open_meta
from llama.checkpoint.params import make_args
from llama.checkpoint.save import reshard, save
from llama.checkpoint.sharding import full_shapes, parameter_count, rank_part
from llama.convert import convert
from llama.tokenizers.tiktoken import TiktokenTokenizer

IDS = torch.arange(0, 300, 7)[None]
# Meta's params.json of 8B but for the sizes.
PARAMS = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 8,
    "n_kv_heads": 4,
    "vocab_size": 576,
    "ffn_dim_multiplier": 1.3,
    "multiple_of": 32,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
}


def build(path: Path, **more: Any) -> Llama:
    return Llama.build(path, max_seq_len=256, max_batch_size=2, device="cpu", **more)


@torch.inference_mode()
def logits(model: Transformer) -> torch.Tensor:
    return model(IDS, 0)


@pytest.fixture
def llama3_dir(tmp_path: Path) -> Callable[..., Path]:
    """Makes a directory as Meta's download of Llama 3 with a small random checkpoint."""

    def make(name: str = "llama3", scale: float = 1.0, **changes: Any) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        params = {key: v for key, v in {**PARAMS, **changes}.items() if v is not None}
        known = {key: v for key, v in params.items() if key != "use_scaled_rope"}
        tensors = {n: p.detach() for n, p in make_model(**known).named_parameters()}
        for name, tensor in tensors.items():
            tensor *= 1.0 if "norm" in name else scale
        torch.save(tensors, directory / "consolidated.00.pth")
        (directory / "params.json").write_text(json.dumps(params))
        (directory / "tokenizer.model").write_bytes(small_tiktoken())
        return directory

    return make


def cut(directory: Path, n_files: int, by_rows: bool, name: str = "cut") -> Path:
    """The directory's weights in several files, the embedding cut by rows or by columns."""
    target = directory.parent / name
    reshard(str(directory), str(target), model_parallel_size=n_files)
    if by_rows:
        whole = torch.load(directory / "consolidated.00.pth")["tok_embeddings.weight"]
        for path, rows in zip(sorted(target.glob("*.pth")), whole.chunk(n_files), strict=True):
            torch.save({**torch.load(path), "tok_embeddings.weight": rows.clone()}, path)
    return target


class TestCuts:
    """Llama 3's files have rows of the embedding, Llama 2's have columns."""

    @pytest.mark.parametrize("by_rows", [True, False])
    @pytest.mark.parametrize("n_files", [2, 4, 8])
    def test_both_give_the_same_logits(self, llama3_dir, n_files: int, by_rows: bool) -> None:
        """A failure means that every token is another one, or an error."""
        whole = llama3_dir()
        parts = cut(whole, n_files, by_rows)
        shape = torch.load(parts / "consolidated.00.pth")["tok_embeddings.weight"].shape
        assert shape == ((576 // n_files, 64) if by_rows else (576, 64 // n_files))
        assert torch.equal(logits(build(parts).model), logits(build(whole).model))
        assert vocabulary_size(open_meta(parts)) == 576

    @pytest.mark.parametrize("by_rows", [True, False])
    def test_a_square_piece_is_decided_by_the_width(self, llama3_dir, by_rows: bool) -> None:
        """A failure means that files are joined in the wrong direction where both would fit."""
        if by_rows:  # 9 files of (64, 64)
            whole = torch.randn(576, 64)
            pieces, args = whole.chunk(9), ModelArgs(**PARAMS)
        else:  # 9 files of (64, 64) too, of a network 576 wide with 64 tokens
            whole = torch.randn(64, 576)
            pieces = whole.chunk(9, dim=1)
            args = ModelArgs(**{**PARAMS, "dim": 576, "vocab_size": 64})
        assert all(piece.shape == (64, 64) for piece in pieces)
        assert torch.equal(rank_part("tok_embeddings.weight", pieces, args, 0, 1), whole)

    @pytest.mark.parametrize("by_rows", [True, False])
    @pytest.mark.parametrize("ranks", [1, 2, 4, 8])
    def test_any_number_of_processes_reads_them(
        self, llama3_dir, ranks: int, by_rows: bool
    ) -> None:
        """A failure means that a rank holds another rank's part of a weight."""
        whole = open_meta(llama3_dir())
        parts = open_meta(cut(llama3_dir("other"), 2, by_rows))
        args = make_args(whole.params, whole.source, 576)
        for name in full_shapes(args):
            for rank in range(ranks):
                expected = whole.rank_part(name, args, rank, ranks)
                assert torch.equal(parts.rank_part(name, args, rank, ranks), expected), name

    @pytest.mark.parametrize("by_rows", [True, False])
    def test_missing_files_are_named(self, llama3_dir, by_rows: bool) -> None:
        """A failure means a puzzling error about shapes in place of the missing file's name."""
        parts = cut(llama3_dir(), 4, by_rows)
        for number in (3, 2, 1):
            (parts / f"consolidated.0{number}.pth").unlink()
            with pytest.raises(FileNotFoundError, match=rf"has {number} of 4 .*0{number}\.pth is"):
                build(parts)

    @pytest.mark.parametrize("target", ["meta", "hf"])
    def test_they_are_written_in_any_format(self, llama3_dir, target: str) -> None:
        """A failure means that a converted checkpoint has other weights, or no tokenizer."""
        whole = llama3_dir(use_scaled_rope=True)
        parts = cut(whole, 2, by_rows=True)
        out = whole.parent / "out"
        convert(str(parts), str(out), target)
        found, expected = build(out), build(whole)
        assert torch.equal(logits(found.model), logits(expected.model))
        assert (out / "tokenizer.model").read_bytes() == small_tiktoken()
        text = "the cow and\n\nthe user 012"
        ids = expected.tokenizer.encode(text, bos=True, eos=False)
        assert found.tokenizer.encode(text, bos=True, eos=False) == ids
        assert found.tokenizer.stop_ids == expected.tokenizer.stop_ids
        assert found.chat.name == expected.chat.name == "llama3"
        back = whole.parent / "back"
        convert(str(out), str(back), "meta", model_parallel_size=4)
        assert torch.equal(logits(build(back).model), logits(expected.model))
        assert json.loads((back / "params.json").read_text())["use_scaled_rope"] is True


LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}


@torch.inference_mode()
def difference(model: Transformer, factor: float | None) -> float:
    """The distance of logits from transformers' with a factor, in parts of the largest."""
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    if factor:
        rope = {**LLAMA3, "factor": factor}
    reference = as_transformers(
        model,
        rope_parameters=rope,
        head_dim=model.params.head_dim,
        max_position_embeddings=131072,
    )
    expected = reference(IDS).logits
    found = (logits(model) - expected).abs().max() / expected.abs().max()
    return float(found)


class TestScaledRope:
    """``use_scaled_rope``, which has no factor."""

    @pytest.mark.parametrize("scaled", [True, False, None])
    def test_it_is_llama_31s(self, llama3_dir, scaled: bool | None) -> None:
        """A failure means that positions beyond the first are turned by wrong angles."""
        # Wide heads have waves of all lengths.
        shape = {"n_heads": 2, "n_kv_heads": 1, "dim": 128}
        model = build(llama3_dir(use_scaled_rope=scaled, **shape)).model
        right, wrong = (8.0, 32.0) if scaled else (None, 8.0)
        assert difference(model, right) < 1e-5
        assert difference(model, wrong) > 1e-3

    @pytest.mark.parametrize(("dim", "n_layers"), [(2048, 16), (3072, 28)])
    def test_the_shape_tells_llama_32s(self, llama3_dir, dim: int, n_layers: int) -> None:
        """A failure means that Llama 3.2's 1B or 3B is run with 3.1's factor."""
        shape = {"dim": dim, "n_layers": n_layers, "n_heads": 1, "n_kv_heads": 1, "head_dim": 64}
        # Smaller weights: so many layers of large ones multiply any rounding.
        path = llama3_dir(scale=0.2, use_scaled_rope=True, hidden_dim=32, **shape)
        model = build(path).model
        assert difference(model, 32.0) < 1e-4
        assert difference(model, 8.0) > 1e-3

    def test_hugging_faces_config_has_it(self, llama3_dir) -> None:
        """A failure means that transformers reads the converted model without its scaling."""
        path = llama3_dir(use_scaled_rope=True)
        convert(str(path), str(path.parent / "hf"), "hf")
        config = json.loads((path.parent / "hf" / "config.json").read_text())
        expected = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
        assert config["rope_scaling"] == {**expected, "factor": 8.0}
        assert (config["rope_theta"], config["max_position_embeddings"]) == (500000.0, 131072)
        n = len(small_pieces())
        assert (config["bos_token_id"], config["eos_token_id"]) == (n, [n + 1, n + 8, n + 9])

    def test_llama_3_itself_was_trained_on_8192_tokens(self, llama3_dir) -> None:
        """A failure means that a converted model claims another length."""
        path = llama3_dir()
        convert(str(path), str(path.parent / "hf"), "hf")
        config = json.loads((path.parent / "hf" / "config.json").read_text())
        assert (config["rope_scaling"], config["max_position_embeddings"]) == (None, 8192)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"use_scaled_rope": 1}, "use_scaled_rope is 1 in .*: expected true or false"),
            (
                {"use_scaled_rope": True, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
                "has use_scaled_rope and rope_scaling: remove one",
            ),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, llama3_dir, changes: dict, message: str) -> None:
        """A failure means that a wrong value is taken for a guess."""
        path = llama3_dir()
        (path / "params.json").write_text(json.dumps({**PARAMS, **changes}))
        with pytest.raises(ValueError, match=message):
            build(path)


@pytest.mark.parametrize("n_files", [1, 2])
def test_a_file_with_one_tensor_as_embedding_and_output_is_tied(llama3_dir, n_files: int) -> None:
    """A failure means that Llama 3.2's 1B takes a fifth more memory than its file has."""
    path = llama3_dir()
    whole = torch.load(path / "consolidated.00.pth")
    whole["output.weight"] = whole["tok_embeddings.weight"]
    expected = logits(build(path).model)
    torch.save(whole, path / "consolidated.00.pth")
    parts = path
    if n_files > 1:
        parts = cut(llama3_dir("untied"), n_files, by_rows=True)
        for file, rows in zip(
            sorted(parts.glob("*.pth")), whole["output.weight"].chunk(n_files), strict=True
        ):
            tied = {"tok_embeddings.weight": rows.clone()}
            tied["output.weight"] = tied["tok_embeddings.weight"]
            torch.save({**torch.load(file), **tied}, file)
    model = build(parts).model
    assert model.params.tie_word_embeddings
    assert model.output.weight.data_ptr() == model.tok_embeddings.weight.data_ptr()
    assert not torch.equal(logits(model), expected)
    # The same as two tensors of equal values.
    apart = llama3_dir("apart")
    whole["output.weight"] = whole["output.weight"].clone()
    torch.save(whole, apart / "consolidated.00.pth")
    assert not build(apart).model.params.tie_word_embeddings
    assert torch.equal(logits(build(apart).model), logits(model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_args": {"group_size": 256}}, "quantization_args, .* weights of four bits"),
        ({"lora_args": {"rank": 16, "scale": 2.0}}, "lora_args, .* weights of four bits for Exec"),
        ({"vision_chunk_size": 448}, "vision_chunk_size, which describes a model that sees image"),
        ({"moe_args": {"num_experts": 16}}, "moe_args, which describes a mixture of experts"),
        ({"rope_freq_base": 500000.0}, "unknown key 'rope_freq_base'"),
    ],
)
def test_metas_other_models_are_named(llama3_dir, changes: dict, message: str) -> None:
    """A failure means that another network is run, or refused without saying what it is."""
    path = llama3_dir()
    (path / "params.json").write_text(json.dumps({**PARAMS, **changes}))
    with pytest.raises(ValueError, match=message):
        build(path)


def test_weights_of_eight_bits_are_refused(llama3_dir) -> None:
    """A failure means that codes are used as weights, without their scales."""
    path = llama3_dir()
    (path / "fp8_scales_0.pt").touch()
    with pytest.raises(ValueError, match=r"fp8_scales_0\.pt belongs to weights of eight bits"):
        build(path)


def test_the_tokenizer_may_lie_in_the_parent_or_be_given(llama3_dir, tmp_path: Path) -> None:
    """A failure means that a tokenizer in the usual places isn't found."""
    path = llama3_dir()
    (path / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    assert isinstance(build(path).tokenizer, TiktokenTokenizer)
    shutil.move(tmp_path / "tokenizer.model", tmp_path / "other.model")
    assert isinstance(
        build(path, tokenizer_path=tmp_path / "other.model").tokenizer, TiktokenTokenizer
    )


def test_a_larger_tokenizer_than_the_embedding_is_refused(llama3_dir) -> None:
    """A failure means that ids beyond the embedding reach the network."""
    path = llama3_dir(vocab_size=256)
    with pytest.raises(ValueError, match="another model's tokenizer"):
        build(path)


def test_saving_a_model_keeps_the_tokenizer(llama3_dir, tmp_path: Path) -> None:
    """A failure means that a saved checkpoint can't be built."""
    llama = build(llama3_dir(use_scaled_rope=True))
    files = {"tokenizer.model": small_tiktoken()}
    save([llama.model.state_dict()], llama.model.params, tmp_path / "saved", 2, files)
    saved = build(tmp_path / "saved")
    assert isinstance(saved.tokenizer, TiktokenTokenizer)
    assert torch.equal(logits(saved.model), logits(llama.model))


def test_answers_are_held_to_a_schema(llama3_dir) -> None:
    """A failure means that a grammar masks other tokens than its pieces' ids."""
    pytest.importorskip("llguidance")
    dialog = [{"role": "user", "content": "the cow"}]
    schema = {"name": "animal", "schema": {"enum": ["the cow", "日本"]}}
    form = {"type": "json_schema", "json_schema": schema}
    found = build(llama3_dir()).chat_completion([dialog], temperature=0, response_format=form)
    assert json.loads(found[0]["generation"]["content"]) in schema["schema"]["enum"]


@pytest.mark.parametrize("name", ["example_chat_completion", "example_text_completion"])
def test_examples_run(llama3_dir, capsys, name: str) -> None:
    """A failure means that Llama 3's directories can't be tried out."""
    path = llama3_dir(use_scaled_rope=True)
    example = Path(__file__).parents[2] / "examples" / f"{name}.py"
    flags = ["--ckpt_dir", str(path), "--max_seq_len", "512", "--max_gen_len", "4"]
    cli.run(runpy.run_path(str(example))["main"], name, flags)
    assert re.search(r"\n> ", capsys.readouterr().out)


# Meta's params.json, and the parameters that the model cards give.
PUBLISHED = {
    "Llama 3.1 8B": (4096, 32, 32, 1.3, 1024, False, 8_030_261_248),
    "Llama 3.1 or 3.3 70B": (8192, 80, 64, 1.3, 4096, False, 70_553_706_496),
    "Llama 3.1 405B": (16384, 126, 128, 1.2, 4096, False, 405_853_388_800),
    "Llama 3.2 1B": (2048, 16, 32, 1.5, 256, True, 1_235_814_400),
    "Llama 3.2 3B": (3072, 28, 24, 1.0, 256, True, 3_212_749_824),
}


def published_args(name: str, scaled: bool = True) -> ModelArgs:
    dim, n_layers, n_heads, multiplier, multiple_of, is_tied, _ = PUBLISHED[name]
    return ModelArgs(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=8,
        vocab_size=128256,
        ffn_dim_multiplier=multiplier,
        multiple_of=multiple_of,
        rope_theta=500000.0,
        rope_scaling={"rope_type": "llama3"} if scaled else None,
        tie_word_embeddings=is_tied,
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_their_parameters_and_names(name: str) -> None:
    """A failure means that memory and downloads are planned for another model."""
    args = published_args(name)
    assert parameter_count(args) == PUBLISHED[name][-1]
    assert inspection.identify(Path("somewhere"), args, None) == name
    if name in ("Llama 3.1 8B", "Llama 3.1 or 3.3 70B"):
        args = published_args(name, scaled=False)
        assert inspection.identify(Path("x"), args, None) == f"Llama 3 {name.split()[-1]}"


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("8b_instruction_tuned", "Llama 3.1 8B"),
        ("Llama-3.1-8B-Instruct", "Llama 3.1 8B"),
        ("Meta-Llama-3.1-405B-MP16", "Llama 3.1 405B"),
        ("Llama3.2-1B", "Llama 3.2 1B"),
        ("Llama-3.3-70B-Instruct", "Llama 3.1 or 3.3 70B"),
    ],
)
def test_published_folders_are_named(folder: str, name: str) -> None:
    """A failure means that a folder's own name is left out of the description."""
    found = inspection.identify(Path(folder), published_args(name), None)
    assert found == f"{folder} by its folder's name ({name.split()[-1]} by its shape)"
