"""The TorchScript graphs of the tiny store; apart, because they need PyTorch."""

import warnings
from pathlib import Path

import torch

from tests.app.tiny_store import SIDE, WEIGHT, bias_of


class Tiny(torch.nn.Module):
    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, r: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.from_numpy(WEIGHT.copy()))
        self.register_buffer("bias", torch.from_numpy(bias_of(r)))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().mean((1, 2)) / 255 @ self.weight + self.bias


def write_graph(path: Path, r: int) -> None:
    """Write the graph of a rate."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Tiny(r), torch.zeros(2, SIDE, SIDE, 3, dtype=torch.uint8))  # type: ignore[no-untyped-call]
        torch.jit.save(traced, str(path))
