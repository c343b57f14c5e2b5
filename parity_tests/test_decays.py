"""Decays beyond L2: regjax.optim and regtorch.optim against NumPy, at every step.

A table of decays, its walks in NumPy, JAX and PyTorch, and the tests that compare them stay in one
file, since a new decay is a line in each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import regjax
import regjax.optim
import regtorch
import regtorch.optim
from parity_tests.compare import FLOAT64, assert_same_at_every_step, deviation
from parity_tests.optimizers.case import at, no_bias
from parity_tests.trajectories import Problem, Run, synthetic
from regjax._decay.paths import named_leaves
from tests.regjax.versions import OPTAX_COUNTS_DECAY_STEPS

STEPS = 200
SHAPES = {"head/kernel": (8, 3), "stem/bias": (8,), "stem/kernel": (5, 8)}
COEFFICIENT = 0.05
# The optimizers, and their options in the recursion of this file.
BASES = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "Adam": {"lr": 0.01},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
}
DIRECTIONS: dict[str, Callable[..., np.ndarray]] = {
    "l1": lambda w, u, w0: np.sign(w),
    "l2_sp": lambda w, u, w0: w - w0,
    # L1 and, with the coefficient c, the squares' 2 * c * w.
    "elastic_net": lambda w, u, w0: np.sign(w) + 2 * w,
    "l2": lambda w, u, w0: 2 * w,
    "independent": lambda w, u, w0: w,
    "cautious": lambda w, u, w0: np.where(u * w >= 0, w, 0.0),
}


Link: TypeAlias = Callable[..., optax.GradientTransformation]


@dataclass(frozen=True)
class Decay:
    """A decay.

    Attributes:
        form: A key of DIRECTIONS.
        place: 'coupled', 'decoupled' (times the learning rate), 'independent' (of it), or 'loss'.
        base: A key of BASES.
        coefficient: The coefficient of the decay.
        scheduled: Whether the coefficient follows a rising cosine.
        masked: Whether biases do not decay.
    """

    form: str
    place: str
    base: str
    coefficient: float = COEFFICIENT
    scheduled: bool = False
    masked: bool = False

    def __str__(self) -> str:
        extra = "-scheduled-masked" * self.scheduled
        return f"{self.form}-{self.place}-{self.base}{extra}"

    def rate(self, cos: Callable[[Any], Any]) -> Any:
        """Return the coefficient, or its schedule with a framework's cosine."""
        if not self.scheduled:
            return self.coefficient
        return lambda t: self.coefficient * rising(cos)(t)

    def mask(self, names: Any) -> dict[str, bool]:
        return {name: not self.masked or no_bias(name) for name in names}


