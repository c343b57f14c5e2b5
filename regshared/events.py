"""What observers are told that no framework has a part in."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class SiteKey:
    """A key was derived by `site_key`.

    Attributes:
        site: the name of the place.
        root: the two words of the root key.
        step: the step of training.
        key: the two words of the derived key.
    """

    site: str
    root: tuple[int, int]
    step: int
    key: tuple[int, int]
