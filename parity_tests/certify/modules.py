"""The modules of a running script, which are found among the objects of the garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch

from parity_tests import seeded
from regjax.interop._leaves import unwrapped


class Modules:
    """The modules of a script, with their paths in the outermost one."""

    def __init__(self) -> None:
        # The modules are kept, since another object could get the identity of one that is gone.
        self._known: dict[int, tuple[torch.nn.Module, str]] = {}
        self._entered: dict[int, int] = {}
        self._outermost: list[torch.nn.Module] = []  # those of the last search, which takes 0.1 s

    def path(self, module: torch.nn.Module) -> str:
        """Return the path of a module that is entered."""
        if id(module) not in self._known:
            self._outermost = _outermost()
            for outermost in self._outermost:
                paths = seeded.paths_of(outermost)
                if id(module) in paths:
                    modules = unwrapped(outermost).modules()
                    self._known |= {id(each): (each, paths[id(each)]) for each in modules}
            self._known.setdefault(id(module), (module, ""))
        self._entered.setdefault(id(module), len(self._entered))
        return self._known[id(module)][1]

    def owner(self, tensors: Iterable[torch.Tensor]) -> torch.nn.Module | None:
        """Return the outermost module with all of some parameters, the first entered of several."""
        wanted = {id(tensor) for tensor in tensors}
        found = _with(wanted, self._outermost) or _with(wanted, _outermost())
        last = len(self._entered)
        return min(found, key=lambda module: self._entered.get(id(module), last), default=None)


def _with(tensors: set[int], modules: Iterable[torch.nn.Module]) -> list[torch.nn.Module]:
    return [module for module in modules if tensors <= {id(p) for p in module.parameters()}]


def _outermost() -> list[torch.nn.Module]:
    """Return the modules that are in no other one."""
    # By type, because `isinstance` would call properties of unrelated objects; there are millions
    # of objects, and few types.
    objects = gc.get_objects()
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, torch.nn.Module)}
    modules = [each for each in objects if type(each) in kinds]
    inner = {id(child) for module in modules for child in module._modules.values()}
    return [module for module in modules if id(module) not in inner]
