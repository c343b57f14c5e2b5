"""BERT of Hugging Face in PyTorch, its port to Flax, and the training step of both.

Both models are those of the library, unmodified, with small random weights. The training is that of
its `Trainer`: AdamW without decay of biases and layer norms, gradients clipped to norm 1, and a
linear schedule with warm-up. Dropout is on everywhere, in attention too.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import regjax
import regtorch
from examples.torchvision_operators import declare_missing
from parity_tests.harness import JaxStep, Leaf, TorchStep, tensors
from regjax import interop
from regshared.extras import needs

declare_missing()
with needs("examples.port_from_huggingface", extra="zoo", package="transformers"):
    from transformers import (  # pyright: ignore[reportMissingImports]
        BertConfig,
        BertForSequenceClassification,
        FlaxBertForSequenceClassification,
        Trainer,
        get_linear_schedule_with_warmup,
    )

ROOT = 0
LEARNING_RATE, WEIGHT_DECAY, MAX_NORM = 1e-3, 0.01, 1.0
LAYERS, LENGTH, ROWS, VOCABULARY = 2, 24, 16, 200
UNDECAYED = "bert/encoder/layer/0/output/dense/bias"  # decays with the mistake "decay"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a comparison.

    Attributes:
        steps: The number of training steps; a tenth of them is warm-up.
        attention: The implementation of attention in PyTorch, `"eager"` or `"sdpa"`.
        dtype: The dtype of parameters and computation; float64 requires x64.
        mistake: One of `MISTAKES` of the program.
    """

    steps: int = 100
    attention: str = "sdpa"
    dtype: str = "float32"
    mistake: str = "none"

    @property
    def warmup(self) -> int:
        """The number of steps of warm-up."""
        return max(1, self.steps // 10)


def config(**options: Any) -> BertConfig:
    """Return the configuration of a small BERT, with the default dropout rates of 0.1.

    The initial weights are five times the default, so that gradients are clipped.
    """
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=LENGTH,
        initializer_range=0.1,
        **options,
    )


def torch_side(settings: Settings) -> tuple[TorchStep, Any]:
    """Return the original as a training step, and its scheduler."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(config(attn_implementation=settings.attention))
    model = regtorch.keyed.convert(model.to(getattr(torch, settings.dtype)).train())
    decayed = decayed_by_trainer(model)
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if n in decayed], "weight_decay": WEIGHT_DECAY},
        {"params": [p for n, p in named.items() if n not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE)
    scheduler = get_linear_schedule_with_warmup(optimizer, settings.warmup, settings.steps)
    root = regtorch.key(ROOT)

    def step(model: torch.nn.Module, batch: Any, i: int) -> torch.Tensor:
        regtorch.keyed.set_key(model, root, i)
        optimizer.zero_grad()
        loss = model(**tensors(batch)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        scheduler.step()
        return loss

    return TorchStep(model, step, optimizer), scheduler


def decayed_by_trainer(model: torch.nn.Module) -> set[str]:
    """Return the names of the parameters that `Trainer` decays."""
    trainer: Any = None  # which the method does not use
    return set(Trainer.get_decay_parameter_names(trainer, model))


def jax_side(
    settings: Settings, model: torch.nn.Module, scheduler: Any
) -> tuple[JaxStep, dict[str, Leaf]]:
    """Return the port as a training step, and the names of its parameters in PyTorch.

    Args:
        settings: The settings of the original.
        model: The original.
        scheduler: Its scheduler, before the first step.
    """
    mistake = settings.mistake
    rate = 0.11 if mistake == "rate" else 0.1
    flax_model = FlaxBertForSequenceClassification(
        config(attention_probs_dropout_prob=rate), dtype=jnp.dtype(settings.dtype), _do_init=False
    )
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, settings.dtype), flax_model.params_shape_tree
    )
    names = interop.leaves_from_torch(model, template)
    params = interop.params_from_torch(model, template)
    mask = decay_mask(params, mistake)
    schedule, _ = interop.schedule_from_torch(scheduler, steps=settings.steps + 1)
    late = int(mistake == "warmup")
    adamw = regjax.optim.adamw(
        lambda count: schedule(count + late), weight_decay=WEIGHT_DECAY, mask=mask
    )
    optimizer = adamw if mistake == "clip" else optax.chain(clip_gradients(MAX_NORM), adamw)
    root, sites = jax.random.key(ROOT), site_names(settings)

    def loss(params: Any, batch: Any, i: Any) -> jax.Array:
        bound = regjax.keyed.bind(flax_model.module, root, i, names=sites, broadcast_dropout=False)
        ids = batch["input_ids"]
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
        logits = bound.apply(
            {"params": params},
            ids,
            batch["attention_mask"],
            jnp.zeros_like(ids),  # token types
            positions,
            None,  # head mask
            deterministic=False,
        ).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()

    @jax.jit
    def step(state: Any, batch: Any, i: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(state["params"], batch, i)
        updates, opt_state = optimizer.update(gradient, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt_state": opt_state}, value

    return JaxStep({"params": params, "opt_state": optimizer.init(params)}, step), names


def site_names(settings: Settings) -> dict[str, str]:
    """Return the names in PyTorch of the dropout sites of the Flax model.

    Only the eager implementation has a dropout layer in attention; otherwise the paths are equal.
    """
    names = {"": ""}
    if settings.attention == "eager":
        for layer in range(LAYERS):
            path = f"bert/encoder/layer/{layer}/attention/self"
            names[path] = f"{path.replace('/', '.')}.dropout"
    if settings.mistake == "site":
        names["bert/embeddings"] = "embeddings"
    return names


def decay_mask(params: Any, mistake: str = "none") -> Any:
    """Return the mask of the Flax parameters that `Trainer` would decay."""
    rule = [(UNDECAYED, True)] if mistake == "decay" else []
    return regjax.decay_mask(params, [*rule, ("**", "huggingface")])


def clip_gradients(max_norm: float) -> optax.GradientTransformation:
    """Return `torch.nn.utils.clip_grad_norm_`; that of optax has no 1e-6 in the denominator."""

    def clip(gradient: Any, params: Any) -> Any:
        del params
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(gradient) + 1e-6))
        return jax.tree.map(lambda g: g * factor, gradient)

    return optax.stateless(clip)


def batches(steps: int) -> list[dict[str, np.ndarray]]:
    """Return random sentences of different lengths; the label is the half of most of the words."""
    rng = np.random.default_rng(0)
    half, shape = VOCABULARY // 2, (ROWS, LENGTH)
    found = []
    for _ in range(steps):
        labels = rng.integers(0, 2, ROWS)
        from_second_half = (rng.random(shape) < 0.8) == labels[:, None]
        ids = rng.integers(1, half, shape) + half * from_second_half
        mask = np.arange(LENGTH) < rng.integers(LENGTH // 3, LENGTH + 1, (ROWS, 1))
        found.append(
            {"input_ids": ids * mask, "attention_mask": mask.astype(np.int64), "labels": labels}
        )
    return found