def rising(cos: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return the schedule of DINO: half a period of the cosine, rising."""
    return lambda t: 1.0 - 0.5 * (1.0 + cos(np.pi * t / STEPS))


def _problem() -> Problem:
    """Return a problem that has weights without gradients, some of which are 0."""
    problem = synthetic("float64", SHAPES, STEPS)
    dead = problem.params["stem/kernel"]
    dead[0] = 0.0
    for gradient in problem.gradients:
        gradient["stem/kernel"][:2] = 0.0
    return problem


PROBLEM = _problem()
REFERENCE = {n: w + 0.5 for n, w in synthetic("float64", SHAPES, 1).params.items()}


def _numpy_step(base: str, state: dict[str, Any], g: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Return the update of the base, before the learning rate."""
    if base == "SGD":
        state["b"] = 0.9 * state["b"] + g if state else g
        return state["b"]
    t = state["t"] = state.get("t", 0) + 1
    state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * g
    state["v"] = 0.999 * state.get("v", 0.0) + 0.001 * g * g
    u = state["m"] / (1 - 0.9**t) / (np.sqrt(state["v"] / (1 - 0.999**t)) + 1e-8)
    return u + 0.1 * w if base == "AdamW" else u


@functools.cache
def walk_numpy(decay: Decay) -> Run:
    direct, lr = DIRECTIONS[decay.form], BASES[decay.base]["lr"]
    params, run = dict(PROBLEM.params), []
    states: dict[str, dict[str, Any]] = {n: {} for n in params}
    rate, mask = decay.rate(np.cos), decay.mask(params)
    # The L2-SP penalty has no factor one half.
    factor = 2 if (decay.place, decay.form) == ("loss", "l2_sp") else 1
    for step, gradient in enumerate(PROBLEM.gradients):
        c = factor * at(rate, step)
        for n, w in params.items():
            g, w0, here = gradient[n], REFERENCE[n], c * mask[n]
            if decay.place in ("coupled", "loss"):
                g = g + here * direct(w, g, w0)
            u = _numpy_step(decay.base, states[n], g, w)
            if decay.place == "decoupled":
                u = u + here * direct(w, u, w0)
            apart = here * w if decay.place == "independent" else 0.0
            params[n] = w - lr * u - apart
        run.append(dict(params))
    return run


def walk_jax(decay: Decay) -> Run:
    return _right_in_jax(decay.base)[decay]


@functools.cache
def _right_in_jax(base: str) -> dict[Decay, Run]:
    pairs = [decay for pair in (*EQUAL, *UNEQUAL) for decay in pair]
    decays = dict.fromkeys(d for d in (*DECAYS, *pairs) if d.base == base)
    return dict(zip(decays, _walk_jax([(decay, JAX) for decay in decays]), strict=True))


def _walk_jax(decays: Sequence[tuple[Decay, Mapping[str, Link]]]) -> list[Run]:
    """Walk with links: one program for all of them compiles three times as fast."""
    with jax.enable_x64(True):
        carries, steps = zip(*(_jax_training(*each) for each in decays), strict=True)

        def train_step(carries, gradient):
            carries = tuple(step(c, gradient) for step, c in zip(steps, carries, strict=True))
            return carries, [params for params, _ in carries]

        stacked = {n: np.stack([g[n] for g in PROBLEM.gradients]) for n in PROBLEM.params}
        walk = jax.jit(lambda carries, xs: jax.lax.scan(train_step, carries, xs))
        _, visited = walk(carries, _nested(stacked))
        runs = [{n: np.asarray(leaf) for n, leaf in named_leaves(tree)} for tree in visited]
    return [[{n: leaf[step] for n, leaf in run.items()} for step in range(STEPS)] for run in runs]


def _jax_training(decay: Decay, links: Mapping[str, Link]) -> tuple[Any, Callable[..., Any]]:
    """Parameters with the state of the optimizer, and the step from them to the next."""
    params, reference = _nested(PROBLEM.params), _nested(REFERENCE)
    mask = _nested(decay.mask(PROBLEM.params), asarray=False)
    rate = decay.rate(jnp.cos)
    if callable(rate):
        rate = _counted(rate)
    in_loss = decay.place == "loss"
    optimizer = _placed(decay, optax.identity() if in_loss else links[decay.form](rate, mask))

    def step(carry, gradient):
        params, state = carry
        if in_loss:
            penalty = JAX_PENALTIES[decay.form]
            slope = jax.grad(penalty)(params, reference, decay.coefficient, mask)
            gradient = optax.tree.add(gradient, slope)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return (params, optimizer.init(params)), step


def _counted(schedule: Callable[[Any], Any]) -> Callable[[Any], Any]:
    # Strict promotion forbids the cosine of an integer count.
    return lambda count: schedule(jnp.asarray(count, float))


def _placed(decay: Decay, link: optax.GradientTransformation) -> optax.GradientTransformation:
    options = dict(BASES[decay.base])
    lr = options.pop("lr")
    base = getattr(regjax.optim, decay.base.lower())
    if decay.place == "decoupled":
        step = (base(1.0, **options), optax.scale(-1.0))
        return optax.chain(*step, link, optax.scale_by_learning_rate(lr))
    links = (link, base(lr, **options))
    return optax.chain(*(reversed(links) if decay.place == "independent" else links))


def _elastic_net(rate: Any, mask: Any) -> optax.GradientTransformation:
    double = 2 * rate if isinstance(rate, float) else lambda t: 2 * rate(t)
    if OPTAX_COUNTS_DECAY_STEPS:
        l2 = optax.add_decayed_weights(double, mask)
    else:
        l2 = regjax.optim.add_decay_by_leaf(1.0, double, mask)
    return optax.chain(regjax.optim.add_l1_decay(rate, mask), l2)


JAX: dict[str, Link] = {
    "l1": lambda rate, mask: regjax.optim.add_l1_decay(rate, mask),
    "l2_sp": lambda rate, mask: regjax.optim.add_l2_sp_decay(_nested(REFERENCE), rate, mask),
    "elastic_net": _elastic_net,
    "independent": lambda rate, mask: regjax.optim.add_independent_weight_decay(rate, mask),
    "cautious": lambda rate, mask: regjax.optim.add_cautious_weight_decay(rate, mask),
}
JAX_PENALTIES: dict[str, Callable[..., jax.Array]] = {
    "l1": lambda p, p0, c, mask: regjax.l1_penalty(p, c, mask=mask),
    "l2_sp": lambda p, p0, c, mask: regjax.l2_sp_penalty(p, p0, c, mask=mask),
    "elastic_net": lambda p, p0, c, mask: regjax.elastic_net_penalty(p, c, c, mask=mask),
    "l2": lambda p, p0, c, mask: regjax.l2_penalty(p, c, mask=mask),
}


@functools.cache
def walk_torch(decay: Decay) -> Run:
    params = {n: torch.tensor(w, requires_grad=True) for n, w in PROBLEM.params.items()}
    reference = {n: torch.tensor(w) for n, w in REFERENCE.items()}
    mask = decay.mask(params)
    options = dict(BASES[decay.base])
    elastic = decay.form == "elastic_net" and decay.place == "coupled"
    if elastic:
        options["weight_decay"] = 2 * decay.coefficient
    # In torch, a mask of the decay is a group without decay.
    groups: list[dict[str, Any]] = [
        {"params": [(n, p) for n, p in params.items() if mask[n]]},
        {"params": [(n, p) for n, p in params.items() if not mask[n]]},
    ]
    if elastic:
        groups[1]["weight_decay"] = 0.0
    optimizer = getattr(torch.optim, decay.base)([g for g in groups if g["params"]], **options)
    if elastic and decay.scheduled:
        regtorch.optim.schedule_weight_decay(optimizer, rising(np.cos))
    if decay.place != "loss":
        _attach(decay, optimizer, reference, mask)
    run = []
    for gradient in PROBLEM.gradients:
        optimizer.zero_grad()
        for name, p in params.items():
            p.grad = torch.tensor(gradient[name])
        if decay.place == "loss":
            TORCH_PENALTIES[decay.form](params, reference, decay.coefficient, mask).backward()
        optimizer.step()
        run.append({n: p.detach().numpy().copy() for n, p in params.items()})
    return run


def _attach(decay: Decay, optimizer: Any, reference: Any, mask: Mapping[str, bool]) -> Any:
    rate, decoupled = decay.rate(np.cos), decay.place == "decoupled"
    if decay.form in ("l1", "elastic_net"):
        return regtorch.optim.add_l1_decay(optimizer, rate, decoupled=decoupled, mask=mask)
    if decay.form == "l2_sp":
        return regtorch.optim.add_l2_sp_decay(
            optimizer, reference, rate, decoupled=decoupled, mask=mask
        )
    attach = getattr(regtorch.optim, f"add_{decay.form}_weight_decay")
    return attach(optimizer, rate, mask=mask)


TORCH_PENALTIES: dict[str, Callable[..., torch.Tensor]] = {
    "l1": lambda p, p0, c, mask: regtorch.l1_penalty(p, c, mask=mask),
    "l2_sp": lambda p, p0, c, mask: regtorch.l2_sp_penalty(p, p0, c, mask=mask),
    "elastic_net": lambda p, p0, c, mask: regtorch.elastic_net_penalty(p, c, c, mask=mask),
    "l2": lambda p, p0, c, mask: regtorch.l2_penalty(p, c, mask=mask),
}
WALKS = {"numpy": walk_numpy, "jax": walk_jax, "torch": walk_torch}


def _nested(leaves: Mapping[str, Any], asarray: bool = True) -> dict[str, dict[str, Any]]:
    tree: dict[str, dict[str, Any]] = {}
    for name, leaf in leaves.items():
        layer, kind = name.split("/")
        tree.setdefault(layer, {})[kind] = jnp.asarray(leaf) if asarray else leaf
    return tree


FORMS = [
    ("l1", "coupled", ("SGD", "Adam", "AdamW")),
    ("l1", "decoupled", ("SGD", "Adam", "AdamW")),
    ("l2_sp", "coupled", ("SGD", "Adam", "AdamW")),
    ("l2_sp", "decoupled", ("SGD", "Adam", "AdamW")),
    # The decay of AdamW is decoupled, so its elastic net would have two kinds of L2.
    ("elastic_net", "coupled", ("SGD", "Adam")),
    ("independent", "independent", ("SGD", "Adam")),
    ("cautious", "decoupled", ("SGD", "Adam")),
]
DECAYS = [
    Decay(form, place, base, scheduled=more, masked=more)
    for form, place, bases in FORMS
    for base in bases
    for more in (False, True)
]


@pytest.mark.parametrize("decay", DECAYS, ids=str)
@pytest.mark.sample(2)
def test_three_parties_take_the_same_steps(decay):
    reference, in_jax, in_torch = (walk(decay) for walk in WALKS.values())
    assert_same_at_every_step(in_torch, reference, FLOAT64, names=("regtorch", "NumPy"))
    assert_same_at_every_step(in_jax, reference, FLOAT64, names=("regjax", "NumPy"))
    assert_same_at_every_step(in_jax, in_torch, FLOAT64, names=("regjax", "regtorch"))


# The same decay in the loss and as a transformation; only L2-SP has a factor 2.
EQUAL = [
    (
        Decay(form, "loss", base, masked=masked),
        Decay(form, "coupled", base, COEFFICIENT * factor, masked=masked),
    )
    for form, factor in (("l1", 1), ("elastic_net", 1), ("l2_sp", 2))
    for base in ("SGD", "Adam")
    for masked in (False, True)
]


@pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS)
@pytest.mark.parametrize(("in_loss", "link"), EQUAL, ids=str)
@pytest.mark.sample(16)
def test_coupled_decay_is_the_penalty(in_loss, link, walk):
    assert_same_at_every_step(walk(in_loss), walk(link), FLOAT64, names=("loss", "transformation"))


