"""The models of the zoo: small, with random weights, and as their libraries build them.

A case builds a model and its input. Nothing of a model is changed, except that every rate of
dropout that its configuration has is set, and that weights that start at or near zero are
drawn: a branch that is multiplied by zero would hide its draws from the output.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

RATE = 0.1
IDS = torch.arange(2 * 16).reshape(2, 16) % 50 + 5
IMAGE = torch.linspace(-1, 1, 2 * 3 * 64 * 64).reshape(2, 3, 64, 64)
LARGE = nn.functional.interpolate(IMAGE, (224, 224))
VIDEO = torch.linspace(-1, 1, 2 * 3 * 4 * 32 * 32).reshape(2, 3, 4, 32, 32)
AUDIO = torch.sin(torch.arange(2 * 8000).float()).reshape(2, 8000)
SPECTRUM = torch.linspace(-1, 1, 2 * 80 * 64).reshape(2, 80, 64)


class Case(NamedTuple):
    """A model of a library; `name` is unique.

    Attributes:
        name: The library and the model, and the settings where they matter.
        make: Returns the model, in training mode.
        inputs: The arguments of its call, by name; unnamed ones are "0", "1", ….
        config: Returns the configuration, if the model may have a port to Flax.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: dict[str, Tensor]
    config: Callable[[], Any] | None = None

    @property
    def library(self) -> str:
        """Return the name of the library."""
        return self.name.partition("/")[0]

    def build(self) -> nn.Module:
        """Return the model, in training mode, with the same weights in each call."""
        torch.manual_seed(0)
        model = self.make().train()
        with torch.no_grad():
            for parameter in model.parameters():
                is_zero = parameter.ndim > 1 and not parameter.any()
                if is_zero or 0 < parameter.abs().max() < 1e-3:  # such as a layer scale of 1e-6
                    parameter.normal_(std=0.1)
        return model

    def run(self, model: nn.Module) -> list[Tensor]:
        """Return the outputs of a model."""
        positional = [value for name, value in self.inputs.items() if name.isdigit()]
        named = {name: value for name, value in self.inputs.items() if not name.isdigit()}
        return list(_tensors(model(*positional, **named)))


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif hasattr(output, "to_tuple"):
        yield from _tensors(output.to_tuple())
    elif isinstance(output, dict | list | tuple):
        for part in output.values() if isinstance(output, dict) else output:
            yield from _tensors(part)


# --- transformers

# The sizes of a small model, under each of the names that configurations have for them.
SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size"), 32),
    **dict.fromkeys(("word_embed_proj_dim",), 32),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("d_ff", "hidden_dim", "ffn_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("n_layer", "num_layers", "n_layers", "num_key_value_heads"), 2),
    **dict.fromkeys(("num_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("d_kv", "head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "image_size"), 64),
    "patch_size": 16,
    "vocab_size": 100,
    "pad_token_id": 0,
}
TEXT = {"input_ids": IDS}
BOTH = {"input_ids": IDS, "decoder_input_ids": IDS}
PIXELS = {"pixel_values": IMAGE}
WAVES = {"input_values": AUDIO}


def configuration(kind: str, *, sized: bool = True, **settings: Any) -> Any:
    """Return the configuration of a small model, with dropout wherever it has a rate."""
    from transformers import AutoConfig

    default = AutoConfig.for_model(kind)
    known = {*default.to_dict(), *default.attribute_map}
    sizes = {name: size for name, size in SIZES.items() if sized and name in known}
    config = AutoConfig.for_model(kind, **{**sizes, **settings})
    for name, value in vars(config).items():
        is_rate = "drop" in name and isinstance(value, int | float) and not isinstance(value, bool)
        if is_rate and name not in settings:
            # A dropped layer draws nothing: the number of draws would depend on the draws.
            setattr(config, name, 1e-6 if "layerdrop" in name else RATE)
    return config


def hugging(
    kind: str,
    inputs: dict[str, Tensor] = TEXT,
    note: str = "",
    *,
    attention: str | None = None,
    **settings: Any,
) -> Case:
    """Return a base model of transformers, by the type of its configuration."""

    def make() -> nn.Module:
        from transformers import AutoModel

        options = {"attn_implementation": attention} if attention else {}
        return AutoModel.from_config(configuration(kind, **settings), **options)

    name = f"transformers/{kind}" + f" ({note})" * bool(note)
    # The weights do not depend on the attention: one port of each model suffices.
    config = None if attention else lambda: configuration(kind, **settings)
    return Case(name, make, inputs, config)


