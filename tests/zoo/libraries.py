"""Load the packages of the extra `zoo`, offline, even without the operators of torchvision."""

from __future__ import annotations

import importlib
import os
import warnings
from importlib.util import find_spec

import torch

NAMES = ("timm", "torchvision", "transformers")
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "USE_TF": "0",
}
# torchvision registers shape functions for its compiled operators when it is imported. A build for
# another PyTorch (PyPI's for CUDA beside a CPU build of PyTorch) has no operators, and fails.
OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor x, Tensor rois, float scale, SymInt ph, SymInt pw, int ratio, bool aligned)"
    " -> Tensor",
    "_roi_align_backward(Tensor grad, Tensor rois, float scale, SymInt ph, SymInt pw, SymInt b,"
    " SymInt c, SymInt h, SymInt w, int ratio, bool aligned) -> Tensor",
    "roi_pool(Tensor x, Tensor rois, float scale, SymInt ph, SymInt pw) -> (Tensor, Tensor)",
    "_roi_pool_backward(Tensor grad, Tensor rois, Tensor argmax, float scale, SymInt ph,"
    " SymInt pw, SymInt b, SymInt c, SymInt h, SymInt w) -> Tensor",
    "ps_roi_align(Tensor x, Tensor rois, float scale, SymInt ph, SymInt pw, int ratio)"
    " -> (Tensor, Tensor)",
    "_ps_roi_align_backward(Tensor grad, Tensor rois, Tensor mapping, float scale, SymInt ph,"
    " SymInt pw, int ratio, SymInt b, SymInt c, SymInt h, SymInt w) -> Tensor",
    "ps_roi_pool(Tensor x, Tensor rois, float scale, SymInt ph, SymInt pw) -> (Tensor, Tensor)",
    "_ps_roi_pool_backward(Tensor grad, Tensor rois, Tensor mapping, float scale, SymInt ph,"
    " SymInt pw, SymInt b, SymInt c, SymInt h, SymInt w) -> Tensor",
    "deform_conv2d(Tensor x, Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt sh,"
    " SymInt sw, SymInt ph, SymInt pw, SymInt dh, SymInt dw, SymInt groups, SymInt offsets,"
    " bool use_mask) -> Tensor",
    "_deform_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor offset, Tensor mask,"
    " Tensor bias, SymInt sh, SymInt sw, SymInt ph, SymInt pw, SymInt dh, SymInt dw,"
    " SymInt groups, SymInt offsets, bool use_mask)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_declared: list[torch.library.Library] = []  # an operator is forgotten with its library


def missing() -> list[str]:
    """Return the names of the packages that are not installed, without importing any."""
    return [name for name in NAMES if find_spec(name) is None]


def load() -> None:
    """Import the packages. No model is ever downloaded.

    Raises:
        ImportError: If one is not installed.
    """
    os.environ.update(OFFLINE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module("torchvision")
        except RuntimeError as error:
            if "operator torchvision::" not in str(error):
                raise
            _declared.append(torch.library.Library("torchvision", "DEF"))
            for operator in OPERATORS:
                _declared[-1].define(operator)
        for name in NAMES:
            importlib.import_module(name)
