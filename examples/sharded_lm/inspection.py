"""Collectives and memory of a compiled train step."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from examples.sharded_lm.data import Corpus, training_batch
from examples.sharded_lm.mesh import shard_batch
from examples.sharded_lm.settings import Recipe
from examples.sharded_lm.train import abstract, make_program

_COLLECTIVE = re.compile(
    r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


class Cost(NamedTuple):
    """The cost of a train step beside its arithmetic.

    Attributes:
        collectives: The number of collectives of each kind in the compiled program.
        temporary: The temporary memory of a device, in bytes.
    """

    collectives: dict[str, int]
    temporary: int


def cost(recipe: Recipe, mesh: Mesh, corpus: Corpus, micro_batches: int = 1) -> Cost:
    """Compile a train step without running it, and return its cost."""
    with jax.set_mesh(mesh):
        program = make_program(recipe, mesh)
        batch = shard_batch(training_batch(corpus, recipe, 0, micro_batches), mesh)
        compiled = program.train_step.lower(abstract(program), batch).compile()
    found = Counter(_COLLECTIVE.findall(compiled.as_text()))
    return Cost(dict(sorted(found.items())), compiled.memory_analysis().temp_size_in_bytes)
