"""Events for observers that belong to no framework."""

from __future__ import annotations

import dataclasses


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
