"""The benchmarks measure what they say: the same weights in every format, and honest arithmetic."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from conftest import passed_tokens
from processes import forked

from llama import ModelArgs, parallel
from llama.checkpoint import open_checkpoint
from llama.checkpoint.base import Checkpoint, Weights
from llama.checkpoint.load import load
from llama.checkpoint.sharding import full_shapes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import engines
import expected
import gguf_types
import gpu_engines
import gpu_speed
import gpu_worker
import growth
import plots
import quality
import sampling
import serving
import shapes
import soak
import speed
import targets
import weights


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of several test processes would wait for each other."""
    monkeypatch.setattr(engines, "THREADS", 1)
    monkeypatch.setattr(engines, "REPEATS", 1)


SMALL = ModelArgs(dim=64, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=768, multiple_of=32)


@pytest.mark.parametrize("engine", ["llama", "transformers", "llama.cpp"])
def test_every_engine_gets_the_same_weights(engine: str, tmp_path: Path) -> None:
    tensors = weights.random_weights(SMALL)
    path = tmp_path / ("model.gguf" if engine == "llama.cpp" else "model")
    weights.WRITERS[engine](SMALL, tensors, path)
    found = open_checkpoint(path)
    for name in full_shapes(SMALL):
        read = found.rank_part(name, SMALL, 0, 1)
        assert torch.equal(read.to(torch.bfloat16), tensors[name]), name


