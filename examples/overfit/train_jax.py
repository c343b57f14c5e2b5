"""Training in JAX; `train_torch.py` has the same functions in PyTorch."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax

import regjax
from examples.overfit.curves import Curve
from regjax import optim

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Array, Float, Int, Key, PyTree

    from examples.overfit.data import Images, Problem, Weights
    from examples.overfit.recipes import Recipe
    from examples.overfit.settings import Settings

    Params = PyTree[Float[Array, "..."]]  # kernel and bias of each layer by name
    State = tuple[Params, optax.OptState]


def load_params(weights: Weights) -> Params:
    """Return the parameters, from the shared initial weights."""
    return jax.tree.map(jnp.asarray, weights)


def apply(
    params: Params,
    pixels: Float[Array, "batch 64"],
    *,
    rate: float = 0.0,
    root: Key[Array, ""] | None = None,
    step: Int[Array, ""] | int = 0,
) -> Float[Array, "batch 10"]:
    """Compute the logits of a perceptron with dropout before each layer, including the first.

    The default is evaluation: rate 0 does nothing and needs no key. In training, each mask has its
    own key, derived from layer and step, so there is no generator state to carry or to checkpoint.
    """
    x = pixels
    for name, layer in params.items():
        key = None if root is None else regjax.site_key(root, step, name)
        x = regjax.dropout(x, rate, key=key)
        x = jnp.dot(x, layer["kernel"]) + layer["bias"][None, :]
        if name != "output":
            x = jax.nn.relu(x)
    return x


def cross_entropy(
    logits: Float[Array, "batch 10"], labels: Int[Array, " batch"]
) -> Float[Array, ""]:
    """Compute the mean cross-entropy, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def decays(params: Params) -> PyTree[bool]:
    """Return the mask of regularized parameters; a bias does not make a function less smooth."""
    return jax.tree.map(lambda param: param.ndim > 1, params)


def make_optimizer(settings: Settings, recipe: Recipe) -> optax.GradientTransformation:
    """Return the optimizer, with the weight decay of the recipe on kernels."""
    make = {
        "sgd": partial(optim.sgd, momentum=0.9),
        "adam": optim.adam,
        "adamw": optim.adamw,
    }[settings.optimizer]
    return make(settings.learning_rate, weight_decay=recipe.weight_decay, mask=decays)


def training_loss(
    params: Params,
    pixels: Float[Array, "batch 64"],
    labels: Int[Array, " batch"],
    recipe: Recipe,
    root: Key[Array, ""],
    step: Int[Array, ""],
) -> Float[Array, ""]:
    """Compute the training loss: cross-entropy with dropout on, plus the penalty."""
    logits = apply(params, pixels, rate=recipe.rate, root=root, step=step)
    loss = cross_entropy(logits, labels)
    if recipe.penalty:
        loss = loss + regjax.l2_penalty(params, recipe.penalty, mask=decays)
    return loss


def make_train_chunk(
    images: Images, recipe: Recipe, settings: Settings, optimizer: optax.GradientTransformation
) -> Callable[[State, Int[Array, " steps"], Int[Array, "steps batch"]], State]:
    """Return a jitted function that scans over many steps."""
    root = jax.random.key(settings.seed, impl="threefry2x32")
    pixels, labels = as_arrays(images)

    def train_step(
        state: State, step_and_batch: tuple[Int[Array, ""], Int[Array, " batch"]]
    ) -> tuple[State, None]:
        params, optimizer_state = state
        step, batch = step_and_batch
        gradient = jax.grad(training_loss)(params, pixels[batch], labels[batch], recipe, root, step)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), None

    @jax.jit
    def train_chunk(
        state: State, steps: Int[Array, " steps"], batches: Int[Array, "steps batch"]
    ) -> State:
        return jax.lax.scan(train_step, state, (steps, batches))[0]

    return train_chunk


def evaluate(
    params: Params, pixels: Float[Array, "images 64"], labels: Int[Array, " images"]
) -> tuple[float, float]:
    """Compute cross-entropy (nats) and accuracy over a whole set, without dropout and penalty."""
    loss, accuracy = _evaluate(params, pixels, labels)
    return float(loss), float(accuracy)


@jax.jit
def _evaluate(
    params: Params, pixels: Float[Array, "images 64"], labels: Int[Array, " images"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    logits = apply(params, pixels)
    correct = jnp.argmax(logits, axis=-1) == labels
    return cross_entropy(logits, labels), correct.astype(jnp.float32).mean()


def train(
    problem: Problem,
    recipe: Recipe,
    settings: Settings,
    on_evaluation: Callable[[int], None] = lambda step: None,
) -> Curve:
    """Train a network with a recipe.

    Args:
        problem: Images, initial weights and batches.
        recipe: The regularization.
        settings: The optimizer, its learning rate, and the seed of the masks.
        on_evaluation: Called with the number of completed steps at each evaluation.

    Returns:
        The curves of losses and accuracy.
    """
    start = time.perf_counter()
    optimizer = make_optimizer(settings, recipe)
    train_chunk = make_train_chunk(problem.train, recipe, settings, optimizer)
    params = load_params(problem.weights)
    state = params, optimizer.init(params)
    train_set, validation_set = as_arrays(problem.train), as_arrays(problem.validation)
    curve = Curve(recipe, "jax")

    def record(step: int) -> None:
        curve.record(
            step,
            train=evaluate(state[0], *train_set),
            validation=evaluate(state[0], *validation_set),
        )
        on_evaluation(step)

    record(0)
    every = settings.steps_between_evaluations
    for first in range(0, settings.steps, every):
        batches = problem.batches[first : first + every]
        steps = jnp.arange(first, first + len(batches))
        state = train_chunk(state, steps, jnp.asarray(batches))
        record(first + len(batches))
    curve.seconds = time.perf_counter() - start
    return curve


def as_arrays(images: Images) -> tuple[Float[Array, "images 64"], Int[Array, " images"]]:
    """Return pixels and labels."""
    return jnp.asarray(images.pixels), jnp.asarray(images.labels)
