"""Uncertainty from Monte Carlo dropout: stochastic forward passes and their disagreement."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.special import entr

from regshared.checks import check_bool, check_callable, check_choice, check_integer
from regshared.events import SampledDraw, SiteKey
from regtorch import keyed
from regtorch import nn as layers
from regtorch._checks import check_module
from regtorch._dropout.core import real_dtype
from regtorch._random.events import Observer, observed_by
from regtorch._random.keys import check_key, site_key
from regtorch.keyed.calls import site_of, states_of
from regtorch.keyed.names import check_layers
from regtorch.keyed.state import Keys

Outputs: TypeAlias = Literal["logits", "probabilities", "values"]

_M = TypeVar("_M", bound=nn.Module)
_KINDS = ("logits", "probabilities", "values")
_SITE = "mc_dropout"  # pass i draws from site_key(key, i, _SITE)
# The tolerance for the sum of probabilities: rounding to 8 bits of mantissa passes, logits do not.
_TOLERANCE = 0.01

_OURS = tuple(kind for kind in vars(layers).values() if isinstance(kind, type))
# In evaluation the layer of an encoder runs as one fused kernel that skips its dropouts.
_FUSED = (nn.TransformerEncoderLayer,)
_DROPPING = (_DropoutNd, nn.MultiheadAttention, nn.RNNBase, *_OURS, *_FUSED)


class Prediction(NamedTuple):
    """The combined prediction of many stochastic forward passes.

    The tensors are float32, or float64 if the outputs are. The last four are None where they do not
    apply: entropies for values, and samples that were not requested.

    Attributes:
        mean: The mean of the passes: of probabilities, or of values.
        std: Their standard deviation, the square root of the mean squared distance from the mean.
        entropy: The entropy of the mean probabilities in nats: the total uncertainty.
        expected_entropy: The mean entropy of the passes: the uncertainty that they agree on.
        mutual_information: The difference, never negative: the disagreement of the passes, which
            more data could resolve.
        samples: The outputs of each pass, passes first.
    """

    mean: Tensor
    std: Tensor
    entropy: Tensor | None
    expected_entropy: Tensor | None
    mutual_information: Tensor | None
    samples: Tensor | None


def mc_dropout(
    predict: nn.Module | Callable[..., Tensor],
    *inputs: Any,
    key: Tensor,
    outputs: Outputs,
    samples: int = 32,
    class_axis: int = -1,
    keep_samples: bool = False,
) -> Prediction:
    """Predict with dropout on, many times: mean, deviation and entropy.

    Each pass keeps other units and is another, smaller model. Pass i is `predict(*inputs,
    key=site_key(key, i, "mc_dropout"))`: its masks do not depend on the number of passes, and are
    the same in `regjax`. The passes run one after the other, without gradients; the memory kept
    between them does not grow with `samples`. Deviations are summed as differences from the first
    pass, so that nearly equal outputs keep their digits.

    **Normalization layers must be in evaluation mode**, with their running averages, while dropout
    is on. A model runs under `dropout_only`, and has its mode back afterwards; a function that
    calls a model must set the mode itself.

    Args:
        predict: A model, or a function of `*inputs` and the keyword `key` that returns one floating
            tensor. In a model converted by `regtorch.keyed.convert` or made of `regtorch.nn`
            layers, the site `name` draws from `site_key(key, 0, name)`, where `key` is that of the
            pass.
        *inputs: The inputs of `predict`.
        key: One key; it may be used again, as with `site_key`.
        outputs: The kind of output of `predict`: `"logits"`, to which a softmax is applied;
            `"probabilities"` along `class_axis`; or `"values"`, as in regression, which have no
            entropy.
        samples: The number of passes. The mean has a standard error of `std / sqrt(samples)`.
        class_axis: The dimension of the classes in the output of one pass.
        keep_samples: Whether to return the output of each pass too.

    Raises:
        TypeError: `key` is not a key; `predict` does not return one floating tensor; or `samples`
            or `class_axis` is not an integer.
        ValueError: `samples` is below 1; `outputs` is none of the three; `class_axis` is not a
            dimension of the outputs, or has a single class; `key` is a batch of keys; the
            probabilities are negative or do not sum to 1; `predict` writes into its inputs; a
            module of the model drops and is not converted, or none does; or all passes are the same
            and draw their masks from the same keys, or draw none, as in evaluation.

    Warns:
        UserWarning: All passes return the same although they draw from different keys.

    Note (JAX):
        `regjax.mc_dropout` runs the passes side by side within a budget of memory. A `predict` that
        ignores its key is an error in both, which regjax detects in the traced program. Here a
        second pass is compared with the first, also with `samples=1`. Only masks of this package
        are observed: a `predict` with other masks is an error if all of its passes are the same.
        Masks that are drawn but do not reach the output are an error in regjax, and a warning here.

    Example:
        >>> import torch, regtorch
        >>> layers = torch.nn.Linear(4, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 3)
        >>> model = regtorch.keyed.convert(torch.nn.Sequential(*layers))
        >>> x = torch.ones(2, 4)
        >>> y = regtorch.mc_dropout(model, x, key=regtorch.key(0), outputs="logits", samples=50)
        >>> y.mean.shape, y.std.shape, y.entropy.shape
        (torch.Size([2, 3]), torch.Size([2, 3]), torch.Size([2]))

    References:
        Gal and Ghahramani, "Dropout as a Bayesian approximation", ICML 2016. The decomposition of
        the entropy: Houlsby et al., arXiv:1112.5745, 2011. Sums of deviations: Chan, Golub,
        LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """
    check_callable("predict", predict, "(*inputs, key), or a module")
    check_choice("outputs", outputs, _KINDS)
    samples = check_integer("samples", samples, minimum=1)
    class_axis = check_integer("class_axis", class_axis)
    keep_samples = check_bool("keep_samples", keep_samples)
    check_key(key)
    function = _passes(predict) if isinstance(predict, nn.Module) else nullcontext(predict)
    with torch.no_grad(), function as one_pass:
        versions, one_pass = _versions(inputs), _ObservedPass(one_pass)
        first = one_pass(*inputs, key=site_key(key, 0, _SITE))
        _check_outputs(first, outputs, class_axis)
        if _versions(inputs) != versions:
            raise ValueError(
                "predict must not write into its inputs, which the next pass uses; got changed "
                "inputs. Turn inplace off in its first layers, or copy the inputs: x.clone()."
            )
        moments, kept, same = _moments(first, outputs, class_axis), [first], first.numel() > 0
        for index in range(
            1, max(samples, 2)
        ):  # with one sample, a second pass shows whether predict drops
            y = one_pass(*inputs, key=site_key(key, index, _SITE))
            # Stop comparing once two passes differ: each comparison waits for the device.
            same = same and torch.equal(first, y)
            if index == samples:
                break
            moments = _merged(moments, _moments(y, outputs, class_axis))
            if keep_samples:
                kept.append(y)
    if same and one_pass.repeats_its_keys():
        raise ValueError(
            "predict must depend on its key; got the same output for all keys. Turn its dropout on "
            "(deterministic=False, training mode, a rate above 0), and pass the key to it."
        )
    if same:
        warnings.warn(
            "passes must differ; got the same output from all, although their keys differ. Draw "
            "more samples at so low a rate, or check that the dropped values reach the output.",
            stacklevel=2,
        )
    return _prediction(moments, torch.stack(kept) if keep_samples else None, class_axis)


class _ObservedPass:
    """A pass whose first two calls are observed for the keys of their masks."""

    def __init__(self, one_pass: Callable[..., Any]) -> None:
        self._one_pass = one_pass
        self._keys: list[list[tuple[int, int]]] = []

    def __call__(self, *inputs: Any, key: Tensor) -> Any:
        if len(self._keys) == 2:
            return self._one_pass(*inputs, key=key)
        keys: list[tuple[int, int]] = []
        self._keys.append(keys)

        def record(event: SiteKey | SampledDraw) -> None:
            if isinstance(event, SampledDraw):
                keys.append(event.draw.key)

        with observed_by(Observer(record, sample=0)):
            return self._one_pass(*inputs, key=key)

    def repeats_its_keys(self) -> bool:
        """Return whether both calls drew from the same keys, or no masks at all."""
        first, second = self._keys
        return first == second


@contextlib.contextmanager
def dropout_only(model: _M) -> Iterator[_M]:
    """Put dropout layers into training mode, and everything else into evaluation mode.

    Normalization layers then use their running averages without updating them. The dropout layers
    are PyTorch's, its attention and recurrent layers, converted or not, `regtorch.nn`'s, their
    subclasses, and the modules of a converted model that drew in an earlier forward pass; for any
    other class set `module.training = True` inside the context. Afterwards each module has its
    previous mode.

    Example:
        >>> import torch, regtorch
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5))
        >>> with regtorch.dropout_only(model):
        ...     [module.training for module in model]
        [False, True]
    """
    check_module("model", model)
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        for module in modes:
            if isinstance(module, _DROPPING) or _drew(module):
                module.training = True  # train() would also change its children
        yield model
    finally:
        for module, training in modes.items():
            module.training = training


def _drew(module: nn.Module) -> bool:
    """Return whether a module of a converted model drew in an earlier forward pass."""
    site = site_of(module)
    return site is not None and site.name in site.state.drawn.values()


@contextlib.contextmanager
def _passes(model: nn.Module) -> Iterator[Callable[..., Tensor]]:
    """Yield a model as a function with a key; afterwards restore its mode, keys and hooks."""
    own = {m: path for path, m in model.named_modules() if isinstance(m, _OURS)}
    states, pass_keys = states_of(model), Keys()
    before = [state.keys for state in states]
    hooks = []

    def one_pass(*inputs: Any, key: Tensor) -> Tensor:
        nonlocal pass_keys
        check_layers(model)
        if not keyed.sites(model) and not own:
            raise ValueError(
                "predict must have a layer that drops; got a model without one. If its forward "
                "calls regtorch.dropout, pass a function of (*inputs, key) that calls the model "
                "under regtorch.dropout_only(model)."
            )
        if states:
            keyed.set_key(model, key, 0)
        high, low = key.tolist()
        pass_keys = Keys((high, low))
        return model(*inputs)

    def give_key(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if options.get("key") is None:
            options = options | {"key": pass_keys.draw(own[module], torch.device("cpu"))}
        return args, options

    try:
        for module in own:
            hooks.append(module.register_forward_pre_hook(give_key, with_kwargs=True))
        with dropout_only(model):
            yield one_pass
    finally:
        for hook in hooks:
            hook.remove()
        for state, keys in zip(states, before, strict=True):
            state.keys = keys


class _Moments(NamedTuple):
    """The moments of the passes so far. `mean` and `squares` are of differences from `origin`."""

    passes: int
    origin: Tensor
    mean: Tensor
    squares: Tensor  # the sum of squared distances from the mean
    entropy: Tensor | None  # the mean of the passes' entropies
    improper: Tensor


def _moments(y: Tensor, outputs: str, class_axis: int) -> _Moments:
    """Return the moments of one pass, which is its own origin."""
    y = y.to(real_dtype(y.dtype))
    entropy, improper = None, torch.zeros((), dtype=torch.bool, device=y.device)
    if outputs != "values":
        if outputs == "logits":
            y = torch.softmax(y, class_axis)
        else:
            improper = ((y.sum(class_axis) - 1).abs() > _TOLERANCE).any() | (y < 0).any()
        entropy = entr(y).sum(class_axis)
    zeros = torch.zeros_like(y)
    return _Moments(1, y, zeros, zeros, entropy, improper)


def _merged(a: _Moments, b: _Moments) -> _Moments:
    """Return the moments of the passes of `a` and of the one pass of `b`."""
    passes = a.passes + 1
    share = 1 / passes
    delta = (b.origin - a.origin) - a.mean
    entropy = None
    if a.entropy is not None and b.entropy is not None:
        entropy = a.entropy + (b.entropy - a.entropy) * share
    return _Moments(
        passes,
        a.origin,
        a.mean + delta * share,
        a.squares + delta.square() * (a.passes * share),
        entropy,
        a.improper | b.improper,
    )


def _prediction(moments: _Moments, samples: Tensor | None, class_axis: int) -> Prediction:
    mean = moments.origin + moments.mean
    std = (moments.squares / moments.passes).sqrt()
    if moments.entropy is None:
        return Prediction(mean, std, None, None, None, samples)
    if moments.improper:
        raise ValueError(
            "predict must return probabilities, at least 0 and with sum 1 along "
            f"class_axis={class_axis}; got other values. Pass outputs='logits' for logits."
        )
    mean = mean.clamp(0, 1)  # rounding could exceed the ends, where entropy is undefined
    entropy = entr(mean).sum(class_axis)
    disagreement = (entropy - moments.entropy).clamp(min=0)
    return Prediction(mean, std, entropy, moments.entropy, disagreement, samples)


def _check_outputs(y: Any, outputs: str, class_axis: int) -> None:
    """Raise if a pass does not return one floating tensor with at least two classes."""
    if not isinstance(y, Tensor) or not y.is_floating_point():
        got = f"a tensor of dtype {y.dtype}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
        raise TypeError(
            "predict must return one floating tensor, not several, of logits or probabilities, not "
            f"classes; got {got}."
        )
    if outputs != "values":
        if not -y.ndim <= class_axis < y.ndim:
            raise ValueError(
                "class_axis must be a dimension of the output of predict, of shape "
                f"{tuple(y.shape)}; got {class_axis}."
            )
        if y.shape[class_axis] < 2:
            raise ValueError(
                f"class_axis={class_axis} must hold at least two classes; got outputs of shape "
                f"{tuple(y.shape)}. Return [0, z] for one logit z, or [1 - p, p] for one "
                "probability p."
            )


def _versions(inputs: tuple[Any, ...]) -> list[int]:
    """Return how often each of the tensors has been written to."""
    tensors = (x for x in inputs if isinstance(x, Tensor) and not x.is_inference())
    return [x._version for x in tensors]
