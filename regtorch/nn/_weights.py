"""Dropout of weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regtorch._decay.param_trees import decay_mask
from regtorch._dropout.drop_connect import drop_connect
from regtorch._random.bernoulli import check_probability
from regtorch.nn._layer import GeneratorModule

if TYPE_CHECKING:
    from regshared.decay_rules import Rule


class DropConnect(GeneratorModule):
    """A module whose weights are dropped in training, with one mask for each call.

    In training each call runs the wrapped module with `regtorch.drop_connect` of its weights; after
    `eval()` it runs it as it is. The parameters stay those of the wrapped module, under its names
    behind `module.`, and the optimizer sees whole weights.

    Around a recurrent module, with `rule="weight_hh_*"`, it drops connections between states, with
    one mask for the whole sequence.

    Attributes:
        module: what is wrapped.
        rate: the probability that a weight is zeroed.
        names: of the parameters that are dropped, as the wrapped module calls them; told by the
            rule when the layer is made. "default" is the kernels. Frozen parameters are none.
        generator: where a call without a key draws one from.

    Raises:
        ValueError: the rule leaves nothing to drop, or as `regtorch.decay_mask`.

    JAX:
        `regjax.drop_connect` of a tree with the same names and shapes draws the same masks.

    Example:
        >>> import torch, regtorch
        >>> layer = regtorch.nn.DropConnect(torch.nn.Linear(4, 3), 0.5)
        >>> layer
        DropConnect(
          rate=0.5, names=('weight',)
          (module): Linear(in_features=4, out_features=3, bias=True)
        )
        >>> layer(torch.ones(2, 4), key=regtorch.key(0)).shape
        torch.Size([2, 3])
        >>> lstm = regtorch.nn.DropConnect(torch.nn.LSTM(4, 3), 0.5, rule="weight_hh_*")
        >>> states, _ = lstm(torch.ones(5, 2, 4), key=regtorch.key(0))

    Source: Wan, Zeiler, Zhang, LeCun, Fergus, "Regularization of neural networks using
    DropConnect", ICML 2013. Of recurrent weights: Merity, Keskar, Socher, "Regularizing and
    optimizing LSTM language models", ICLR 2018.
    """

    def __init__(
        self,
        module: nn.Module,
        rate: float = 0.5,
        *,
        rule: Rule = "default",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        self.rate = check_probability("rate", rate)
        self.names = tuple(name for name, chosen in decay_mask(module, rule).items() if chosen)
        if not self.names:
            raise ValueError(
                f"module has no parameter that rule {rule!r} says True of, so there is nothing to "
                "drop"
            )
        self.generator = generator

    def forward(
        self, *args: Any, key: Tensor | torch.Generator | None = None, **kwargs: Any
    ) -> Any:
        """Calls the wrapped module; `key` comes before the generator."""
        if not self.training:
            return self.module(*args, **kwargs)
        key = self.generator if key is None else key
        weights = {name: self.module.get_parameter(name) for name in self.names}
        dropped = drop_connect(weights, self.rate, key=key, rule="**")
        return torch.func.functional_call(self.module, dict(dropped), args, kwargs)

    def extra_repr(self) -> str:
        """What stands between the parentheses of the printed module."""
        return f"rate={self.rate}, names={self.names}"