UNEQUAL = [
    (Decay("l1", "loss", "Adam"), Decay("l1", "decoupled", "Adam")),
    (Decay("l1", "loss", "AdamW"), Decay("l1", "decoupled", "AdamW")),
    (Decay("l2_sp", "loss", "Adam"), Decay("l2_sp", "decoupled", "Adam", 2 * COEFFICIENT)),
    (Decay("l2_sp", "loss", "AdamW"), Decay("l2_sp", "decoupled", "AdamW", 2 * COEFFICIENT)),
    # With the learning rate as a factor; without momentum the first pair would be equal.
    (Decay("l2", "loss", "SGD"), Decay("independent", "independent", "SGD", 0.2 * COEFFICIENT)),
    (Decay("l2", "loss", "Adam"), Decay("independent", "independent", "Adam", 0.02 * COEFFICIENT)),
    (Decay("l2", "loss", "SGD"), Decay("cautious", "decoupled", "SGD", 2 * COEFFICIENT)),
    (Decay("l2", "loss", "Adam"), Decay("cautious", "decoupled", "Adam", 2 * COEFFICIENT)),
]


@pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS)
@pytest.mark.parametrize(("in_loss", "link"), UNEQUAL, ids=str)
def test_decay_past_the_moments_is_no_penalty(in_loss, link, walk):
    assert deviation(walk(in_loss), walk(link)) > 1e-2


