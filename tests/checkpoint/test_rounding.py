"""How int4 is rounded: which weights get more bits, how well groups fit, and what a text brings."""

from pathlib import Path

import pytest
import torch
from conftest import make_model

from llama import Llama, ModelArgs
from llama.checkpoint import open_checkpoint
from llama.checkpoint.base import Checkpoint, Weights
from llama.checkpoint.calibration import WINDOW, calibrated, round_calibrated
from llama.checkpoint.rounding import Scheme, fit_groups, make_scheme, round_groups, round_weight
from llama.checkpoint.save import reshard, save
from llama.checkpoint.sharding import parameter_count, stored_bytes
from llama.convert import convert
from llama.generation import TINY
from llama.layers.quantization import Grouped, Rotated

SMALL = ModelArgs(dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, vocab_size=32000)
LARGE = ModelArgs(dim=4096, n_layers=32, n_heads=32, vocab_size=32000)
TIED = ModelArgs(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, vocab_size=128256,
                 tie_word_embeddings=True)  # fmt: skip


class TestMixedForms:
    """A failure means that int4 is larger than the format that people use, or worse than it is."""

    # Bits of Q4_K_M, as llama.cpp divides these networks' weights among Q4_K and Q6_K.
    @pytest.mark.parametrize(("args", "bits"), [(SMALL, 4.852), (LARGE, 4.845), (TIED, 5.13)])
    def test_they_have_as_many_bits_as_q4_k_m_at_most(self, args: ModelArgs, bits: float) -> None:
        forms = make_scheme("int4").forms(args)
        stored = 8 * stored_bytes(args, torch.bfloat16, forms) / parameter_count(args)
        assert bits - (0.2 if args.tie_word_embeddings else 0.01) < stored <= bits

    def test_the_output_and_the_values_come_first(self) -> None:
        forms = make_scheme("int4").forms(SMALL)
        assert forms["output"] == Rotated()
        assert forms["tok_embeddings"] == forms["layers.3.attention.wq"] == Grouped()
        assert all(forms[f"layers.{i}.attention.wv"].group_size == 32 for i in range(22))
        smaller = [forms[f"layers.{i}.feed_forward.w2"].group_size for i in range(22)]
        assert smaller == sorted(smaller) and {*smaller} == {32, 64}  # as far as bits are left

    def test_a_group_size_that_is_given_is_that_of_all_weights(self) -> None:
        assert {*make_scheme("int4", 64).forms(SMALL).values()} == {Grouped()}

    def test_a_network_without_a_head(self) -> None:
        args = ModelArgs(dim=64, n_layers=2, n_heads=2, vocab_size=64, labels=[])
        assert "output" not in make_scheme("int4").forms(args)


def error(form: Grouped, weight: torch.Tensor) -> float:
    stored = round_weight(form, weight)
    return float((form.dequantize(stored) - weight).square().sum() / weight.square().sum())


class TestGroups:
    # Of normally distributed weights; nine ranges of equal steps gave 0.00497 and 0.00672.
    @pytest.mark.parametrize(("size", "most"), [(32, 0.00497), (64, 0.00672)])
    def test_their_error(self, size: int, most: float) -> None:
        """A failure means that models lose quality: the search of ranges has become worse."""
        torch.manual_seed(0)
        assert error(Grouped(group_size=size), torch.randn(256, 1024)) < most

    def test_ranges_are_what_the_best_codes_have(self) -> None:
        """A failure means that weights on a grid of 16 levels change."""
        torch.manual_seed(0)
        codes = torch.randint(0, 16, (64, 100)).float()
        codes[0], codes[1] = 0, 15
        groups = (codes - 8) * 0.25 + 3
        scales, zeros = fit_groups(groups)
        assert torch.equal(round_groups(groups, scales, zeros), codes)
        assert torch.equal(scales, torch.full((100,), 0.25))

    @pytest.mark.parametrize("value", [0.0, 3.5, -1e-12, 1e9, 1e-30])
    def test_equal_weights(self, value: float) -> None:
        """A failure means codes of NaN where a row of a table is constant."""
        weight = torch.full((3, 64), value)
        back = Grouped().dequantize(round_weight(Grouped(), weight))
        assert torch.allclose(back, weight, rtol=2**-8, atol=1e-28)

    @pytest.mark.parametrize("shape", [(70, 2048), (1001, 192), (6007, 128)])
    def test_threads_and_parts_of_rows_change_nothing(self, shape: tuple[int, int]) -> None:
        """A failure means that a rank, or a machine with more cores, rounds to other codes."""
        torch.manual_seed(0)
        weight, form = torch.randn(shape).bfloat16(), Grouped()
        n_threads = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            with torch.inference_mode():
                whole = round_weight(form, weight)
            assert torch.get_num_threads() == 3
            torch.set_num_threads(1)
            parts = [round_weight(form, part) for part in weight.split(64, dim=1)]
        finally:
            torch.set_num_threads(n_threads)
        for name, tensor in whole.items():
            assert torch.equal(tensor, torch.cat([part[name] for part in parts], dim=1))