CONV = {
    "conv_dim": (16, 16),
    "conv_kernel": (10, 8),
    "conv_stride": (10, 8),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
STAGES = {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "patch_size": 4}
TEXT_MODELS = (
    "albert bert bloom camembert clip_text_model cohere convbert deberta-v2 distilbert electra"
    " ernie falcon fnet gemma gpt2 gpt_neox granite layoutlm llama mistral mixtral mobilebert"
    " mpnet nystromformer olmo opt persimmon phi qwen2 rembert roberta roberta-prelayernorm"
    " roformer squeezebert stablelm starcoder2 xglm xlm xlm-roberta xlnet"
)
PAIRS = "bart blenderbot blenderbot-small led longt5 m2m_100 marian mbart mt5 pegasus plbart t5"
VISION = (
    "beit clip_vision_model data2vec-vision deit dinov2 ijepa siglip_vision_model vit vit_mae"
    " vit_msn"
)
SPEECH = "data2vec-audio hubert sew unispeech wav2vec2 wavlm"
PLAIN = "alexnet convnext_tiny mnasnet0_5 mobilenet_v3_small squeezenet1_1"
DEFAULT_SIZES = "cvt focalnet mobilevit poolformer segformer van"
RESIDUAL = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}

EAGER = "bert gpt2 llama mistral opt roberta"

TRANSFORMERS = [
    *(hugging(kind) for kind in TEXT_MODELS.split()),
    hugging(
        "funnel",
        sized=False,
        architectures=["FunnelModel"],  # its configuration has two base models
        block_sizes=[1, 1],
        d_head=8,
        d_inner=64,
        d_model=32,
        n_head=4,
        vocab_size=100,
    ),
    # Its block-sparse attention replaces modules in the first call with a short input.
    hugging("big_bird", attention_type="original_full"),
    hugging("gpt_neo", attention_types=[[["global", "local"], 1]]),
    hugging("gptj", rotary_dim=8),
    *(hugging(kind, BOTH) for kind in PAIRS.split()),
    hugging(
        "whisper",
        {"input_features": SPECTRUM, "decoder_input_ids": IDS},
        max_source_positions=32,
    ),
    *(hugging(kind, PIXELS) for kind in VISION.split()),
    hugging("convnext", PIXELS, **STAGES),
    hugging("convnextv2", PIXELS, **STAGES),
    hugging(
        "pvt",
        PIXELS,
        depths=[1, 1],
        hidden_sizes=[8, 16],
        mlp_ratios=[2, 2],
        num_attention_heads=[1, 2],
        num_encoder_blocks=2,
        patch_sizes=[4, 2],
        sequence_reduction_ratios=[2, 1],
        strides=[4, 2],
    ),
    hugging(
        "swin",
        PIXELS,
        depths=[1, 1],
        embed_dim=16,
        num_heads=[2, 4],
        patch_size=4,
        window_size=4,
    ),
    hugging("yolos", PIXELS, image_size=[64, 64]),
    hugging("regnet", PIXELS, groups_width=8, **RESIDUAL),
    hugging("resnet", PIXELS, **RESIDUAL),
    *(hugging(kind, PIXELS, sized=False) for kind in DEFAULT_SIZES.split()),
    *(hugging(kind, WAVES, **CONV) for kind in SPEECH.split()),
    hugging("data2vec-audio", WAVES, "no SpecAugment", mask_time_prob=0.0, **CONV),
    hugging("hubert", WAVES, "no SpecAugment", apply_spec_augment=False, **CONV),
    hugging("wav2vec2", WAVES, "no SpecAugment", apply_spec_augment=False, **CONV),
    hugging(
        "wav2vec2",
        WAVES,
        "stable layer norm",
        apply_spec_augment=False,
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
        **CONV,
    ),
    hugging(
        "encodec",
        {"input_values": AUDIO[:, None, :3200]},
        codebook_size=16,
        hidden_size=16,
        num_filters=4,
        num_residual_layers=1,
        upsampling_ratios=[4, 2],
    ),
    *(hugging(kind, note="eager attention", attention="eager") for kind in EAGER.split()),
    *(hugging(k, BOTH, "eager attention", attention="eager") for k in ("bart", "t5")),
    hugging("vit", PIXELS, "eager attention", attention="eager"),
    hugging("wav2vec2", WAVES, "eager attention", attention="eager", **CONV),
]