def test_clipping_sees_a_penalty_and_no_decoupled_decay():
    weight, bound = np.array([3.0, 4.0]), 1.0

    def jax_step(*links, penalty=0.0):
        w = jnp.asarray(weight)
        gradient = jax.grad(regjax.l1_penalty)(w, penalty)
        optimizer = optax.chain(*links)
        updates, _ = optimizer.update(gradient, optimizer.init(w), w)
        return np.linalg.norm(np.asarray(updates))

    def torch_step(attach=None, penalty=0.0):
        w = torch.tensor(weight, requires_grad=True)
        optimizer = torch.optim.SGD([w], lr=1.0)
        if attach is not None:
            attach(optimizer)
        regtorch.l1_penalty([w], penalty).backward()
        torch.nn.utils.clip_grad_norm_([w], bound)
        optimizer.step()
        return np.linalg.norm(w.detach().numpy() - weight)

    clip, descend = optax.clip_by_global_norm(bound), optax.scale(-1.0)
    decay, whole = regjax.optim.add_l1_decay(10.0), 10 * np.sqrt(2)
    with jax.enable_x64(True):
        assert jax_step(clip, descend, penalty=10.0) == pytest.approx(bound)
        assert jax_step(decay, clip, descend) == pytest.approx(bound)
        assert jax_step(clip, decay, descend) == pytest.approx(whole)
    assert torch_step(penalty=10.0) == pytest.approx(bound, rel=1e-5)
    for decoupled in (False, True):
        attach = lambda o, d=decoupled: regtorch.optim.add_l1_decay(o, 10.0, decoupled=d)
        assert torch_step(attach) == pytest.approx(whole)


