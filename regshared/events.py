"""Events for observers, shared by both packages."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from regshared.mask_audit import Segment


@dataclasses.dataclass(frozen=True)
class SiteKey:
    """The event of a key derived by `site_key`.

    Attributes:
        site: The name of the place.
        root: The two words of the root key.
        step: The training step.
        key: The two words of the derived key.
    """

    site: str
    root: tuple[int, int]
    step: int
    key: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class SampledDraw:
    """The event of a mask for an observer that keeps a sample of it.

    Attributes:
        draw: The framework's event; its `mask` and `entering` are one-dimensional samples. That of
            the mask ends with the elements of its segments.
        shape: The shape of the masked values.
        size: The number of elements of the mask.
        kept: The number of kept elements.
        segments: The segments of the mask that a search for copies reads.
    """

    draw: Any
    shape: tuple[int, ...]
    size: int
    kept: int
    segments: Sequence[Segment]