# --- timm and torchvision


def timm(kind: str, image: Tensor = IMAGE, note: str = "", **settings: Any) -> Case:
    """Return a model of timm."""
    options = {"num_classes": 10, "drop_rate": RATE, "drop_path_rate": RATE, **settings}
    options = {name: value for name, value in options.items() if value is not None}
    name = f"timm/{kind}" + f" ({note})" * bool(note)
    return Case(
        name, lambda: importlib.import_module("timm").create_model(kind, **options), {"0": image}
    )


SMALL = {"img_size": 64}
SHALLOW = {"img_size": 64, "depth": 2}
SHORT = {"img_size": 64, "depths": (1, 1, 1, 1)}
CONVOLUTIONAL = (
    "convnext_atto davit_tiny edgenext_xx_small efficientnet_lite0 inception_next_atto"
    " mobilenetv3_small_050 poolformer_s12 pvt_v2_b0 regnetx_002 rexnet_100 twins_svt_small"
    " caformer_s18"
)
SIZED = (
    "gmixer_24_224 hiera_tiny_224 maxvit_rmlp_pico_rw_256 mixer_s32_224 nest_tiny resmlp_12_224"
    " visformer_tiny"
)
TIMM = [
    timm(
        "vit_tiny_patch16_224",
        note="proj, attn and pos drop",
        proj_drop_rate=RATE,
        attn_drop_rate=RATE,
        pos_drop_rate=RATE,
        **SHALLOW,
    ),
    timm("vit_tiny_patch16_224", note="patch drop", patch_drop_rate=0.25, **SHALLOW),
    timm("test_vit"),
    timm("deit_tiny_patch16_224", **SHALLOW),
    timm("deit3_small_patch16_224", attn_drop_rate=RATE, **SHALLOW),
    timm("eva02_tiny_patch14_224", IMAGE[..., :56, :56], img_size=56, depth=2),
    timm("beit_base_patch16_224", attn_drop_rate=RATE, **SHALLOW),
    timm("cait_xxs24_224", **SHALLOW),
    timm("xcit_nano_12_p16_224", **SHALLOW),
    timm("swin_tiny_patch4_window7_224", window_size=4, attn_drop_rate=RATE, **SHORT),
    timm("swinv2_tiny_window8_256", **SHORT),
    *(timm(kind) for kind in CONVOLUTIONAL.split()),
    *(timm(kind, **SMALL) for kind in SIZED.split()),
    timm("resnet10t", note="drop block", drop_block_rate=RATE),
    timm("resnet18", note="drop block", drop_block_rate=RATE),
    timm("densenet121", drop_path_rate=None),
    timm("efficientformer_l1", LARGE),
    timm("levit_128s", LARGE),
]


def vision(kind: str, inputs: Tensor = IMAGE, **settings: Any) -> Case:
    """Return a model of torchvision."""

    def make() -> nn.Module:
        *folders, name = kind.split(".")
        models = importlib.import_module(".".join(("torchvision.models", *folders)))
        return getattr(models, name)(**settings)

    return Case(f"torchvision/{kind}", make, {"0": inputs})


TEN = {"num_classes": 10}
TORCHVISION = [
    *(vision(kind, **TEN) for kind in PLAIN.split()),
    vision("efficientnet_b0", stochastic_depth_prob=0.3, **TEN),
    vision("densenet121", drop_rate=RATE, **TEN),
    vision("googlenet", init_weights=False, aux_logits=False, **TEN),
    vision("swin_t", dropout=RATE, attention_dropout=RATE, **TEN),
    vision("swin_v2_t", dropout=RATE, **TEN),
    vision(
        "VisionTransformer",
        image_size=64,
        patch_size=32,
        num_layers=2,
        num_heads=4,
        hidden_dim=32,
        mlp_dim=64,
        dropout=RATE,
        attention_dropout=RATE,
    ),
    vision(
        "MaxVit",
        input_size=(64, 64),
        stem_channels=16,
        partition_size=4,
        block_channels=[8, 16],
        block_layers=[1, 1],
        head_dim=8,
        stochastic_depth_prob=0.2,
    ),
    vision(
        "segmentation.deeplabv3_mobilenet_v3_large",
        weights=None,
        weights_backbone=None,
        num_classes=3,
    ),
    vision("video.swin3d_t", VIDEO, dropout=RATE, num_classes=5),
]

CASES = {case.name: case for case in (*TORCHVISION, *TIMM, *TRANSFORMERS)}
