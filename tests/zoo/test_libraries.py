"""The packages of the zoo are there, offline, with what the zoo needs of them."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow


def test_transformers_is_offline_and_has_flax_classes():
    import transformers
    from transformers.utils.hub import is_offline_mode

    assert is_offline_mode()
    assert transformers.FlaxBertModel.__module__.endswith("modeling_flax_bert")


def test_models_of_torchvision_and_timm_can_be_built():
    import timm
    from torchvision.models import squeezenet1_1

    assert timm.create_model("test_vit").num_classes == squeezenet1_1().num_classes == 1000