def test_a_network_filled_up_with_zeros_is_the_same() -> None:
    """A failure means that types with blocks of 256 are judged on another network."""
    parallel.initialize(torch.device("cpu"))
    args = dataclasses.replace(SMALL, head_dim=24, max_seq_len=32, max_batch_size=1)
    tensors = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(len(name))) * 0.2
        for name, shape in full_shapes(args).items()
    }
    wide, filled = gguf_types.padded(args, tensors)
    assert {size % 256 for size in (wide.dim, wide.hidden_dim, wide.n_heads * 24)} == {0}
    tokens, logits = torch.arange(20)[None], []
    for of, own in ((args, tensors), (wide, filled)):
        whole = Checkpoint("random", {}, [Weights.of(own)], ["random"], torch.float32)
        model = load(whole, of, torch.device("cpu"), torch.float32)
        logits.append(model(tokens, 0))
    assert logits[0].std() > 0.1
    assert torch.allclose(*logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_worker_measures_this_library(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(engines, "PROMPT", 40)
    monkeypatch.setattr(engines, "NEW", 40)  # whose time is far above that of one
    monkeypatch.setattr(engines, "prompt_of", lambda n, seed=0: [seed % 700 + 1] * n)
    threads = torch.get_num_threads()
    weights.write_meta(SMALL, weights.random_weights(SMALL), tmp_path / "model")
    found = engines.measure("llama", str(tmp_path / "model"), start=0.0)
    torch.set_num_threads(threads)
    assert all(value > 0 for value in found.values())
    assert {"products_of_step", "batch_over_one"} <= found.keys()


def test_fractions_and_ratios() -> None:
    """A failure means that the table claims another share of the machine than was reached."""
    # What a token reads and calculates with: all weights but the embedding, of which it is a row.
    args = speed.SHAPES["110M"]
    weights = sum(torch.Size(s).numel() for s in full_shapes(args).values())
    read = weights - 32000 * 768
    found = {"bandwidth": 2 * read * 20.0, "peak": 2 * (read - 32000 * 768) * 400.0}
    ours = {"prefill_tokens_per_s": 100.0, "decode_tokens_per_s": 10.0}
    shares = speed.fractions(args, "bf16", ours, found)
    assert shares == pytest.approx({"of_bandwidth": 0.5, "of_peak": 0.25})
    # A step of int8 reads half as much as one of bfloat16.
    assert speed.fractions(args, "int8", ours, found)["of_bandwidth"] == pytest.approx(0.25)
    # An embedding that is the output is read whole.
    tied = dataclasses.replace(args, tie_word_embeddings=True)
    assert speed.fractions(tied, "bf16", ours, found) == pytest.approx(shares)
    more = {"first_token_s": 1.0, "peak_bytes": 1e9, **shares}
    theirs = {"prefill_tokens_per_s": 50.0, "decode_tokens_per_s": 20.0, **more}
    results = {"machine": "a", "limits": found, "engines": {"llama": {**ours, **more}}}
    results["engines"]["llama.cpp"] = theirs
    lines = speed.table("110M", results).splitlines()
    assert lines[0].startswith("110M, a: read bandwidth")
    assert "| llama | 100 | 0.25 | 10.0 | 0.50 |" in lines[4]
    assert lines[5].endswith("| 2.00 x | 0.50 x |")


def test_targets_are_reached_by_the_kind_of_machine(monkeypatch) -> None:
    """A failure means that a table calls a target reached that isn't, or hides one."""
    speeds = {"prefill_tokens_per_s": 13.0, "decode_tokens_per_s": 10.0}
    measured = {
        "llama": {**speeds, "products_of_step": 0.91, "batch_over_one": 4.99},
        "llama.cpp": {"prefill_tokens_per_s": 1.0, "decode_tokens_per_s": 10.0},
        "transformers": {"prefill_tokens_per_s": 10.0, "decode_tokens_per_s": 1.0},
    }
    rows = {
        amx: [line.strip("| ").split(" | ") for line in targets.table(measured, amx).splitlines()]
        for amx in (True, False)
    }
    assert [row[1:] for row in rows[True][2:]] == [
        ["0.91", "0.93", "no"],
        ["1.00", "1.05", "no"],
        ["1.30", "1.30", "yes"],
        ["4.99", "5.00", "no"],
    ]
    assert [row[3] for row in rows[False][2:]] == ["yes", "yes", "yes", "no"]
    assert not targets.table({"llama.cpp": speeds}, amx=True)
    engine_names = {name for target in targets.TARGETS for name in (target.engine, target.other)}
    assert engine_names - {None} <= weights.WRITERS.keys() & engines.ENGINES.keys()
    units = {"amx_bf16": True, "avx512_bf16": True, "avx2": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units, raising=False)
    assert targets.has_amx() and targets.machine(2).endswith(", AMX")
    units["amx_bf16"] = False
    assert not targets.has_amx()
    assert targets.machine(2).endswith(", AVX-512 with bfloat16, without AMX")


def test_kinds_and_peers_choose_engines(monkeypatch) -> None:
    """A failure means that a part of the measurements is missing or done twice."""
    monkeypatch.setattr(engines, "installed", lambda: [*engines.ENGINES])
    assert speed.select("Q4_0,int4", None) == ["llama Q4_0", "llama.cpp Q4_0", "llama int4"]
    assert speed.select(("Q8_0",), "ctranslate2") == ["llama", "ctranslate2"]
    assert speed.select("bf16", "") == ["llama"]
    monkeypatch.setattr(engines, "installed", lambda: ["llama", "llama int8"])
    assert speed.select("bf16,int8", None) == ["llama", "llama int8"]
    for kinds, peers in (("Q3", None), ("bf16", "vllm")):
        with pytest.raises(ValueError, match="isn't one of"):
            speed.select(kinds, peers)
    for names in speed.KINDS.values():
        assert set(names) <= weights.WRITERS.keys() & engines.ENGINES.keys()


def test_limits_are_measured_around_each_engine(monkeypatch, tmp_path: Path) -> None:
    """A failure means that an engine's share is one of another moment's limits."""
    found = iter([1e9, 3e9, 5e9])
    monkeypatch.setattr(speed, "limits", lambda: {"bandwidth": next(found), "peak": 1e12})
    speeds = {"prefill_tokens_per_s": 1.0, "decode_tokens_per_s": 2.0}
    monkeypatch.setattr(speed, "run_worker", lambda name, path: dict(speeds))
    results = speed.take_turns("110M", ["llama", "llama.cpp"], 1, tmp_path)
    shares = [results["engines"][name]["of_bandwidth"] for name in ("llama", "llama.cpp")]
    assert shares[0] == pytest.approx(2 * shares[1])  # of 2 and of 4 GB/s
    assert results["limits"]["bandwidth"] == 3e9


def test_files_of_an_earlier_run_stay(monkeypatch, tmp_path: Path) -> None:
    """A failure means that each part of a run writes gigabytes, or engines have other weights."""
    monkeypatch.setitem(speed.SHAPES, "small", SMALL)
    monkeypatch.setattr(speed, "print", lambda *_, **__: None, raising=False)
    speed.prepare("small", ["llama BF16"], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama BF16", "llama.cpp"]
    before = (tmp_path / "llama.cpp").stat().st_mtime_ns
    speed.prepare("small", ["llama.cpp", "llama BF16", "llama"], tmp_path)
    assert (tmp_path / "llama.cpp").stat().st_mtime_ns == before
    of_meta, of_file = (open_checkpoint(tmp_path / name) for name in ("llama", "llama BF16"))
    name = "layers.1.attention.wk.weight"
    parts = [each.rank_part(name, SMALL, 0, 1) for each in (of_meta, of_file)]
    assert torch.equal(parts[0], parts[1].to(parts[0].dtype))


def test_a_random_file_has_the_types_of_q4_k_m(tmp_path: Path) -> None:
    """A failure means that memory and loading are measured of a file that nobody has."""
    gguf = pytest.importorskip("gguf")
    llama_cpp = pytest.importorskip("llama_cpp")
    args = ModelArgs(dim=256, n_layers=9, n_heads=4, n_kv_heads=2, vocab_size=320)
    weights.write_q4_k_m(args, tmp_path / "random.gguf")
    written = weights.WRITERS["llama.cpp Q4_K_M"]
    written(args, weights.random_weights(args), tmp_path / "quantised")
    own, theirs = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / name).tensors}
        for name in ("random.gguf", "quantised")
    )
    assert {name: t.tensor_type for name, t in own.items()} == {
        name: t.tensor_type for name, t in theirs.items()
    }
    for name, tensor in own.items():
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert values.std() < 0.2 and (values.std() > 1e-3 or values.ndim == 1), name
    assert llama_cpp.Llama(str(tmp_path / "random.gguf"), verbose=False).n_vocab() == 320


