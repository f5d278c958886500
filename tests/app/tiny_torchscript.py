"""The TorchScript graphs of the tiny store; a separate module, because it needs PyTorch."""

import warnings
from pathlib import Path

import torch

from tests.app.tiny_store import ATM_BIAS, DEPTH, N_TOKENS, SIDE, WEIGHT, bias_of


class Tiny(torch.nn.Module):
    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, r: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.from_numpy(WEIGHT.copy()))
        self.register_buffer("bias", torch.from_numpy(bias_of(r)))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().mean((1, 2)) / 255 @ self.weight + self.bias


class TinyAdaptive(Tiny):
    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # type: ignore[override]
        merged = (pixels.float().mean((1, 2, 3)) / 255 * 30).long()
        tokens = N_TOKENS - merged.unsqueeze(1) * torch.arange(DEPTH + 1)
        return super().forward(pixels), tokens, tokens.sum(1).float() / (N_TOKENS * (DEPTH + 1))


def write_adaptive_graph(path: Path) -> None:
    """Write the graph of policy atm."""
    _write(TinyAdaptive(ATM_BIAS), path)


def write_graph(path: Path, r: int) -> None:
    """Write the graph of a rate."""
    _write(Tiny(r), path)


def _write(module: torch.nn.Module, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, torch.zeros(2, SIDE, SIDE, 3, dtype=torch.uint8))  # type: ignore[no-untyped-call]
        torch.jit.save(traced, str(path))
