"""The flags of ``python -m llama.evaluate``: the model's, and lm-eval's own."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from llama.checkpoint.flags import CheckpointFlags
from llama.generation import Llama

_AUTO_BATCH = 32


@dataclass(frozen=True)
class ModelFlags(CheckpointFlags):
    """Flags that say which model is evaluated.

    Args:
        max_seq_len: tokens of a prompt and its answer together, at most; longer texts are read in
            windows of so many.
        batch_size: prompts to process at once, or auto for 32.
        model_parallel_size: where given, must equal the number of processes.
    """

    batch_size: int | str = 8
    model_parallel_size: int | None = None

    def build(self, seed: int) -> Llama:
        """Load the model.

        Raises:
            As ``Llama.build``.
        """
        size, n_ranks = self.batch_size, self.model_parallel_size
        if size != "auto" and not str(size).isdecimal():
            raise ValueError(f"batch_size is {size!r}: expected a whole number or auto")
        n_slots = _AUTO_BATCH if size == "auto" else int(size)
        return Llama.build(
            **self.build_arguments(),
            model_parallel_size=n_ranks,
            max_batch_size=n_slots,
            seed=seed,
        )

    def model_args(self) -> dict[str, Any]:
        """Return the flags that aren't the default, as lm-eval names a model's arguments.

        The batch size and the device are among them, as lm-eval has its own defaults.
        """
        changed = {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        }
        name = changed.pop("ckpt_dir", self.ckpt_dir)
        return {"pretrained": name, "batch_size": self.batch_size, "device": self.device, **changed}


@dataclass(frozen=True)
class HarnessFlags:
    """Flags of lm-eval, which get what its own command gets.

    Args:
        tasks: names of tasks and groups, or files of tasks, separated by commas.
        num_fewshot: examples before each question.
        limit: questions of each task, or a share of them below 1; for trials only.
        samples: the numbers of the questions to ask, by tasks, as JSON.
        apply_chat_template: write prompts in the model's chat format.
        fewshot_as_multiturn: with a chat format, write examples as turns of a dialog.
        system_instruction: a system message.
        include_path: a directory with more tasks.
        gen_kwargs: changes how answers are generated, such as temperature=0.8,do_sample=True.
        output_path: a directory or a JSON file for results.
        log_samples: write all questions and answers beside the results.
        predict_only: write answers and compute no metrics.
        use_cache: a file where answers are kept as they come; with it, an evaluation that was
            ended goes on where it was.
        cache_requests: true to keep prompts for later evaluations; refresh or delete.
        seed: of Python, NumPy, PyTorch (and of answers that are sampled) and of the choice of
            examples: one number or four, separated by commas.
        metadata: more arguments of tasks, name=value.
        write_out: print the first prompts.
        show_config: print the tasks' configurations.
        check_integrity: run the tasks' own tests first.
        trust_remote_code: let data sets run code of their own.
        confirm_run_unsafe_code: run tasks that execute what the model writes.
        wandb_args: arguments of Weights & Biases, name=value.
        wandb_config_args: more of them.
        trackio_args: arguments of Trackio, name=value.
        hf_hub_log_args: arguments for results on the Hugging Face Hub, name=value.
    """

    tasks: str = ""
    num_fewshot: int | None = None
    limit: float | None = None
    samples: str | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = True
    system_instruction: str | None = None
    include_path: str | None = None
    gen_kwargs: str | None = None
    output_path: str | None = None
    log_samples: bool = False
    predict_only: bool = False
    use_cache: str | None = None
    cache_requests: str | None = None
    seed: str | None = None
    metadata: str | None = None
    write_out: bool = False
    show_config: bool = False
    check_integrity: bool = False
    trust_remote_code: bool = False
    confirm_run_unsafe_code: bool = False
    wandb_args: str | None = None
    wandb_config_args: str | None = None
    trackio_args: str | None = None
    hf_hub_log_args: str | None = None

    @property
    def torch_seed(self) -> int:
        """The seed of answers that are sampled."""
        seeds = (self.seed or "1").split(",")
        return int(seeds[2] if len(seeds) > 2 else seeds[0])

    def arguments(self) -> list[str]:
        """Return the command line that lm-eval's own command takes."""
        given = []
        for name, value in vars(self).items():
            if name == "fewshot_as_multiturn":
                if self.apply_chat_template or not value:
                    given.append(f"--{name}={value}")
            elif value is True:
                given.append(f"--{name}")
            elif value not in (None, False, ""):
                given.append(f"--{name}={value}")
        return given
