"""Judge texts with a classifier's head: /classify, and /v1/rerank with a head of one label."""

from collections.abc import Callable

import torch
from fastapi import Request, Response

from llama.engine.sequence import Output
from llama.engine.sequence import Sequence as EngineSequence
from llama.server import schemas_ranking as schemas
from llama.server.errors import ApiError, ContextLengthExceeded
from llama.server.events import collect, json_response, unless_disconnected
from llama.server.schemas import EmbeddingUsage
from llama.server.scores import new_id
from llama.server.service import Service
from llama.server.tasks import chosen_adapter, n_last, shortened

Texts = list[str | list[int]]


class Classifier:
    """The head of a request's model: the checkpoint's, or that of its adapter.

    Attributes:
        name: the model's.
        adapter_name: that of the adapter; None for the checkpoint's own head.
        labels: the classes.
    """

    def __init__(self, service: Service, model: str | None):
        """Choose the head.

        Raises:
            ApiError: the model has none, or there is no such model.
        """
        self.adapter_name = chosen = chosen_adapter(service, model)
        self.name = chosen or service.name
        adapters, params = service.llama.adapters, service.llama.model.params
        try:
            self._adapter = adapters.find(chosen)
            self.labels, self._head = adapters.classifier(self._adapter, params.labels)
        except ValueError as error:
            raise ApiError(400, str(error), "model") from error
        self._output: Output = "logits" if self._head is None else "last"
        self._service = service

    async def probabilities(
        self, request: Request, texts: Callable[[], Texts], n: int, field: str
    ) -> tuple[list[list[float]], EmbeddingUsage]:
        """Return the labels' probabilities for each text, and the number of tokens.

        One label's is the sigmoid of its logit.

        Args:
            texts: returns ``n`` texts, or their token ids; called in a thread.
            field: the request's, which has them.

        Raises:
            ApiError: see ``Service.submit``.
        """
        tasks, output = self._service.llama.tasks, self._output

        def make() -> list[EngineSequence]:
            return tasks.read(texts(), output, self._adapter)

        submission = self._service.submit(make, n)
        try:
            answers = await unless_disconnected(request, submission)
        except ContextLengthExceeded as error:
            raise error.of(field) from error
        await collect(request, answers)
        found = [self._of(job.sequence.pooled) for job in answers.jobs]
        n_tokens = sum(len(job.sequence.prompt) for job in answers.jobs)
        return found, EmbeddingUsage(prompt_tokens=n_tokens, total_tokens=n_tokens)

    def _of(self, pooled: torch.Tensor | None) -> list[float]:
        assert pooled is not None
        logits = pooled if self._head is None else self._head.float() @ pooled
        probabilities: torch.Tensor = logits.sigmoid() if len(logits) == 1 else logits.softmax(-1)
        return probabilities.tolist()


async def classify(service: Service, body: schemas.ClassifyRequest, request: Request) -> Response:
    """Return the most probable label of each text."""
    classifier, given = Classifier(service, body.model), body.input
    is_one = isinstance(given, str) or isinstance(given[0], int)
    texts: Texts = [given] if is_one else list(given)  # type: ignore[list-item, arg-type]
    last = n_last(service, body.truncate_prompt_tokens, classifier.adapter_name, 0)

    def kept() -> Texts:
        return shortened(service.llama.tokenizer, texts, last)

    found, used = await classifier.probabilities(request, kept, len(texts), "input")
    name, created = new_id("classify")

    def build() -> schemas.Classes:
        data = [
            schemas.Class(
                index=i,
                label=classifier.labels[probs.index(max(probs))],
                probs=probs,
                num_classes=len(probs),
            )
            for i, probs in enumerate(found)
        ]
        return schemas.Classes(
            id=name, created=created, model=classifier.name, data=data, usage=used
        )

    return await json_response(build)


async def rerank(service: Service, body: schemas.RerankRequest, request: Request) -> Response:
    """Return documents by their relevance to a query."""
    classifier = Classifier(service, body.model)
    if len(classifier.labels) != 1:
        raise ApiError(
            400,
            f"the model {classifier.name!r} has a head of {len(classifier.labels)} labels, and "
            "ranking needs one of a single label: use /classify",
            "model",
        )
    texts = [each if isinstance(each, str) else each.text for each in body.documents]

    most = n_last(service, body.truncate_prompt_tokens, classifier.adapter_name, 0)

    def pairs() -> Texts:
        query = _ids(service, body.query)
        return [(query + _ids(service, text, body.max_tokens_per_doc))[:most] for text in texts]

    found, used = await classifier.probabilities(request, pairs, len(texts), "documents")
    scores = [score for [score] in found]
    ranked = sorted(range(len(texts)), key=lambda i: -scores[i])[: body.top_n or None]

    def result(i: int) -> schemas.Ranked:
        document = schemas.Document(text=texts[i]) if body.return_documents is not False else None
        return schemas.Ranked(index=i, relevance_score=scores[i], document=document)

    return await json_response(
        lambda: schemas.Ranking(
            id=new_id("rerank")[0],
            model=classifier.name,
            results=[result(i) for i in ranked],
            usage=used,
        )
    )


def _ids(service: Service, text: str, limit: int | None = None) -> list[int]:
    """Return one text of a pair, of which each begins like a text on its own, as transformers'."""
    tokenizer = service.llama.tokenizer
    return [tokenizer.bos_id] * tokenizer.add_bos + tokenizer.encode(text, False, False)[:limit]
