"""The train step, a pure function of state and batch, and the loop around it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import regjax
from examples.sharded_lm import checkpoints
from examples.sharded_lm.data import Batch, Corpus, training_batch, validation_batches
from examples.sharded_lm.history import History
from examples.sharded_lm.mesh import shard_batch, shardings_of
from examples.sharded_lm.model import GPT, Dropout, NoDropout
from examples.sharded_lm.settings import InputError, Plan, Recipe

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, PyTree

_VALIDATION_BATCHES = 8
_CLIP = 1.0


class State(NamedTuple):
    """All that a step changes, and all that a checkpoint holds.

    Attributes:
        params: The parameters, by path.
        optimizer: The state of the optimizer.
        step: The number of completed steps.
    """

    params: PyTree
    optimizer: optax.OptState
    step: Int[Array, ""]


@dataclass(frozen=True)
class Program:
    """The compiled functions of a run, on a mesh.

    Attributes:
        mesh: The mesh.
        shardings: The shardings of the state.
        init: Returns the initial state.
        train_step: Returns the next state, in the memory of the one passed, and the loss.
        evaluate: Returns the loss of a batch without dropout.
    """

    mesh: Mesh
    shardings: State
    init: Callable[[], State]
    train_step: jax.stages.Wrapped
    evaluate: Callable[[PyTree[Array], Batch], Float[Array, ""]]


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Return AdamW with clipped gradients; biases, norms and embeddings do not decay.

    The learning rate stays constant after the warm-up, so that a run can be resumed for more steps.
    """
    rate = optax.schedules.warmup_constant_schedule(0.0, recipe.learning_rate, recipe.warmup)
    adamw = regjax.optim.adamw(
        rate, (0.9, 0.95), weight_decay=recipe.weight_decay, mask=regjax.decay_mask
    )
    return optax.chain(optax.clip_by_global_norm(_CLIP), adamw)


def init_state(recipe: Recipe) -> State:
    """Return the state before the first step."""
    params = nnx.state(GPT(recipe, nnx.Rngs(recipe.seed)), nnx.Param)
    return State(params, make_optimizer(recipe).init(params), jnp.zeros((), jnp.int32))


def loss_of(
    graphdef: nnx.GraphDef[GPT],
    params: PyTree,
    tokens: Int[Array, "batch length"],
    drop: Dropout | NoDropout,
) -> Float[Array, ""]:
    """Return the mean cross-entropy of the next tokens, in nats."""
    logits = nnx.merge(graphdef, params)(tokens[:, :-1], drop)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def train_step(
    graphdef: nnx.GraphDef[GPT],
    recipe: Recipe,
    shardings: Any,
    state: State,
    batch: Batch,
) -> tuple[State, Float[Array, ""]]:
    """Accumulate the gradients of the micro-batches, and update the parameters once.

    Args:
        graphdef: The structure of the model.
        recipe: The settings.
        shardings: The shardings of the parameters, which the gradients have too.
        state: The state before the step.
        batch: The micro-batches.
    """
    root = jax.random.key(recipe.seed, impl="threefry2x32")

    def accumulate(total: Any, part: Batch) -> tuple[Any, None]:
        drop = Dropout(recipe.rate, root, state.step, part.rows)
        loss = functools.partial(loss_of, graphdef, tokens=part.tokens, drop=drop)
        value, gradient = jax.value_and_grad(loss)(state.params)
        # Without it, XLA may keep the whole sum on every device.
        gradient = jax.lax.with_sharding_constraint(gradient, shardings)
        return jax.tree.map(jnp.add, total, (value, gradient)), None

    zeros = jnp.zeros((), recipe.dtype), jax.tree.map(jnp.zeros_like, state.params)
    total, _ = jax.lax.scan(accumulate, zeros, batch)
    loss, gradient = jax.tree.map(lambda x: x / len(batch.rows), total)
    updates, optimizer = make_optimizer(recipe).update(gradient, state.optimizer, state.params)
    return State(optax.apply_updates(state.params, updates), optimizer, state.step + 1), loss


