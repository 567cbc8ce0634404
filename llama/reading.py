"""The tasks that read texts and write none: vectors and classes."""

from collections.abc import Callable, Sequence

import torch

from llama.base import BaseLlama, check_not_empty
from llama.decoding import checked_prompts
from llama.errors import checked_list
from llama.pooling import label_scores, last_logits, pool
from llama.predictions import Classification


class ReadingLlama(BaseLlama):
    """A model that reads."""

    def embed(self, texts: Sequence[str], pooling: str = "mean") -> torch.Tensor:
        """Vectors of texts: the network's last hidden states.

        Args:
            texts: of any number and lengths up to ``max_seq_len`` tokens.
            pooling: ``"mean"`` over a text's tokens, or the ``"last"`` one's.

        Returns:
            float32, shape (len(texts), dim); not normalised.

        Raises:
            TypeError, ValueError: an argument is wrong, or a text doesn't fit.
            RuntimeError: as in ``generate``.
        """
        if pooling not in ("mean", "last"):
            raise ValueError(f"pooling is {pooling!r}: expected 'mean' or 'last'")
        pooled = self._read(texts, lambda prompts: pool(self.model, prompts, pooling))
        return pooled.reshape(-1, self.model.params.dim)

    def classify(self, texts: Sequence[str]) -> list[Classification]:
        """The classes of texts, for checkpoints with a classifier's head.

        Returns:
            For each text ``{"label": name, "score": probability, "logits": one for each label}``.

        Raises:
            ValueError: the checkpoint has no labels, or as in ``embed``.
        """
        labels = self.model.params.labels
        if labels is None:
            raise ValueError("this checkpoint writes text: classifying needs one with labels")
        logits = self._read(texts, lambda prompts: last_logits(self.model, prompts))
        return [
            Classification(label=labels[int(row.argmax())], score=score, logits=row.tolist())
            for row, score in zip(logits, label_scores(logits), strict=True)
        ]

    def _read(
        self, texts: Sequence[str], work: Callable[[list[list[int]]], torch.Tensor]
    ) -> torch.Tensor:
        """What ``work`` makes of texts, a batch at a time: a row for each."""
        ids = [self._text_prompt(text) for text in checked_list(texts, "texts")]
        prompts, size = checked_prompts(self.model.params, ids), self.model.params.max_batch_size
        check_not_empty(prompts)
        with self._turns.exclusive():
            batches = [work(prompts[i : i + size]) for i in range(0, len(prompts), size)]
        return torch.cat(batches) if batches else torch.zeros(0)
