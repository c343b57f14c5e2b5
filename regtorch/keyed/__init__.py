"""Explicit keys for the dropout of an existing, unmodified PyTorch model.

    model = regtorch.keyed.convert(model)
    for step, batch in enumerate(batches):
        regtorch.keyed.set_key(model, root, step)
        loss(model(batch)).backward()

**Draws.** While a converted module runs, PyTorch's functions that draw are replaced: dropout of
every kind, as layers and as functions, attention (`scaled_dot_product_attention`,
`MultiheadAttention`), the dropout between recurrent layers, and, in modules in training mode,
`bernoulli_`, `rand`, `randn`, `randint` and their relatives. The modules stay as they are. Any
other draw from a global generator of PyTorch, NumPy or Python is an error in training that names
the module; `register` adds a function. So is a draw in the backward pass, as by an autograd
function or a hook of a gradient, and one of a module of TorchScript. Draws from a generator that
the caller passes or a forward creates are unchanged.

A draw has a key only if a forward is running. Another method, such as `forward_head` of timm, draws
from PyTorch's generator if it is called directly; this is an error where it is seen: in the first
call, between two modules that the method calls. Convert a module whose forward calls the methods.

**Names.** A draw is named by the dotted path of its module in the model passed to `convert`, such
as `"encoder.layers.0.dropout1"`; the module is the innermost whose forward is running, and a shared
module has its first path. Further draws in the same call of the module are `path:1`, `path:2`, ….
In `torch.nn.LSTM`, `GRU` and `RNN`, the dropout after layer 0 is `path.0`, and so on. The wrappers
`DataParallel`, `DistributedDataParallel`, `AveragedModel`, FSDP and `torch.compile` add nothing to
a path.

**Keys.** The first draw of a name after `set_key(model, root, step)` has the key
`regtorch.site_key(root, step, name)`, and draw n after it `regtorch.site_key(root, step,
f"{name}#{n}")`, n = 1, 2, …: repeated calls in a forward pass, and micro-batches of a step, draw
different masks. `regjax.site_key` returns the same keys.

**Values.** Masks are those of `regtorch.bernoulli`, normal variates those of `regtorch.normal`. A
uniform variate is `(1 - 2**-24) - jax.random.uniform(key, shape)`, so that `floor(keep_prob +
torch.rand(shape))` keeps what `bernoulli` keeps, for a keep probability of at least 1/2. Integers
are `low + floor(bits * (high - low) / 2**32)`, permutations sort the bits, and exponential variates
are `-log(u) / lambd`.

**Checkpoints.** `torch.utils.checkpoint` runs a forward again in the backward pass, and the same
masks are drawn again, also after another `set_key`. Other implementations can repeat a site that
was called once since `set_key`; otherwise an error is raised that names `replay`.

**Ranks.** In a data-parallel run each rank passes the numbers of its rows, `set_key(model, root,
step, examples=rows)`, with the same root. It then draws its rows of the masks of the whole batch,
and the run draws the masks of a single rank, and those of JAX. So do micro-batches. Without
`examples`, each rank needs a root of its own, such as `regtorch.fold_in(root, rank)`: with the same
one, all ranks draw the same masks for different rows, and `set_key` warns.

Ranks that share rows, as in tensor parallelism, share the root and the examples. For a `DTensor`,
each rank draws its part of the mask of the whole tensor. A shard that is a local tensor, such as
`ColwiseParallel` returns by default, cannot be told from a whole one, and has the same mask on
every rank: pass `use_local_output=False`.

**Limitations.** Under `torch.compile` the results are the same, but a converted model is hardly
compiled, in training or in evaluation: its modules run outside of the graphs. Call `revert` to
compile its evaluation. A draw in another thread during a forward counts as one of the model. Pass
keys to the functions under `torch.func.vmap`, where the mapped rows would share a mask. A model
that draws cannot be exported or traced. On CUDA it is untested.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from regshared.checks import check_callable, check_choice, check_items
from regtorch._checks import check_module
from regtorch._random.keys import check_key, check_step
from regtorch.keyed.calls import Site, site_of, states_of
from regtorch.keyed.examples import check_examples, check_globs
from regtorch.keyed.mode import discard_stale_modes
from regtorch.keyed.names import check_layers, layer_names, module_paths
from regtorch.keyed.ranks import warn_of_other_root, warn_of_shared_root
from regtorch.keyed.replacements import REPLACEMENTS, Replacement
from regtorch.keyed.state import Keys, State

__all__ = [
    "Site",
    "convert",
    "register",
    "replay",
    "revert",
    "set_key",
    "sites",
]


def __dir__() -> list[str]:
    """List the public names, for `dir` and completion."""
    return __all__


_M = TypeVar("_M", bound=nn.Module)


def convert(model: _M, *, allow: Sequence[str] = ()) -> _M:
    """Make every draw of a model use an explicit key, in place; return the model.

    Each module receives two forward hooks, and stays otherwise as it is: its class, parameters,
    attributes, state dict, references to it, and evaluation, bit for bit. A second call converts
    modules that were added since.

    Args:
        model: Any module; it may itself be a dropout layer.
        allow: Global generators, `"random"` or `"numpy.random"`, whose draws are not errors because
            they do not change the result, such as those of a run-time type checker.

    Raises:
        TypeError: `allow` is not a list of names.
        ValueError: `model` is one of TorchScript; `allow` has another generator; a module was
            converted as part of another model, under another name; or names are ambiguous: a module
            has the name of another with a suffix such as `:1` or `#1`. No module is converted then.

    Example:
        >>> import torch, regtorch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5))
        >>> regtorch.keyed.sites(regtorch.keyed.convert(model))
        ['1']
        >>> regtorch.keyed.set_key(model, regtorch.key(0), step=3)
        >>> x, key = torch.ones(2, 4), regtorch.site_key(regtorch.key(0), 3, "1")
        >>> torch.equal(model(x), regtorch.dropout(model[0](x), 0.5, key=key))
        True
    """
    paths = module_paths(check_module("model", model))
    if not paths:
        raise ValueError(
            f"model must run in Python; got a {type(model).__name__}, whose draws cannot have "
            "keys. Convert the model that was scripted or traced."
        )
    for source in check_items("allow", allow, Collection, 'a list of names, such as ["random"]'):
        check_choice("allow", source, ("random", "numpy.random"))
    names = set(paths.values())
    for module, path in paths.items():
        stem = re.sub(r"(:\d+)?(#\d+)?$", "", path)
        if stem != path and stem in names:
            raise ValueError(
                f"module {path!r} must not have the name of a draw of module {stem!r}. Rename it, "
                "or use a suffix other than : or # and a number."
            )
        site = site_of(module)
        if site and site.name != path:
            raise ValueError(
                f"module {path!r} must not be converted as part of another model; got the name "
                f"{site.name!r}. Call regtorch.keyed.revert(model), then convert the whole model."
            )
    state = next((site.state for site in map(site_of, paths) if site), State())
    state.allowed.update(allow)
    for module, path in paths.items():
        if site_of(module) is None:
            Site(path, state).attach(module)
    return model


def revert(model: _M) -> _M:
    """Undo `convert` in a converted model, or in a part of one, and return it.

    Example:
        >>> import torch, regtorch
        >>> regtorch.keyed.revert(regtorch.keyed.convert(torch.nn.Dropout(0.5)))
        Dropout(p=0.5, inplace=False)
    """
    for module in check_module("model", model).modules():
        if site := site_of(module):
            site.detach(module)
    return model


def sites(model: nn.Module) -> list[str]:
    """Return the names of the draws of a converted model, for `regtorch.site_key`.

    Before the first forward in training they are those of dropout layers, in module order.
    Afterwards they are those that drew, in order, and then those of layers that did not. In a part
    of a converted model they are the names in the whole.

    Example:
        >>> import torch, regtorch
        >>> regtorch.keyed.sites(regtorch.keyed.convert(torch.nn.TransformerEncoderLayer(8, 2, 16)))
        ['self_attn', 'dropout', 'dropout1', 'dropout2']
    """
    own = [(m, site) for m in check_module("model", model).modules() if (site := site_of(m))]
    drawn = {name: path for _, site in own for name, path in site.state.drawn.items()}
    paths = {site.name for _, site in own}
    names = [name for name, path in drawn.items() if path in paths]
    layers = (name for module, site in own for name in layer_names(module, site.name))
    return list(dict.fromkeys((*names, *layers)))


def set_key(
    model: nn.Module,
    root: Tensor,
    step: int | Tensor,
    *,
    examples: Tensor | Sequence[int] | None = None,
    axis: int | Mapping[str, int | None] | None = None,
) -> None:
    """Set the key of every site of a converted model for one step, and count its calls from 0.

    Call this before each forward pass, and not between a forward pass and its backward.

    With `examples`, each row of the batch has the mask that it has in a batch of all examples, as
    with `regtorch.by_example`: call this before each micro-batch, on each rank, with the same root.
    A draw without a dimension for the examples is an error that names its site.

    Args:
        model: A converted model.
        root: One key; it may be used again, as with `site_key`. Without `examples`, a warning is
            given if the next rank of a distributed run has the same; with them, if it has another.
        step: The step of training, an integer of at least 0, or a 0-d integer tensor.
        examples: The number of each row of the batch: its place in the batch of all ranks and
            micro-batches, or in the data.
        axis: The dimension of the batch in the draws, where the elements of an example follow each
            other; or a dict from globs of sites to it, with None where the examples share a draw.
            By default it is the first, which must have the length of `examples`; in the first draw
            of a site, no other may have it. Attention and recurrent layers need no statement; a
            draw of one element is shared.

    Raises:
        TypeError: `root` is not a key, `step` or `axis` is not an integer, or `examples` are not
            integers.
        ValueError: `root` is a batch of keys; `step` is negative or not below 2**64; the model, or
            a dropout layer in it, is not converted; a lazy module has no parameters yet; an example
            is negative; or a glob matches no module.

    Example:
        >>> import torch, regtorch
        >>> model = regtorch.keyed.convert(torch.nn.Sequential(torch.nn.Dropout(0.5)))
        >>> regtorch.keyed.set_key(model, regtorch.key(0), step=0)
        >>> model(torch.ones(6))
        tensor([0., 2., 2., 2., 0., 2.])
    """
    check_module("model", model)
    high, low = check_key(root, "root").tolist()
    step, batch = check_step(step), check_examples(examples, axis)
    check_layers(model)
    states = states_of(model)
    if not states:
        raise ValueError(
            "model must be converted; got a model without sites. Call "
            "regtorch.keyed.convert(model) first."
        )
    if batch and isinstance(axis, Mapping):
        own = [site.name for site in map(site_of, model.modules()) if site]
        check_globs(axis, [*own, *sites(model)])
    discard_stale_modes()
    if batch is None:
        warn_of_shared_root((high, low), states[0])
    else:
        warn_of_other_root((high, low), states[0])
    modules = list(model.modules())
    for module in modules:
        if site := site_of(module):
            site.enclose(module)
    for state in states:
        state.keys, state.method = Keys((high, low), step, batch), None
        state.classes = frozenset(map(type, modules))


def replay(
    model: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return contexts for `torch.utils.checkpoint`, whose second forward draws the same masks.

    They are required if a site is called repeatedly after `set_key`. The first is for the forward
    pass of `model`, a converted model or the part that is checkpointed, and the second for its
    repetition. Pass them with `use_reentrant=False`.

    Example:
        >>> import torch, regtorch
        >>> from torch.utils.checkpoint import checkpoint
        >>> model = regtorch.keyed.convert(torch.nn.Sequential(torch.nn.Dropout(0.5)))
        >>> regtorch.keyed.set_key(model, regtorch.key(0), step=0)
        >>> x, contexts = torch.ones(6, requires_grad=True), lambda: regtorch.keyed.replay(model)
        >>> for _ in range(2):
        ...     y = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
        >>> y.sum().backward()
        >>> torch.equal(x.grad, y)
        True
    """
    states = states_of(check_module("model", model))
    begun: list[Keys] = []

    @contextlib.contextmanager
    def first() -> Iterator[None]:
        begun[:] = [state.keys.repeat() for state in states]
        yield

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        now = [state.keys for state in states]
        for state, keys in zip(states, begun, strict=True):
            state.keys = keys.repeat()
        try:
            yield
        finally:
            for state, keys in zip(states, now, strict=True):
                state.keys = keys

    return first(), again()


def register(function: Callable[..., Any], replacement: Callable[..., Any]) -> None:
    """Replace another PyTorch function that draws, in all converted models in training.

    Args:
        function: A function or a method of PyTorch, or an operator that an extension registers
            with it.
        replacement: Called with a key, then with the arguments of the function. It draws whole
            batches, which is an error with `examples`, unless they are stated to share the draw.

    Example:
        >>> import torch, regtorch
        >>> def cauchy_(key, x, median=0, sigma=1):
        ...     u = regtorch.bits(key, x.shape).double() / 2**32
        ...     return x.copy_(median + sigma * torch.tan(torch.pi * (u - 0.5)))
        >>> regtorch.keyed.register(torch.Tensor.cauchy_, cauchy_)
    """
    check_callable("function", function, "(...)")
    check_callable("replacement", replacement, "(key, ...)")

    def draw(draws: Any, *args: Any, **options: Any) -> Any:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        return replacement(
            draws.key(tensors[0].device if tensors else torch.device("cpu")), *args, **options
        )

    REPLACEMENTS[function] = Replacement(draw)
