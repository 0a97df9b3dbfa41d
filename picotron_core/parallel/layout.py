"""How what this rank holds relates to the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from picotron_core.parallel.mesh import Mesh
from picotron_core.parallel.tensor import Cut


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """cuts: parameter -> how it is cut; what is missing is whole on every rank."""

    mesh: Mesh
    cuts: Mapping[str, Cut] = field(default_factory=dict)

    def counts(self, name: str) -> bool:
        """Whether this rank's share of a parameter belongs in a sum over all ranks: of those that
        hold the same, one does.
        """
        return name in self.cuts or self.mesh.tp.is_first

    def part(self, name: str, whole: Tensor) -> Tensor:
        return self.cuts[name].part(whole) if name in self.cuts else whole

    def whole(self, name: str, part: Tensor) -> Tensor:
        """A collective, if the parameter is cut."""
        return self.cuts[name].join(part) if name in self.cuts else part

    def whole_shape(self, name: str, part: Tensor) -> torch.Size:
        shape = list(part.shape)
        if name in self.cuts:
            shape[self.cuts[name].dim] = self.cuts[name].size
        return torch.Size(shape)
