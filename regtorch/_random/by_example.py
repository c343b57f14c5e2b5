"""STUB, replaced by branch rows."""
from __future__ import annotations
import dataclasses, math
import torch
from torch import Tensor
from regtorch._random.bernoulli import MaskSampler, bernoulli, bernoulli_at
from regtorch._random.packed import mask_sampler


@dataclasses.dataclass(frozen=True)
class ExampleSampler(MaskSampler):
    examples: Tensor
    axis: int

    def draw(self, key, keep_prob, shape):
        rest = [n for d, n in enumerate(shape) if d != self.axis % len(shape)]
        assert len(self.examples) == shape[self.axis], (self.examples, shape)
        size = math.prod(rest)
        index = self.examples.to(key.device)[:, None] * size + torch.arange(size, device=key.device)
        return bernoulli_at(key, keep_prob, index.reshape(-1, *rest).movedim(0, self.axis))


def by_example(examples, sampler=bernoulli, *, axis=0):
    return ExampleSampler(mask_sampler(sampler), torch.as_tensor(examples), axis)
