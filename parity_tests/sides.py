"""The two sides of a comparison, and the loops that train them step by step.

Each side is either a loss with an optimizer, or a whole train step. A run of either form yields a
`Moment` after each step, so that the comparison is the same for both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from parity_tests import views
from parity_tests.frameworks import from_torch
from parity_tests.seeded import state_of
from regjax._decay.paths import named_leaves
from regjax.interop._leaves import named_tensors, plain_name, unwrapped
from regjax.interop._schedule_tables import advance
from regjax.torch_random import TorchGenerator, to_torch
from regshared.checks import describe
from regshared.extras import needs

with needs("parity_tests", extra="torch", package="torch"):
    import torch

if TYPE_CHECKING:
    from jaxtyping import PyTree

    Arrays = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class JaxSide:
    """The port, as a loss and an optimizer.

    Attributes:
        params: A tree of parameters; replaced by those of the PyTorch model before the first step.
        loss: `loss(params, batch, step)`, a scalar; or `loss(params, statistics, batch, step)`,
            which returns the scalar and the new statistics, if there are `statistics`. The harness
            jits it, with `step` traced.
        optimizer: An optax transformation.
        state: The optimizer's initial state, as from `regjax.interop.state_from_torch`; None starts
            at the optimizer's first step.
        statistics: A tree of running statistics, such as the `batch_stats` of Linen; replaced like
            `params`. None if the model has none.
        generator: The state of PyTorch's generator before the first step, which the loss draws from
            by `regjax.torch_random`. The loss receives the current one as its last argument, and
            returns the next one as its last result, as in `loss(params, batch, step, g)`, which
            returns `(scalar, g)`. None if the masks are drawn from keys.
    """

    params: PyTree
    loss: Callable[..., Any]
    optimizer: optax.GradientTransformation
    state: PyTree | None = None
    statistics: PyTree | None = None
    generator: TorchGenerator | None = None

    def value_and_grad(self) -> Callable[..., Any]:
        """Return `f(params, statistics, g, batch, step)`, jitted.

        It returns the loss with the next statistics and generator, and the gradient.
        """

        def loss(params: PyTree, statistics: PyTree, g: Any, batch: Any, step: Any) -> Any:
            has_statistics, has_generator = statistics is not None, g is not None
            result = self.loss(
                params,
                *([statistics] if has_statistics else []),
                batch,
                step,
                *([g] if has_generator else []),
            )
            results = [result] if not (has_statistics or has_generator) else [*result]
            if len(results) != 1 + has_statistics + has_generator:
                raise ValueError(
                    "loss must return the scalar, then the new statistics if there are any, then "
                    f"the next generator if there is one; got {len(results)} values. Return these."
                )
            value, *carried = results
            if has_generator and not isinstance(carried[-1], TorchGenerator):
                raise TypeError(
                    "loss must return the next generator last; got "
                    f"{describe(carried[-1])}. Return the one of the last draw."
                )
            return value, (
                carried[0] if has_statistics else None,
                carried[-1] if has_generator else None,
            )

        return jax.jit(jax.value_and_grad(loss, has_aux=True))


@dataclasses.dataclass(frozen=True)
class TorchSide:
    """The original, as a loss and an optimizer.

    Attributes:
        model: A module; it is trained in place.
        loss: `loss(model, batch, step)`, a scalar tensor.
        optimizer: A `torch.optim` optimizer over the model's parameters, or one of a class of
            `regjax.interop.register_optimizer`.
        scheduler: A learning-rate scheduler of PyTorch or timm, which steps after the optimizer; or
            a function, such as `lambda step: plateau.step(losses[step])`, which is called then.
        generator: The generator on the CPU that the model draws from, if it is compared as it is,
            without `regtorch.keyed`: `torch.default_generator`, which `torch.manual_seed` seeds. A
            JAX side replays it by `regjax.torch_random`. None if the model draws from keys.
    """

    model: torch.nn.Module
    loss: Callable[[torch.nn.Module, Any, int], torch.Tensor]
    optimizer: torch.optim.Optimizer
    scheduler: Any = None
    generator: torch.Generator | None = None


@dataclasses.dataclass(frozen=True)
class JaxStep:
    """The port, as a whole train step, with clipping, accumulation, schedules and averages.

    Attributes:
        state: Any pytree: a TrainState of Flax, a dict with `"params"`, an Equinox module, an NNX
            module, or a tuple with one of these, such as `(model, nnx.Optimizer(model, ...))`. Its
            parameters and statistics are replaced by those of the PyTorch model before the first
            step, in NNX in place. An optimizer that keeps copies of the parameters must be
            initialized with those of PyTorch, as from `regjax.interop.params_from_torch`. If it has
            a `regjax.torch_random.TorchGenerator`, that is compared with PyTorch's.
        step: `step(state, batch, i)`, usually jitted, returns the new state and the loss. It may
            return the loss alone if it changes the state in place, as a step of NNX does.
        params: Selects the parameters: a function from the state to a part of it, in which the
            paths are those of `names`. None for a state of one of the kinds above.
        statistics: Selects the running statistics in the same way.
        averages: Selects the averages of the parameters, such as an EMA, with the same paths as the
            parameters; a tree or a module. None if they are not compared.

    Example:
        >>> import optax
        >>> adam = optax.adam(0.1)
        >>> def loss(params, batch):
        ...     return ((batch @ params["kernel"]) ** 2).mean()
        >>> @jax.jit
        ... def step(state, batch, i):
        ...     value, gradient = jax.value_and_grad(loss)(state["params"], batch)
        ...     updates, opt_state = adam.update(gradient, state["opt_state"])
        ...     params = optax.apply_updates(state["params"], updates)
        ...     return {"params": params, "opt_state": opt_state}, value
        >>> params = {"kernel": jnp.zeros((3, 2))}
        >>> port = JaxStep({"params": params, "opt_state": adam.init(params)}, step)
    """

    state: Any
    step: Callable[[Any, Any, Any], Any]
    params: Callable[[Any], PyTree] | None = None
    statistics: Callable[[Any], PyTree] | None = None
    averages: Callable[[Any], PyTree] | None = None


@dataclasses.dataclass(frozen=True)
class TorchStep:
    """The original, as a whole train step.

    Attributes:
        model: A module; it is trained in place.
        step: `step(model, batch, i)` returns the loss, after `zero_grad`, `backward`, clipping,
            the steps of the optimizer and of the scheduler, and the update of averages.
        optimizer: The optimizer whose state is compared; None compares no state.
        averages: The module with the averages of the parameters, such as an `AveragedModel` of
            PyTorch. None if they are not compared.
        generator: As for `TorchSide`.

    Example:
        >>> model = torch.nn.Linear(3, 2, bias=False)
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        >>> def step(model, batch, i):
        ...     optimizer.zero_grad()
        ...     loss = (model(torch.from_numpy(batch)) ** 2).mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     return loss
        >>> original = TorchStep(model, step, optimizer)
    """

    model: torch.nn.Module
    step: Callable[[torch.nn.Module, Any, int], torch.Tensor]
    optimizer: torch.optim.Optimizer | None = None
    averages: torch.nn.Module | None = None
    generator: torch.Generator | None = None


@dataclasses.dataclass(frozen=True)
class Moment:
    """A side after a step: arrays by their paths in JAX, or by their names in PyTorch.

    Attributes:
        loss: The loss of the step.
        params: The parameters.
        buffers: The running statistics, and other buffers.
        gradient: The gradients; None if the side does not show them.
        averages: Averages of the parameters; None if there are none.
        state: The arrays of the optimizer's state, by path in JAX; empty for PyTorch.
        generator: The bytes of the state of PyTorch's generator; None if there is none.
    """

    loss: np.ndarray
    params: Arrays
    buffers: Arrays
    gradient: Arrays | None = None
    averages: Arrays | None = None
    state: Arrays = dataclasses.field(default_factory=dict)
    generator: np.ndarray | None = None


class JaxLossRun:
    """The steps of a `JaxSide`."""

    def __init__(self, side: JaxSide) -> None:
        if not all(callable(getattr(side.optimizer, name, None)) for name in ("init", "update")):
            raise TypeError(
                "optimizer of JaxSide must be an optax transformation, as from optax.adamw(1e-3); "
                f"got {describe(side.optimizer)}."
            )
        self._side = side
        self.params, self.buffers = dict(named_leaves(side.params)), {}
        self.averages = None
        if side.statistics is not None:
            self.buffers = dict(named_leaves(side.statistics))

    def start(self, params: Arrays, buffers: Arrays, averages: Arrays | None) -> None:
        """Replace the arrays by those of PyTorch, by path."""
        side = self._side
        self._params = _like(side.params, params)
        self._statistics = _like(side.statistics, buffers)
        self._state = side.optimizer.init(self._params) if side.state is None else side.state
        self._state_on_torch = self._state
        self._gradient, self.generator = side.value_and_grad(), side.generator
        self._update = jax.jit(side.optimizer.update)

    def advance(self, batch: Any, step: int) -> Moment:
        """Train a step."""
        self.last_generator = self.generator
        (loss, (self._statistics, self.generator)), gradient = self._gradient(
            self._params, self._statistics, self.generator, batch, step
        )
        updates, self._state = self._update(gradient, self._state, self._params)
        self._params = optax.apply_updates(self._params, updates)
        return Moment(
            np.asarray(loss),
            _numpy(dict(named_leaves(self._params))),
            _numpy(dict(named_leaves(self._statistics))),
            _numpy(dict(named_leaves(gradient))),
            state=dict(named_leaves(self._state)),
            generator=None if self.generator is None else to_torch(self.generator),
        )

    def optimize(self, gradient: Arrays, params: Arrays) -> dict[str, np.ndarray]:
        """Return the next parameters from gradients and parameters of PyTorch, step by step."""
        old = _like(self._side.params, params)
        updates, self._state_on_torch = self._update(
            _like(self._side.params, gradient), self._state_on_torch, old
        )
        return _numpy(dict(named_leaves(optax.apply_updates(old, updates))))


class JaxStepRun:
    """The steps of a `JaxStep`."""

    def __init__(self, side: JaxStep) -> None:
        self._side, self._state = side, views.unshared(side.state)
        self.params, self.buffers, self.averages = self._read()

    def _read(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
        side, state = self._side, self._state
        averages = None if side.averages is None else views.read_params(state, side.averages)
        return (
            views.read_params(state, side.params, side.averages),
            views.read_statistics(state, side.statistics, side.averages),
            averages,
        )

    def start(self, params: Arrays, buffers: Arrays, averages: Arrays | None) -> None:
        """Replace the arrays by those of PyTorch, by path."""
        old = {("params", path): leaf for path, leaf in self.params.items()}
        old |= {("statistics", path): leaf for path, leaf in self.buffers.items()}
        old |= {("averages", path): leaf for path, leaf in (self.averages or {}).items()}
        new = {"params": params, "statistics": buffers, "averages": averages or {}}
        self._state = views.replace(
            self._state, old, {place: new[place[0]][place[1]] for place in old}
        )

    def advance(self, batch: Any, step: int) -> Moment:
        """Train a step."""
        result = self._side.step(self._state, batch, step)
        loss = result
        if isinstance(result, tuple) and len(result) == 2:
            self._state, loss = result
        if not isinstance(loss, jax.Array | np.ndarray | float) or np.size(loss) != 1:
            raise ValueError(
                f"step must return a state and a scalar loss; got {describe(loss)} as the loss. "
                "Return `(state, loss)`, or the loss alone if the state changes in place."
            )
        params, buffers, averages = self._read()
        return Moment(
            np.asarray(loss),
            _numpy(params),
            _numpy(buffers),
            averages=None if averages is None else _numpy(averages),
            state=views.read_all(self._state),
            generator=_generator(self._state),
        )


class TorchRun:
    """The steps of a `TorchSide` or a `TorchStep`."""

    def __init__(self, side: TorchSide | TorchStep) -> None:
        self._side = side
        self.model, self.optimizer = side.model, side.optimizer
        self.averages = side.averages if isinstance(side, TorchStep) else None
        self.start: np.ndarray | None = None

    def advance(self, batch: Any, step: int) -> Moment:
        """Train a step."""
        side, gradient, generator = self._side, None, self._side.generator
        self.start = None if generator is None else state_of(generator)
        if isinstance(side, TorchStep):
            loss = side.step(side.model, batch, step)
            if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
                raise ValueError(
                    f"step must return the loss, a scalar tensor; got {describe(loss)}. Return it."
                )
        else:
            side.optimizer.zero_grad()
            loss = side.loss(side.model, batch, step)
            loss.backward()
            # An unused parameter has no gradient in PyTorch, and a gradient of zeros in JAX.
            gradient = {
                name: copied(torch.zeros_like(p) if p.grad is None else p.grad)
                for name, p in named_tensors(side.model).items()
            }
            side.optimizer.step()
            if hasattr(side.scheduler, "optimizer"):
                advance(side.scheduler, step + 1)
            elif side.scheduler is not None:
                side.scheduler(step)
        averages = None if self.averages is None else named_tensors(self.averages)
        return Moment(
            copied(loss),
            {name: copied(p) for name, p in named_tensors(side.model).items()},
            {name: copied(b) for name, b in named_buffers(side.model).items()},
            gradient,
            None if averages is None else {name: copied(p) for name, p in averages.items()},
            generator=None if generator is None else state_of(generator),
        )


def named_buffers(model: torch.nn.Module, *, stored: bool = False) -> dict[str, torch.Tensor]:
    """Return the buffers of a module by their plain names, or only those in its state dict."""
    named = unwrapped(model).named_buffers(remove_duplicate=False)
    kept = unwrapped(model).state_dict() if stored else None
    return {plain_name(name): b for name, b in named if kept is None or name in kept}


def copied(tensor: torch.Tensor) -> np.ndarray:
    """Return a copy of a tensor, which the next step does not change."""
    return from_torch(tensor).copy()


def _generator(state: Any) -> np.ndarray | None:
    """Return the bytes of the generator of PyTorch in a state of JAX, if it has exactly one."""
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, TorchGenerator))
    found = [leaf for leaf in leaves if isinstance(leaf, TorchGenerator)]
    return to_torch(found[0]) if len(found) == 1 else None


def _numpy(arrays: Arrays) -> dict[str, np.ndarray]:
    # Copies, since a step may donate its arrays to the next.
    return {path: np.array(leaf) for path, leaf in arrays.items()}


def _like(tree: PyTree, arrays: Arrays) -> PyTree:
    """Return the tree with other leaves, by path."""
    leaves = [jnp.array(arrays[path]) for path, _ in named_leaves(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)
