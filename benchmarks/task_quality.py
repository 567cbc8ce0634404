"""The cost of quantisation on tasks: what a model answers, and how sure it is, by its weights.

    python benchmarks/task_quality.py           # the embedded model
    python benchmarks/task_quality.py --task lines CKPT

All start from the checkpoint's weights in bfloat16, but for a quantised file as it is. Besides the
accuracy the table has how many of the answers are others than with bfloat16, and by how much the
log-likelihoods of all choices differ on average: few questions tell little, and these tell more.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from quality import OURS

from llama import Llama, cli
from llama.checkpoint import open_checkpoint
from llama.convert import convert
from llama.generation import TINY

TASKS = Path(__file__).parent.parent / "tests" / "data" / "tasks"
# How a model is asked.
OPTIONS: dict[str, dict[str, Any]] = {
    "animals": {"apply_chat_template": True},
    "capitals": {"num_fewshot": 5},
    "lines": {},
}


def evaluated(llama: Llama, task: str, limit: int | None, **options: Any) -> tuple[float, Any]:
    """Return a task's accuracy, and the log-likelihoods of all choices, (n_questions, 4)."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from llama.evaluate.harness import LlamaLM

    results = simple_evaluate(
        LlamaLM(llama),
        tasks=[task],
        limit=limit,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        **options,
    )
    samples = results["samples"][task]
    scores = [[answer[0][0] for answer in sample["resps"]] for sample in samples]
    return results["results"][task]["acc,none"], torch.tensor(scores)


def main(
    ckpt: str = str(TINY), task: str | None = None, limit: int | None = None, threads: int = 2
) -> None:
    """Print a table of a task's accuracy.

    Args:
        ckpt: a checkpoint of any format.
        task: animals, capitals or lines; by default one that the checkpoint is likely to know.
        limit: questions.
        threads: of the processor.
    """
    torch.set_num_threads(threads)
    task = task or ("animals" if ckpt == str(TINY) else "capitals")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model"
        convert(ckpt, str(path), dtype="bfloat16")
        builds = {name: (str(path), build) for name, build in OURS.items()}
        if open_checkpoint(Path(ckpt)).forms:
            builds["as the file is"] = ckpt, {}
        print(f"| weights | {task}: accuracy | other answers | difference of log-likelihoods |")
        print("|---|---|---|---|")
        for name, (source, build) in builds.items():
            llama = Llama.build(
                source, max_seq_len=1024, device="cpu", dtype=torch.bfloat16, **build
            )
            accuracy, scores = evaluated(llama, task, limit, **OPTIONS[task])
            if name == "llama":
                usual = scores
            others = float((scores.argmax(1) != usual.argmax(1)).float().mean())
            apart = float((scores - usual).abs().mean())
            print(f"| {name} | {accuracy:.3f} | {others:.1%} | {apart:.3f} |", flush=True)


if __name__ == "__main__":
    cli.run(main)