LAYERS = {"stem": 0, "head": 2}


def _layer_of(name: str) -> int:
    return LAYERS[name.split("/")[0]]


def _layerwise_numpy(base: str) -> Run:
    lr = BASES[base]["lr"]
    params, run = dict(PROBLEM.params), []
    states: dict[str, dict[str, Any]] = {n: {} for n in params}
    for step, gradient in enumerate(PROBLEM.gradients):
        for n, w in params.items():
            height = 2 - _layer_of(n)
            c = 0.1 * rising(np.cos)(step) * 0.5**height * no_bias(n)
            coupled = base != "AdamW"
            g = gradient[n] + c * w * coupled
            u = _numpy_step("Adam" if base == "AdamW" else base, states[n], g, w)
            params[n] = w - lr * 0.8**height * (u + c * w * (not coupled))
        run.append(dict(params))
    return run


def _layerwise_jax(base: str, depth: int | None = None) -> Run:
    options = {k: v for k, v in BASES[base].items() if k not in ("lr", "weight_decay")}
    lr = BASES[base]["lr"]
    with jax.enable_x64(True):
        params = _nested(PROBLEM.params)
        mask = _nested({n: no_bias(n) for n in PROBLEM.params}, asarray=False)
        shrinking = (
            regjax.optim.layerwise_scale(params, _layer_of, f, depth=depth) for f in (0.8, 0.5)
        )
        rates, decays = shrinking
        schedule = _counted(lambda count: 0.1 * rising(jnp.cos)(count))
        decay = regjax.optim.add_decay_by_leaf(decays, schedule, mask)
        optimizer = getattr(regjax.optim, "adam" if base == "AdamW" else base.lower())
        chain = (decay, optimizer(lr, **options))
        if base == "AdamW":
            chain = (optimizer(1.0), optax.scale(-1.0), decay, optax.scale_by_learning_rate(lr))
        transformation = optax.chain(*chain, regjax.optim.scale_by_leaf(rates))
        update, state, run = jax.jit(transformation.update), transformation.init(params), []
        for gradient in PROBLEM.gradients:
            updates, state = update(_nested(gradient), state, params)
            params = optax.apply_updates(params, updates)
            run.append({n: np.asarray(leaf) for n, leaf in named_leaves(params)})
    return run


def _layerwise_torch(base: str) -> Run:
    params = {n: torch.tensor(w, requires_grad=True) for n, w in PROBLEM.params.items()}
    groups = regtorch.optim.layerwise_groups(
        params,
        _layer_of,
        lr=BASES[base]["lr"],
        lr_factor=0.8,
        weight_decay=0.1,
        decay_factor=0.5,
        mask=lambda name, tensor: no_bias(name),
    )
    optimizer = getattr(torch.optim, base)(groups, momentum=0.9) if base == "SGD" else None
    optimizer = optimizer or getattr(torch.optim, base)(groups)
    regtorch.optim.schedule_weight_decay(optimizer, rising(np.cos))
    run = []
    for gradient in PROBLEM.gradients:
        for name, p in params.items():
            p.grad = torch.tensor(gradient[name])
        optimizer.step()
        run.append({n: p.detach().numpy().copy() for n, p in params.items()})
    return run


