"""A vision transformer of timm, its port to Flax NNX, and the train step of both.

Both models are unmodified. `regtorch.keyed.convert` names each draw of the PyTorch model after its
module, also in attention and where paths are dropped, which are no dropout layers;
`regjax.keyed.bind` gives the dropout of the port the same keys. The training is that of timm: AdamW
with its groups for weight decay and layer decay, a cosine schedule with warm-up, gradients clipped
by norm, smoothed labels, and an average of the parameters.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from sklearn.datasets import load_digits

import regjax
import regtorch
from examples.nnx_vit import VisionTransformer
from examples.torchvision_operators import declare_missing
from parity_tests.harness import JaxStep, Leaf, TorchStep, tensors
from regjax import interop
from regshared.extras import needs

declare_missing()
with needs("examples.port_from_timm", extra="zoo", package="timm"):
    import timm  # pyright: ignore[reportMissingImports]
    from timm.optim import create_optimizer_v2  # pyright: ignore[reportMissingImports]
    from timm.scheduler import CosineLRScheduler  # pyright: ignore[reportMissingImports]
    from timm.utils import ModelEmaV3, dispatch_clip_grad  # pyright: ignore[reportMissingImports]

ROOT = 0
CLASSES, SIZE, PATCH, WIDTH, HEADS, DEPTH, ROWS = 10, 32, 8, 192, 3, 3, 16
DROPOUT, DROP_PATH = 0.1, 0.2
LEARNING_RATE, WEIGHT_DECAY, LAYER_DECAY = 1e-3, 0.05, 0.75
SMOOTHING, MAX_NORM, AVERAGE = 0.1, 1.0, 0.9
# The names in timm of parameters and of sites of dropout, by path in the port.
NAMES: dict[str, str | Leaf] = {
    "embed": "patch_embed.proj",
    "class_token": Leaf("cls_token"),
    "positions": Leaf("pos_embed"),
}
SITES = {"position_dropout": "pos_drop", "head_dropout": "head_drop"}
for i in range(DEPTH):
    NAMES |= {
        f"blocks/{i}/attention_norm": f"blocks.{i}.norm1",
        f"blocks/{i}/attention": f"blocks.{i}.attn",
        f"blocks/{i}/attention_scale": f"blocks.{i}.ls1.gamma",
        f"blocks/{i}/mlp_norm": f"blocks.{i}.norm2",
        f"blocks/{i}/up": f"blocks.{i}.mlp.fc1",
        f"blocks/{i}/down": f"blocks.{i}.mlp.fc2",
        f"blocks/{i}/mlp_scale": f"blocks.{i}.ls2.gamma",
    }
    SITES |= {
        f"blocks/{i}/attention": f"blocks.{i}.attn",
        f"blocks/{i}/attention_dropout": f"blocks.{i}.attn.proj_drop",
        f"blocks/{i}/attention_path": f"blocks.{i}.drop_path1",
        f"blocks/{i}/up_dropout": f"blocks.{i}.mlp.drop1",
        f"blocks/{i}/down_dropout": f"blocks.{i}.mlp.drop2",
        f"blocks/{i}/mlp_path": f"blocks.{i}.drop_path2",
    }


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a comparison.

    Attributes:
        steps: The number of training steps; a fifth of them is warm-up.
        dtype: The dtype of parameters and computation; float64 requires x64.
        mistake: One of `MISTAKES` of the program.
    """

    steps: int = 100
    dtype: str = "float32"
    mistake: str = "none"