@pytest.mark.slow
def test_growth_is_measured_and_drawn(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(growth, "CONTEXTS", (8, 60))
    monkeypatch.setattr(growth, "RAGGED", (2, 4, 6, 8, 10, 12, 14, 16))
    monkeypatch.setattr(engines, "prompt_of", lambda n, seed=0: [seed % 700 + 1] * n)
    monkeypatch.setattr(growth, "second_turn", lambda llama: (2.0, 0.5))
    threads = torch.get_num_threads()
    weights.write_meta(SMALL, weights.random_weights(SMALL), tmp_path / "model")
    found = growth.measure(str(tmp_path / "model"), rounds=2)
    torch.set_num_threads(threads)
    assert found["batch"].keys() == {"1", "2", "4", "8"}
    assert all(speed_ > 0 for speed_ in found["batch"].values())
    assert found["second_turn_over_first"] == 0.25
    # 60 positions of 2 layers' keys and values in 2 heads of 8, beside all weights but a table
    n_weights = sum(torch.Size(s).numel() for s in full_shapes(SMALL).values()) - 768 * 64
    assert found["context_4096_bound"] == pytest.approx(
        n_weights / (n_weights + 60 * 2 * 2 * 2 * 8)
    )
    assert f"{found['batch_8_over_1']:.2f} x" in growth.table(found)

    engine = {"prefill_tokens_per_s": 100.0, "decode_tokens_per_s": 10.0}
    results = {"engines": {"llama": engine, "llama.cpp": engine}, "growth": found}
    plots.draw_peers(results, tmp_path / "peers.svg")
    plots.draw_growth(results, tmp_path / "growth.svg")
    assert all("<svg" in (tmp_path / f"{n}.svg").read_text() for n in ("peers", "growth"))


def test_a_second_turn_prefills_less(tmp_path: Path, monkeypatch) -> None:
    weights.write_meta(SMALL, weights.random_weights(SMALL), tmp_path / "model")
    threads = torch.get_num_threads()
    llama = engines.Ours(str(tmp_path / "model")).llama
    torch.set_num_threads(threads)
    monkeypatch.setattr(engines, "prompt_of", lambda n, seed=0: [seed % 700 + 1] * n)
    lengths = passed_tokens(llama, monkeypatch)
    growth.second_turn(llama)
    assert lengths == [480, 32]


def test_an_engine_is_compared_with_our_weights_of_as_many_bits() -> None:
    """A failure means that the table's ratios compare eight bits with four."""
    more = {"first_token_s": 1.0, "peak_bytes": 1e9, "of_peak": 0.1, "of_bandwidth": 0.1}

    def speeds(prefill: float, decode: float) -> dict[str, float]:
        return {"prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode, **more}

    results = {
        "machine": "a",
        "limits": {"bandwidth": 1e9, "peak": 1e12},
        "engines": {
            "llama": speeds(1.0, 1.0),
            "llama int8": speeds(6.0, 8.0),
            "ctranslate2": speeds(3.0, 2.0),
            "llama int4": speeds(10.0, 40.0),
            "llama.cpp Q4_0": speeds(5.0, 10.0),
        },
    }
    lines = speed.table("110M", results).splitlines()
    assert lines[6].startswith("| ctranslate2 |")
    assert lines[6].endswith("| 2.00 x | 4.00 x |")
    assert lines[8].endswith("| 2.00 x | 4.00 x |")
    # The same file comes before other weights of as many bits.
    results["engines"]["llama Q4_0"] = speeds(5.0, 5.0)
    assert speed.table("110M", results).splitlines()[8].endswith("| 1.00 x | 0.50 x |")
    del results["engines"]["llama int8"]
    assert speed.table("110M", results).splitlines()[5].endswith("| | |")


@pytest.mark.soak
def test_quality_is_measured(monkeypatch, capsys) -> None:
    monkeypatch.setattr(engines, "installed", lambda: ["llama"])
    quality.main(n_tokens=700, context=128, stride=64)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "700 tokens, context 128, stride 64"
    values = {}
    for line in lines[4:]:
        name, bits, value, _ = (cell.strip() for cell in line.strip("|").split("|"))
        values[name] = float(bits), float(value)
    assert list(values) == list(quality.OURS)
    usual = values["llama"][1]
    assert values["llama int8"][1] == pytest.approx(usual, rel=0.02)
    assert values["llama int4"][1] == pytest.approx(usual, rel=0.2)
    assert values["llama"][0] == 16
    assert values["llama int4, groups of 32"][0] > values["llama int4"][0] > 4.5


@pytest.mark.slow
def test_a_short_soak(capsys) -> None:
    """Five seconds of requests of all kinds, some cancelled or malformed: no wrong answer, no slot
    that stays taken, and an end with status 0."""
    soak.main(seconds=5)
    assert "all slots are free" in capsys.readouterr().out


def test_servers_get_the_same_words(tmp_path: Path) -> None:
    """A prompt has as many tokens as the table says, here and in llama.cpp's vocabulary."""
    from llama import Llama, Tokenizer

    serving.write_vocabulary(1000, tmp_path / "tokenizer.model")
    words = Tokenizer(tmp_path / "tokenizer.model")
    assert words.n_words == 1000
    for number in (0, 5):
        assert len(words.encode(serving.text_of(number, 64), bos=True, eos=False)) == 64
    assert serving.text_of(0, 64) != serving.text_of(1, 64)
    args = ModelArgs(dim=64, n_layers=1, n_heads=8, vocab_size=1000, multiple_of=32)
    serving.write_gguf(args, weights.random_weights(args), tmp_path / "model.gguf")
    llama = Llama.build(tmp_path / "model.gguf", device="cpu")
    ids = llama.tokenizer.encode(serving.text_of(0, 64), bos=True, eos=False)
    assert ids == words.encode(serving.text_of(0, 64), bos=True, eos=False)


def test_servers_are_compared() -> None:
    """A failure means that a table sets another's speed in relation to the slower of ours, or a
    load's figures beside another's."""
    few, many = serving.Load(64, 1), serving.Load(2000, 8)
    ours = serving.Measured(10.0, 0.4, 0.1, 0.25, 2e9)
    faster = ours._replace(tokens_per_s=15.0)
    theirs = serving.Measured(20.0, 0.5, 0.05, 0.06, 3e9)
    lines = serving.table(
        {
            "llama": {few: faster, many: ours},
            "llama, without lookup": {few: ours, many: ours},
            "other": {few: theirs},
        }
    ).splitlines()
    assert lines[4].startswith(
        "| 64 | 1 | other | 20.0 | 0.50 s | 50 ms | 60 ms | 3.00 GB | 0.75 x"
    )
    assert [line.split(" |")[:2] for line in lines[5:]] == 2 * [["| 2,000", " 8"]]


@pytest.mark.slow
def test_a_server_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """A failure means that the benchmark can't start this library's server, or counts its streams
    wrongly."""
    serving.main("1M", servers="llama", streams="1,2", prompts="16", n_tokens=4, repeats=1)
    rows = [line for line in capsys.readouterr().out.splitlines() if "| llama |" in line]
    assert [row.split(" | ")[:2] for row in rows] == [["| 16", "1"], ["| 16", "2"]]
    assert all(float(row.split(" | ")[3]) > 0 and row.endswith("1.00 x |") for row in rows)


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WARM", 2), ("STEPS", 4), ("WINDOWS", 2)):
        monkeypatch.setattr(gpu_engines, name, value)
    monkeypatch.setattr(gpu_worker, "limits", lambda device: {"bandwidth": 1e9, "peak": 1e9})


@pytest.mark.parametrize("engine", ["llama", "transformers"])
def test_an_engine_is_measured_on_a_device(engine: str, short_runs: None) -> None:
    """Prompts that are reused where a prefill is measured, or steps that bring no tokens."""
    found: list[dict] = []
    gpu_worker.measure(engine, "1M", [8, 24], [1, 3], torch.device("cpu"), found.append)
    result = gpu_speed.Result.of(found)
    assert [(cell["batch"], cell["context"]) for cell in result.cells] == [
        (1, 8),
        (1, 24),
        (3, 8),
        (3, 24),
    ]
    for cell in result.cells:
        assert cell["prefill_tokens_per_s"] > 0 and cell["decode_tokens_per_s"] > 0
        assert cell["context"] < cell["filled"] < cell["context"] + 12
    assert len(result.limits) == 2 and result.about["device"] == "CPU"


def test_the_whole_prompt_passes_through_the_network(short_runs: None, monkeypatch) -> None:
    """Where a prefill is measured, the cache holds nothing of the prompt."""
    cpu = torch.device("cpu")
    llama = gpu_engines.build(shapes.SHAPES["1M"], cpu, max_seq_len=200, max_batch_size=2)
    passed = passed_tokens(llama, monkeypatch)
    gpu_engines.Ours(llama, cpu).measure(2, 24)
    assert passed[:4] == [48, 48, 48, 48]
    assert passed[4] == 2  # decoding begins with the prompts in the cache


def test_what_does_not_fit_is_left_out_with_its_reason(short_runs: None) -> None:
    found: list[dict] = []
    cpu = torch.device("cpu")
    gpu_worker.measure("llama", "1M", [8, 1 << 40], [1], cpu, found.append)
    result = gpu_speed.Result.of(found)
    assert [cell["context"] for cell in result.cells] == [8]
    text = gpu_speed.report("1M", {"llama": result})
    assert "batch 1, context 1,099,511,627,776 left out: " in text


def test_fractions_of_a_device_and_targets() -> None:
    args = shapes.SHAPES["7B"]
    # All weights but the embedding; at 16,384 positions keys and values of 32 layers and heads.
    weights = 2 * (sum(torch.Size(s).numel() for s in full_shapes(args).values()) - 32000 * 4096)
    cache = 16384 * 2 * 32 * 32 * 128 * 2
    assert shapes.read_bytes(args) == weights
    assert 16384 * shapes.position_bytes(args) == cache
    # Two operations for each weight and token, four for each of a query's elements and positions.
    per_token = weights - 2 * 32000 * 4096
    attention = 4 * 32 * 4096 * 4096 * 4097 / 2
    flops = per_token * 4096 + 2 * 32000 * 4096 + attention
    assert shapes.prompt_flops(args, 4096) == pytest.approx(flops)

    def result(*cells: tuple[int, int, float, float]) -> gpu_speed.Result:
        names = ("batch", "context", "prefill_tokens_per_s", "decode_tokens_per_s")
        more = {"peak_bytes": 2e10}
        found = [dict(zip(names, cell, strict=True), filled=cell[1], **more) for cell in cells]
        limits = [{"bandwidth": 1e12, "peak": 2e14}, {"bandwidth": 2e12, "peak": 4e14}]
        return gpu_speed.Result(found, limits, [], [], {})

    step = 2e12 / (weights + cache)  # steps per second at the bandwidth
    results = {
        "llama": result((1, 512, 9e3, 100.0), (64, 512, 9e3, 3100.0), (1, 16384, 9e3, 0.75 * step)),
        "llama compiled": result((1, 4096, 0.5 * 4e14 / flops * 4096, 100.0)),
        "llama int4": result((1, 512, 9e3, 170.0)),
    }
    lines = gpu_speed.targets("7B", results).splitlines()
    assert "| llama | the same at 16,384 positions, with the cache | 0.70 | 0.75 | yes |" in lines
    assert "| llama | decoding, batch 64 over batch 1 | 30.00 | 31.00 | yes |" in lines
    prefill = "prefill of 4,096 tokens, of the matrix peak"
    assert f"| llama compiled | {prefill} | 0.60 | 0.50 | no |" in lines
    assert f"| llama | {prefill} | 0.60 | not measured |  |" in lines
    assert "| llama int4 | decoding, batch 1, int4 over bf16 | 1.80 | 1.70 | no |" in lines
    # int4 reads fewer bytes at the same speed.
    cell = results["llama int4"].cells[0]
    plain = gpu_speed.fractions("7B", "llama", results["llama int4"], cell)[1]
    assert gpu_speed.fractions("7B", "llama int4", results["llama int4"], cell)[1] < 0.32 * plain


@pytest.mark.soak
def test_a_device_is_compared_in_one_command() -> None:
    command = [speed.__file__, "--device", "cpu", "--shape", "1M", "--peers", ""]
    command += ["--contexts", "8", "--batches", "1,2"]
    done = forked(*command, "--quantize", "int4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1M in bfloat16, device CPU")
    assert done.stdout.count("| llama int4 | 1 | 8 |") == 1
    assert "| llama int4 | decoding, batch 1, int4 over bf16 | 1.80 | not measured |" in done.stdout
    done = forked(*command, "--quantize", "Q8_0")
    assert done.stdout.count("| llama Q8_0 | 1 | 8 |") == 1, done.stderr


@pytest.mark.parametrize("name", gpu_engines.FILES)
def test_random_weights_have_the_form_of_a_file(name: str) -> None:
    args, form = shapes.SHAPES["18M"], gpu_engines.FILES[name]
    checkpoint = gpu_engines.random_checkpoint(args, torch.device("cpu"), form=form)
    checkpoint.check(args)
    tensors = dict(checkpoint.parts[0])
    assert all(torch.isfinite(tensor.float()).all() for tensor in tensors.values())
    read = [tensor.nbytes for key, tensor in tensors.items() if not key.startswith("tok_")]
    assert shapes.read_bytes(args, form) == sum(read)


def test_an_engine_that_fails_is_named(short_runs: None, monkeypatch) -> None:
    odd = ModelArgs(dim=72, n_layers=1, n_heads=2, vocab_size=1024, multiple_of=8)
    monkeypatch.setitem(shapes.SHAPES, "odd", odd)
    found: list[dict] = []
    with pytest.raises(ValueError, match="group_size"):
        gpu_worker.measure("llama int4", "odd", [8], [1], torch.device("cpu"), found.append)
    assert "llama int4: failed: ValueError" in gpu_speed.report(
        "1M", {"llama int4": gpu_speed.Result.of(found)}
    )


def test_the_documentation_shows_the_expected_speeds() -> None:
    """A failure means that docs/gpu.md promises other speeds than the command."""
    page = Path(__file__).resolve().parent.parent / "docs" / "gpu.md"
    assert expected.table() in page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_draws_are_measured_beside_a_step(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure means that the table of draws can't be made, or leaves a kind out."""
    monkeypatch.setitem(sampling.SHAPES, "tiny", SMALL)
    sampling.main("tiny", n_sequences=6, n_text=20, rounds=1, device="cpu")
    lines = capsys.readouterr().out.splitlines()
    names = [line.split("|")[1].strip() for line in lines[4:]]
    assert names == ["network", "sort", *sampling.KINDS]
    assert all(float(line.split("|")[2]) > 0 for line in lines[4:])