@pytest.mark.parametrize("base", BASES)
def test_layerwise_rates_agree(base):
    reference, in_jax, in_torch = (
        walk(base) for walk in (_layerwise_numpy, _layerwise_jax, _layerwise_torch)
    )
    assert_same_at_every_step(in_torch, reference, FLOAT64, names=("regtorch", "NumPy"))
    assert_same_at_every_step(in_jax, reference, FLOAT64, names=("regjax", "NumPy"))


def test_a_wrong_depth_is_caught():
    with pytest.raises(AssertionError, match="diverge at step 1 in"):
        assert_same_at_every_step(_layerwise_jax("Adam", 3), _layerwise_torch("Adam"), FLOAT64)


def _term(direct: Callable[..., Any]) -> Link:
    """Return a link without masks and schedules, to plant defects."""

    def make(rate: Any, mask: Any) -> optax.GradientTransformation:
        reference = _nested(REFERENCE)
        return optax.stateless(
            lambda updates, params: jax.tree.map(
                lambda u, w, w0: u + rate * direct(w, u, w0), updates, params, reference
            )
        )

    return make


# The correct decay, and a defect.
PLANTED: dict[str, tuple[Decay, Link]] = {
    "sign of 0 is 1": (
        Decay("l1", "coupled", "SGD"),
        _term(lambda w, u, w0: jnp.where(w >= 0, 1.0, -1.0)),
    ),
    "half the L1": (Decay("l1", "coupled", "Adam"), _term(lambda w, u, w0: 0.5 * jnp.sign(w))),
    "L2 for L1": (Decay("l1", "coupled", "SGD"), _term(lambda w, u, w0: w)),
    "factor 2 in L2-SP": (
        Decay("l2_sp", "coupled", "SGD"),
        _term(lambda w, u, w0: 2 * (w - w0)),
    ),
    "reference swapped": (Decay("l2_sp", "coupled", "Adam"), _term(lambda w, u, w0: w0 - w)),
    "reference forgotten": (Decay("l2_sp", "decoupled", "AdamW"), _term(lambda w, u, w0: w)),
    "factor 2 missing in the elastic net": (
        Decay("elastic_net", "coupled", "Adam"),
        _term(lambda w, u, w0: jnp.sign(w) + w),
    ),
    "learning rate in independent decay": (
        Decay("independent", "independent", "SGD"),
        _term(lambda w, u, w0: -0.1 * w),
    ),
    "sign of independent decay": (
        Decay("independent", "independent", "Adam"),
        _term(lambda w, u, w0: w),
    ),
    "cautious without caution": (
        Decay("cautious", "decoupled", "Adam"),
        _term(lambda w, u, w0: w),
    ),
    "cautious the wrong way": (
        Decay("cautious", "decoupled", "SGD"),
        _term(lambda w, u, w0: jnp.where(u * w <= 0, w, 0.0)),
    ),
    "cautious about a step of 0": (
        Decay("cautious", "decoupled", "SGD"),
        _term(lambda w, u, w0: jnp.where(u * w > 0, w, 0.0)),
    ),
}
for _form, _place, _ in FORMS:
    _plain = Decay(_form, _place, "SGD", scheduled=True, masked=True)
    PLANTED |= {
        f"mask ignored, {_form} {_place}": (
            _plain,
            lambda rate, mask, form=_form: JAX[form](rate, None),
        ),
        f"schedule one step late, {_form} {_place}": (
            _plain,
            lambda rate, mask, form=_form: JAX[form](lambda count: rate(count + 1), mask),
        ),
        f"schedule ignored, {_form} {_place}": (
            _plain,
            lambda rate, mask, form=_form: JAX[form](COEFFICIENT, mask),
        ),
    }


@functools.cache
def planted_in_jax() -> dict[str, Run]:
    wrong = [(decay, {decay.form: link}) for decay, link in PLANTED.values()]
    return dict(zip(PLANTED, _walk_jax(wrong), strict=True))


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.sample(10)
def test_planted_defect_is_caught(name):
    in_jax, in_torch = planted_in_jax()[name], walk_torch(PLANTED[name][0])
    with pytest.raises(AssertionError, match=r"regjax and regtorch diverge at step \d+ in"):
        assert_same_at_every_step(in_jax, in_torch, FLOAT64, names=("regjax", "regtorch"))
