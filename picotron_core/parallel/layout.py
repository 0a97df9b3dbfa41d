"""How what this rank holds relates to the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from picotron_core.parallel.mesh import Mesh
from picotron_core.parallel.piece import Piece, whole
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

    def piece(self, name: str, span: tuple[int, int]) -> Piece:
        """The place in the whole parameter of some numbers of this rank's flat one."""
        shape, cut = self.shapes[name], self.cuts.get(name)
        numel, (low, high) = shape.numel(), span
        if cut is None:
            return replace(whole(numel), low=low, high=high)
        start, stop = cut.bounds
        inner = shape[cut.dim + 1 :].numel()
        return Piece(
            numel=numel,
            row=shape[cut.dim] * inner,
            start=start * inner,
            stop=stop * inner,
            width=cut.part_size * inner,
            low=low,
            high=high,
        )


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """Of a whole model; a tied head counts as the embedding."""
    return {name: parameter.shape for name, parameter in model.named_parameters()}