def correlated_inputs(n_tokens: int, width: int) -> torch.Tensor:
    return torch.randn(n_tokens, width // 8) @ torch.randn(width // 8, width)


class TestCalibration:
    def test_outputs_for_the_text_change_less(self) -> None:
        """A failure means that calibration doesn't do what it takes minutes for."""
        torch.manual_seed(0)
        weight, x = torch.randn(96, 256), correlated_inputs(2048, 256)
        form = Grouped()
        usual = form.dequantize(round_weight(form, weight))
        stored = round_calibrated(form, weight, x.t() @ x)
        assert {name: part.dtype for name, part in stored.items()} == form.dtypes()
        assert {name: tuple(part.shape) for name, part in stored.items()} == form.shapes(96, 256)
        errors = [((w - weight) @ x.t()).square().sum() for w in (form.dequantize(stored), usual)]
        assert errors[0] < 0.3 * errors[1]

    def test_inputs_that_are_always_zero(self) -> None:
        """A failure means that a text that leaves an input unused can't be calibrated with."""
        weight = torch.randn(8, 64)
        stored = round_calibrated(Grouped(), weight, torch.zeros(64, 64))
        assert torch.equal(stored["weight"], round_weight(Grouped(), weight)["weight"])

    def test_inputs_that_are_not_finite(self) -> None:
        with pytest.raises(ValueError, match="aren't finite"):
            round_calibrated(Grouped(), torch.randn(8, 64), torch.full((64, 64), torch.nan))

    def test_each_block_is_rounded_for_its_own_inputs(self) -> None:
        """A failure means that a block is calibrated with another's weights or inputs."""
        torch.manual_seed(0)
        model = make_model(dim=64, n_layers=2, n_heads=2, max_seq_len=WINDOW, max_batch_size=1)
        weights = {name: part.detach() for name, part in model.named_parameters()}
        before = {name: part.clone() for name, part in weights.items()}
        source = Checkpoint("test", {}, [Weights.of(weights)], ["test"], torch.float32)
        tokens = torch.randint(0, model.params.vocab_size, (2 * WINDOW + 7,)).tolist()
        done: list[int] = []
        scheme = Scheme(Grouped(group_size=32))
        result = calibrated(source, model.params, scheme, tokens, done.append)
        assert done[-1] == sum(p.numel() for n, p in weights.items() if p.dim() == 2)
        assert all(torch.equal(part, before[name]) for name, part in weights.items())
        # The second block's inputs are outputs of the first, as it is rounded.
        form = Grouped(group_size=32)
        for name, part in model.named_parameters():
            module = name.rpartition(".")[0]
            if module.startswith("layers.0") and part.dim() == 2:
                names = form.dtypes()
                stored = {each: result.parts[0][f"{module}.{each}"] for each in names}
                part.data.copy_(form.dequantize(stored))
            elif module == "tok_embeddings":
                part.data.copy_(form.dequantize(round_weight(form, part.data)))
        total = torch.zeros(64, 64)
        layer = model.layers[1].attention.wq
        layer.adapted = lambda x, out: (total.addmm_(x.t(), x), out)[1]
        for window in torch.tensor(tokens[: 2 * WINDOW]).view(2, WINDOW):
            model(window[None], 0)
        expected = round_calibrated(form, before["layers.1.attention.wq.weight"], total)
        ours = result.parts[0]["layers.1.attention.wq.weight"]
        assert (ours == expected["weight"]).float().mean() > 0.98  # sums have another order

    def test_convert_takes_a_text(self, tmp_path: Path) -> None:
        """A failure means that ``--calibrate`` writes what isn't a checkpoint, or isn't better."""
        text = tmp_path / "text.txt"
        text.write_text(" ".join(f"The {w} is big and the cow says moo." for w in "abcdef" * 40))
        convert(str(TINY), str(tmp_path / "out"), quantize="int4", calibrate=str(text))
        found = open_checkpoint(tmp_path / "out")
        assert found.forms.keys() == make_scheme("int4").forms(Llama.build().model.params).keys()
        usual, llama = (Llama.build(p, dtype=torch.float32) for p in (TINY, tmp_path / "out"))
        rounded = Llama.build(dtype=torch.float32, quantize="int4")
        ids = torch.tensor([llama.tokenizer.encode(text.read_text(), True, False)[:300]])
        expected = usual.model(ids, 0)
        errors = [(each.model(ids, 0) - expected).square().mean() for each in (llama, rounded)]
        assert errors[0] < 0.8 * errors[1]

    def test_mistakes(self, tmp_path: Path) -> None:
        """A failure means that a mistake is found after minutes, or by a traceback."""
        out, text = str(tmp_path / "out"), tmp_path / "text"
        text.write_text("Too short.")
        with pytest.raises(ValueError, match="calibrate is for --quantize int4"):
            convert(str(TINY), out, quantize="int8", calibrate=str(text))
        with pytest.raises(ValueError, match="tokens: give one of at least 512"):
            convert(str(TINY), out, quantize="int4", calibrate=str(text))
        with pytest.raises(FileNotFoundError, match="no text at"):
            convert(str(TINY), out, quantize="int4", calibrate=str(tmp_path / "missing"))


class TestConvertingQuantisedCheckpoints:
    """A failure means that a quantised file can't be kept, divided or made plain again."""

    FORMS = (
        Grouped(group_size=32),
        Grouped("int8", 32, has_zeros=False, scale_dtype=torch.float16),
        Grouped("int4", 16, scale_dtype=torch.float32),
        Grouped("float8", 0, has_zeros=False, scale_dtype=torch.float32),
        Rotated(),
    )

    def source(self, path: Path) -> dict[str, torch.Tensor]:
        """Write a checkpoint whose weights have different forms; return it in float32."""
        torch.manual_seed(0)
        model = make_model(dim=128, n_layers=2, n_heads=4, vocab_size=768, multiple_of=64)
        tensors, forms, plain = {}, {}, {}
        for n, (name, part) in enumerate(model.named_parameters()):
            module = name.removesuffix(".weight")
            if part.dim() == 1 or "tok" in name:
                tensors[name] = plain[name] = part.detach().bfloat16()
                continue
            form = forms[module] = self.FORMS[n % len(self.FORMS)]
            stored = {
                key: torch.randint(0, 50, shape).to(form.dtypes()[key])
                for key, shape in form.shapes(*part.shape).items()
            }
            for key in stored.keys() - {"weight"}:
                stored[key] = torch.rand(stored[key].shape).to(stored[key].dtype)
            tensors |= {f"{module}.{key}": tensor for key, tensor in stored.items()}
            plain[name] = form.dequantize(stored, form.block_size(part.shape[1]))
        files = {"tokenizer.model": TINY / "tokenizer.model"}
        save([tensors], model.params, path, files=files, forms=forms)
        return plain

    def test_to_this_librarys_own(self, tmp_path: Path) -> None:
        self.source(tmp_path / "mixed")
        convert(str(tmp_path / "mixed"), str(tmp_path / "two"), model_parallel_size=2)
        reshard(str(tmp_path / "two"), str(tmp_path / "one"))
        first, last = (open_checkpoint(tmp_path / name) for name in ("mixed", "one"))
        assert last.forms == first.forms
        assert last.parts[0].keys() == first.parts[0].keys()
        for name in first.parts[0]:
            assert last.parts[0][name].dtype == first.parts[0][name].dtype
            assert torch.equal(
                last.parts[0][name].view(torch.uint8), first.parts[0][name].view(torch.uint8)
            )

    def test_to_half_precision(self, tmp_path: Path) -> None:
        plain = self.source(tmp_path / "mixed")
        convert(str(tmp_path / "mixed"), str(tmp_path / "bf16"), dtype="bfloat16")
        found = open_checkpoint(tmp_path / "bf16")
        assert not found.forms
        for name, weight in plain.items():
            assert torch.equal(found.parts[0][name], weight.bfloat16())

    def test_to_hugging_faces(self, tmp_path: Path) -> None:
        plain = self.source(tmp_path / "mixed")
        convert(str(tmp_path / "mixed"), str(tmp_path / "hf"), to="hf", dtype="float32")
        found = open_checkpoint(tmp_path / "hf")
        assert not found.forms
        for name, weight in plain.items():
            assert torch.equal(found.parts[0][name], weight.float())