def make_program(recipe: Recipe, mesh: Mesh) -> Program:
    """Return the functions of a run, compiled at their first call.

    The parameters are created in their shardings: no device ever holds the whole model.
    """
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: GPT(recipe, nnx.Rngs(0))))
    init = functools.partial(init_state, recipe)
    shardings = shardings_of(jax.eval_shape(init), mesh)
    replicated = NamedSharding(mesh, PartitionSpec())

    def evaluate(params: PyTree, batch: Batch) -> Float[Array, ""]:
        return loss_of(graphdef, params, batch.tokens[0], NoDropout())

    return Program(
        mesh=mesh,
        shardings=shardings,
        init=jax.jit(init, out_shardings=shardings),
        train_step=jax.jit(
            functools.partial(train_step, graphdef, recipe, shardings.params),
            donate_argnums=0,
            out_shardings=(shardings, replicated),
        ),
        evaluate=jax.jit(evaluate, out_shardings=replicated),
    )


def train(
    recipe: Recipe,
    plan: Plan,
    mesh: Mesh,
    corpus: Corpus,
    folder: Path,
    on_step: Callable[[int], None] = lambda done: None,
    on_evaluation: Callable[[int, float, float], None] = lambda done, train, validation: None,
    warn: Callable[[str], None] = print,
) -> tuple[State, History]:
    """Train up to a step, from the last checkpoint if the plan says so.

    Args:
        recipe: The settings that determine the result.
        plan: The others.
        mesh: The mesh.
        corpus: The text.
        folder: The folder of the checkpoints.
        on_step: Called with the number of completed steps.
        on_evaluation: Called with it, the mean training loss since the last evaluation, and the
            validation loss.
        warn: Called with each warning, and with the step that a resumed run continues from.

    Returns:
        The last state and the losses.

    Raises:
        InputError: The checkpoint is of another recipe, or of a later step than the last.
        RunError: A checkpoint cannot be written, or none can be read.
    """
    about = checkpoints.identity(recipe, corpus)
    with jax.set_mesh(mesh):
        program = make_program(recipe, mesh)
        state, history = None, History()
        if plan.resume:
            found = checkpoints.restore(folder, about, abstract(program), warn)
            if found is None:
                warn(f"no checkpoint in {folder}; training from the start")
            else:
                state, history = found[0], History(**found[1])
                _check_steps(plan.steps, len(history.losses))
                warn(f"continuing from the checkpoint of step {len(history.losses)}")
        if state is None:
            state = program.init()
        held_out = validation_batches(corpus, recipe, _VALIDATION_BATCHES)
        held_out = [shard_batch(batch, mesh) for batch in held_out]
        recent: list[Array] = []
        for done in range(len(history.losses) + 1, plan.steps + 1):
            batch = training_batch(corpus, recipe, done - 1, plan.micro_batches)
            state, loss = program.train_step(state, shard_batch(batch, mesh))
            recent.append(loss)
            # The host prepares one step while the devices compute another, and no more.
            jax.block_until_ready(recent[-2:-1])
            on_step(done)
            evaluates, saves = (
                done == plan.steps or done % every == 0
                for every in (plan.evaluate_every, plan.save_every)
            )
            if evaluates or saves:
                history.losses += map(float, jax.device_get(recent))
                recent = []
            if evaluates:
                losses = [float(program.evaluate(state.params, batch)) for batch in held_out]
                history.validation.append((done, sum(losses) / len(losses)))
                train_losses = history.losses[-plan.evaluate_every :]
                mean = sum(train_losses) / len(train_losses)
                on_evaluation(done, mean, history.validation[-1][1])
            if saves:
                losses = dataclasses.asdict(history)
                checkpoints.save(folder, done, state, about, losses, plan.keep)
        return state, history


def _check_steps(steps: int, done: int) -> None:
    if steps < done:
        raise InputError(
            f"argument --steps: must be at least {done}, the step of the last checkpoint; got "
            f"'{steps}'. Train for more steps, or pass another --out."
        )


def abstract(program: Program) -> State:
    """Return shapes, dtypes and shardings of the state."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(program.init),
        program.shardings,
    )
