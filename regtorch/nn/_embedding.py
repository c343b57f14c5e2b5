"""Module of word dropout."""

from __future__ import annotations

import torch
from torch import Tensor

from regtorch._dropout.embedding import embedding_dropout
from regtorch._random.bernoulli import check_probability
from regtorch.nn._layer import GeneratorModule


class EmbeddingDropout(GeneratorModule):
    """Dropout of whole words: a dropped word is dropped wherever it occurs in the batch.

    It follows an embedding, and takes the ids along with the vectors. See
    `regtorch.embedding_dropout`.

    Example:
        >>> import torch, regtorch
        >>> embedding = torch.nn.Embedding(4, 2, _weight=torch.ones(4, 2))
        >>> layer = regtorch.nn.EmbeddingDropout(0.5)
        >>> ids = torch.tensor([0, 2, 0, 3])
        >>> layer(embedding(ids), ids, key=regtorch.key(0))[:, 0].tolist()
        [0.0, 2.0, 0.0, 2.0]
    """

    def __init__(self, rate: float = 0.1, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.rate = check_probability("rate", rate)
        self.generator = generator

    def forward(
        self, x: Tensor, ids: Tensor, *, key: Tensor | torch.Generator | None = None
    ) -> Tensor:
        key = self.generator if key is None else key
        return embedding_dropout(x, ids, self.rate, key=key, deterministic=not self.training)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"
