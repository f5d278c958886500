"""Frozen modules: what an export writes as a graph, with normalisation and model in one."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from training.data.preprocessing import InputRule
from training.models.macs import count_macs_of
from training.models.vit import MergingVisionTransformer


class FrozenModule(nn.Module):
    """A merging model with the service's input: scaling and normalisation are part of it.

    `forward` takes uint8 pixels (B, H, W, 3) and returns the outputs of the task, in order.
    task: a name in `training.tasks.TASKS`. is_adaptive: whether the number of tokens depends on the
        image.
    """

    task: ClassVar[str]
    is_adaptive: ClassVar[bool]

    def __init__(self, model: MergingVisionTransformer, rule: InputRule) -> None:
        super().__init__()
        self.model = model
        self._size = (rule.height, rule.width)
        self.scale: Tensor
        self.offset: Tensor
        mean, std = torch.tensor(rule.mean), torch.tensor(rule.std)
        self.register_buffer("scale", (1 / (255 * std)).view(3, 1, 1), persistent=False)
        self.register_buffer("offset", (-mean / std).view(3, 1, 1), persistent=False)

    def normalised(self, pixels: Tensor) -> Tensor:
        """Shapes: uint8 (B, H, W, 3) -> float32 (B, 3, H, W)"""
        channels: Tensor = pixels.permute(0, 3, 1, 2).float() * self.scale + self.offset
        return channels

    def gmacs(self) -> float:
        """Count the GMACs of one image, at a fixed rate."""
        image = torch.zeros(1, *self._size, 3, dtype=torch.uint8, device=self.scale.device)
        return count_macs_of(self, image) / 1e9
