"""How what this rank holds relates to the whole model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from picotron_core.parallel.mesh import Mesh
from picotron_core.parallel.pipeline import Pipeline
from picotron_core.parallel.tensor import Cut


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """shapes: of the whole model's parameters, in its order.
    cuts: parameter -> how it is cut; what is missing is whole on every rank.
    owners: parameter -> the first stage that has it; what is missing is on the one stage there is.
    pipeline: of this rank, where there are stages.
    """

    mesh: Mesh
    shapes: Mapping[str, torch.Size]
    cuts: Mapping[str, Cut] = field(default_factory=dict)
    owners: Mapping[str, int] = field(default_factory=dict)
    pipeline: Pipeline | None = None

    @property
    def has_loss(self) -> bool:
        """Whether the loss of a batch is to be had here: on the last stage, of whose ranks along tp
        all have the same, and one counts.
        """
        return self.mesh.pp.index == self.mesh.pp.size - 1 and self.mesh.tp.is_first

    def counts(self, name: str) -> bool:
        """Whether this rank's share of a parameter belongs in a sum over all ranks: of those that
        hold the same, one does.
        """
        mine = self.owners.get(name, 0) == self.mesh.pp.index
        return mine and (name in self.cuts or self.mesh.tp.is_first)

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a parameter that its stage has."""
        return self.cuts[name].part(whole) if name in self.cuts else whole

    def wholes(self, parts: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Name and whole tensor of every parameter, on every rank. A collective."""
        some = next(iter(parts.values()))
        for name, shape in self.shapes.items():
            owner = self.owners.get(name, 0)
            if name in parts:
                part = parts[name]
                whole = self.cuts[name].join(part) if name in self.cuts else part
            if owner != self.mesh.pp.index:
                whole = some.new_empty(shape)
            whole = whole.detach().contiguous()
            self.mesh.pp.broadcast(whole, owner)  # over pp: broadcast
            yield name, whole


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """Of a whole model; a tied head counts as the embedding."""
    return {name: parameter.shape for name, parameter in model.named_parameters()}
