"""Declare the operators of torchvision where its build for another PyTorch has none.

timm and transformers import torchvision, whose import then fails, although their models need none
of its operators.
"""

from __future__ import annotations

import importlib
import warnings
from importlib.util import find_spec

import torch

# torchvision registers shape functions for these when it is imported. A build for another PyTorch,
# such as PyPI's for CUDA beside a CPU build of PyTorch, has no operators.
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


def declare_missing() -> None:
    """Import torchvision, if it is installed; declare the operators that its build lacks."""
    if find_spec("torchvision") is None:
        return
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
            importlib.import_module("torchvision")