def timm_model(dtype: str = "float32") -> torch.nn.Module:
    """Return a small model with every dropout of timm, and without parameters of zeros or ones."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=CLASSES,
        img_size=SIZE,
        patch_size=PATCH,
        in_chans=1,
        embed_dim=WIDTH,
        num_heads=HEADS,
        depth=DEPTH,
        init_values=0.1,
        drop_rate=DROPOUT,
        pos_drop_rate=DROPOUT,
        proj_drop_rate=DROPOUT,
        attn_drop_rate=DROPOUT,
        drop_path_rate=DROP_PATH,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(getattr(torch, dtype))


def torch_side(settings: Settings) -> tuple[TorchStep, CosineLRScheduler]:
    """Return the original as a train step, and its scheduler."""
    model = regtorch.keyed.convert(timm_model(settings.dtype))
    optimizer = create_optimizer_v2(
        model, "adamw", lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, layer_decay=LAYER_DECAY
    )
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=settings.steps,
        warmup_t=settings.steps // 5,
        warmup_lr_init=1e-5,
        t_in_epochs=False,
    )
    average = ModelEmaV3(model, decay=AVERAGE)
    root = regtorch.key(ROOT)

    def step(model: torch.nn.Module, batch: Any, i: int) -> torch.Tensor:
        images, labels = tensors(batch)
        regtorch.keyed.set_key(model, root, i)
        logits = model(images.permute(0, 3, 1, 2))
        loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        dispatch_clip_grad(model.parameters(), MAX_NORM)
        optimizer.step()
        scheduler.step_update(i + 1)
        average.update(model)
        return loss

    return TorchStep(model, step, optimizer, average.module), scheduler


def jax_side(
    settings: Settings, original: TorchStep, scheduler: CosineLRScheduler
) -> tuple[JaxStep, dict[str, Leaf]]:
    """Return the port as a train step, and the names of its parameters in timm.

    Args:
        settings: The settings of the original.
        original: The original.
        scheduler: Its scheduler, before the first step.
    """
    names, sites, rates = with_mistake(settings.mistake, drop_paths(original.model))
    model = VisionTransformer(
        CLASSES,
        size=SIZE,
        patch=PATCH,
        channels=1,
        width=WIDTH,
        heads=HEADS,
        dropout=DROPOUT,
        drop_paths=rates,
        rngs=nnx.Rngs(0),
    )
    model.train()
    template = jax.tree.map(lambda p: p.astype(settings.dtype), nnx.state(model, nnx.Param))
    params = interop.params_from_torch(original.model, template, names)
    leaves = interop.leaves_from_torch(original.model, template, names)
    nnx.update(model, params)
    adamw = interop.optimizer_from_torch(
        original.optimizer,
        leaves,
        model=original.model,
        scheduler=scheduler,
        steps=settings.steps + 1,
    )
    optimizer = nnx.Optimizer(model, changed_by(settings.mistake, adamw), wrt=nnx.Param)
    average = nnx.clone(model)
    root = jax.random.key(ROOT)
    # Flax shares a mask of attention among batch and heads by default, PyTorch does not.
    shared = None if settings.mistake == "shared" else False

    @nnx.jit
    def step(state: Any, batch: Any, i: Any) -> jax.Array:
        model, optimizer, average = state
        images, labels = batch

        def mean_loss(model: nnx.Module) -> jax.Array:
            bound = regjax.keyed.bind(model, root, i, names=sites, broadcast_dropout=shared)
            logits = bound(images)
            targets = jax.nn.one_hot(labels, CLASSES, dtype=logits.dtype)
            targets = optax.smooth_labels(targets, SMOOTHING)
            return optax.softmax_cross_entropy(logits, targets).mean()

        loss, gradient = nnx.value_and_grad(mean_loss)(model)
        # With the 1e-6 of PyTorch, which optax.clip_by_global_norm does not have.
        factor = jnp.minimum(1.0, MAX_NORM / (optax.tree.norm(gradient) + 1e-6))
        optimizer.update(model, jax.tree.map(lambda g: g * factor, gradient))
        new, old = (nnx.state(each, nnx.Param) for each in (model, average))
        nnx.update(average, optax.incremental_update(new, old, 1 - AVERAGE))
        return loss

    state = model, optimizer, average
    return JaxStep(state, step, averages=lambda state: state[2]), leaves


def drop_paths(model: Any) -> list[float]:
    """Return the rates at which the blocks drop paths, which timm rounds to float32."""
    return [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]


def with_mistake(
    mistake: str, rates: list[float]
) -> tuple[dict[str, str | Leaf], dict[str, str], list[float]]:
    """Return the names of parameters and sites, and the rates of dropped paths, with a mistake."""
    names, sites, rates = dict(NAMES), dict(SITES), list(rates)
    if mistake == "swap":
        for role, start in (("key", 2 * WIDTH), ("value", WIDTH)):
            section = start, start + WIDTH
            path, fused = f"blocks/1/attention/{role}", "blocks.1.attn.qkv"
            names[f"{path}/kernel"] = Leaf(f"{fused}.weight", (1, 0), section)
            names[f"{path}/bias"] = Leaf(f"{fused}.bias", section=section)
    if mistake == "site":
        sites["blocks/1/up_dropout"] = "blocks.1.mlp.drop"
    if mistake == "path":
        rates[2] += 0.01
    return names, sites, rates


def changed_by(mistake: str, adamw: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return the optimizer, with a mistake."""
    if mistake == "rate":
        return optax.chain(adamw, optax.scale(1.02))
    if mistake == "decay":

        def is_decayed(params: Any) -> Any:
            return regjax.decay_mask(params, [("blocks/1/up/bias", True), ("**", False)])

        late = regjax.optim.add_independent_weight_decay(
            LEARNING_RATE * WEIGHT_DECAY, mask=is_decayed
        )
        return optax.chain(adamw, late)
    return adamw


def batches(settings: Settings) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return random batches of handwritten digits, enlarged, with channels last."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 8 - 1).astype(settings.dtype).reshape(-1, 8, 8, 1)
    images = images.repeat(SIZE // 8, axis=1).repeat(SIZE // 8, axis=2)
    rng = np.random.default_rng(0)
    picks = [rng.integers(0, len(labels), ROWS) for _ in range(settings.steps)]
    return [(images[i], labels[i]) for i in picks]
