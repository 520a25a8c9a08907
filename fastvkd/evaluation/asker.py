"""Puts prompts to one model: by embeddings where its family is known to allow that, else through the processor."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from fastvkd.evaluation.generation import generate_embedded, generate_with_processor
from fastvkd.evaluation.inputs import Embedder, PreparedPhotos, Tick, embeddable
from fastvkd.evaluation.multiple_choice import OptionScores, score_options, score_options_packed
from fastvkd.models.answers import Query


class Asker:
    """Features of a photo are computed once, so the weights must not change meanwhile.

    `fast` forces or forbids the embedding path; None chooses it where the family allows. `tick` gets the number of
    finished questions after every batch.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        batch_size: int = 64,
        photos: PreparedPhotos | None = None,
        fast: bool | None = None,
    ) -> None:
        self.model, self.processor, self.batch_size = model, processor, batch_size
        fast = embeddable(model) if fast is None else fast
        self._embedder = Embedder(model, processor, batch_size, photos) if fast else None

    def scores(
        self, queries: Sequence[Query], options: Sequence[Sequence[str]], tick: Tick | None = None
    ) -> list[OptionScores]:
        """The likelihood of every option as the answer to its query. Fewer go at once where a query has many photos."""
        size = max(1, self.batch_size // max([1, *(len(query.photos) for query in queries)]))
        if self._embedder is None:
            return score_options(self.model, self.processor, queries, options, size, tick)
        self._embedder.batch_size = size
        return score_options_packed(self._embedder, queries, options, tick)

    def answers(self, queries: Sequence[Query], max_new_tokens: int, tick: Tick | None = None) -> list[str]:
        """Greedy answers."""
        if self._embedder is None:
            return generate_with_processor(self.model, self.processor, queries, self.batch_size, max_new_tokens, tick)
        self._embedder.batch_size = self.batch_size
        return generate_embedded(self._embedder, queries, max_new_tokens, tick)
