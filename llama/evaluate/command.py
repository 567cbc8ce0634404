"""The command ``python -m llama.evaluate``: lm-eval's own, run on a ``Llama``, and code tasks."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llama.errors import need
from llama.evaluate.code import FLAGS, TASKS, CodeFlags, evaluate_code
from llama.evaluate.flags import HarnessFlags, ModelFlags
from llama.server.workers import Workers, run_worker


def main(model: ModelFlags, *, harness: HarnessFlags, code: CodeFlags = FLAGS) -> None:
    """Evaluate a model on tasks of lm-eval, or on those in which it writes programs.

    Prints a table of the results; --output_path keeps them in a file.
    """
    if not harness.tasks:
        raise ValueError("--tasks is missing: give names of tasks, separated by commas")
    names = harness.tasks.split(",")
    programs = [name for name in names if name in TASKS]
    if programs:
        if others := [name for name in names if name not in TASKS]:
            raise ValueError(
                f"--tasks has {others[0]} beside {programs[0]}, which isn't lm-eval's: evaluate "
                "them one after the other"
            )
        limit = None if harness.limit is None else int(harness.limit)
        path = harness.output_path
        evaluate_code(lambda: model.build(harness.torch_seed), programs, code, limit, path)
        return
    if os.environ.get("RANK", "0") != "0":
        run_worker(model.build(seed=0), streams=False)
        return
    need("llama.evaluate.harness", "evaluate", "evaluation")
    command = need("lm_eval.__main__", "evaluate", "evaluation")
    flags = {**vars(harness)}
    if harness.use_cache:
        flags["use_cache"] = f"{harness.use_cache}_{fingerprint(model)}"
    model_args = json.dumps(model.model_args())
    arguments = ["run", "--model=llama", f"--model_args={model_args}"]
    arguments.append(f"--batch_size={model.batch_size}")  # for the results' heading
    with _command_line("lm-eval", *arguments, *HarnessFlags(**flags).arguments()):
        try:
            command.cli_evaluate()
        finally:
            with suppress(RuntimeError):  # the model isn't built, or a rank is gone
                Workers().stop()


def fingerprint(model: ModelFlags) -> str:
    """Return a short text that is another one where another model would answer.

    It is made of the flags, and of the names, sizes and times of the checkpoint's files.
    """
    files: list[object] = []
    paths = [model.ckpt_dir, model.tokenizer_path, model.chat_template]
    paths += [model.adapter] if isinstance(model.adapter, str) else model.adapter
    for path in [Path(path) for path in paths if path]:
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        stats = [(each.name, each.stat()) for each in found if each.is_file()]
        files += [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    flags = vars(model) | {"batch_size": None, "model_parallel_size": None}
    text = json.dumps([flags, files], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@contextmanager
def _command_line(*words: str) -> Iterator[None]:
    """Let the block see another command line in ``sys.argv``."""
    before, sys.argv = sys.argv, [*words]
    try:
        yield
    finally:
        sys.argv = before
