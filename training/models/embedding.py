"""The decoupled embedding: what DTEM learns to compare tokens by, a small add-on to a ViT that stays as it is."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from training.merging.relaxed import Relaxation

_FORMAT = "dtem-embedding"


class EmbeddingMismatch(ValueError):  # noqa: N818
    """An embedding's file cannot be read, or is of a ViT of another shape; the message says which."""


@dataclass(frozen=True)
class EmbeddingConfig:
    """What rebuilds an embedding, and how it was trained.

    depth, width: of the ViT; dim: d', numbers that a token is compared by; r: the rate it was trained at.
    """

    depth: int
    width: int
    dim: int
    r: int
    relaxation: Relaxation = field(default_factory=Relaxation)
    recipe: str = ""

    def __post_init__(self) -> None:
        if min(self.depth, self.width, self.dim) < 1:
            raise ValueError(f"depth {self.depth}, width {self.width} and dim {self.dim} must be at least 1")


def default_dim(width: int) -> int:
    """Return d' as published: 64, or 128 for a ViT of width 1024 and up."""
    return 128 if width >= 1024 else 64


class DecoupledEmbedding(nn.Module):
    """One affine layer per block on what the attention reads, detached: a `Metric` that a loss can teach.

    The loss reaches it through the merging that it causes and by no other way.
    Source: arXiv 2412.10569, section 3.1.
    """

    def __init__(self, config: EmbeddingConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(nn.Linear(config.width, config.dim) for _ in range(config.depth))

    def forward(self, *, block: int, hidden: Tensor, keys: Tensor | None = None) -> Tensor:
        """Embed in the weights' own precision, whatever the autocast: a hundredth of a cosine decides.

        Shapes: hidden (B, N, C) -> (B, N, d')
        """
        layer: Any = self.blocks[block]
        with torch.autocast(hidden.device.type, enabled=False):
            embedded: Tensor = layer(hidden.detach().to(layer.weight.dtype))
        return embedded

    def check_fits(self, vit: nn.Module) -> None:
        """Raises: EmbeddingMismatch where the ViT has other blocks or another width than the one it was trained for."""
        model: Any = vit
        found, expected = (len(model.blocks), int(model.embed_dim)), (self.config.depth, self.config.width)
        if found != expected:
            raise EmbeddingMismatch(
                f"the embedding is of a ViT with {expected[0]} blocks of width {expected[1]}, "
                f"not {found[0]} of width {found[1]}"
            )

    def save(self, path: Path) -> None:
        """Write weights and config to one safetensors file."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, path, metadata={_FORMAT: json.dumps(asdict(self.config))})  # one key: their order is random


def load_embedding(path: Path) -> DecoupledEmbedding:
    """Read what `DecoupledEmbedding.save` wrote.

    Raises: FileNotFoundError; EmbeddingMismatch where it is another kind of file, or its tensors are not its config's.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no embedding file {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (SafetensorError, OSError) as err:
        raise EmbeddingMismatch(f"{path} is not a safetensors file: {err}") from err
    if _FORMAT not in metadata:
        raise EmbeddingMismatch(f"{path} is not a decoupled embedding: its metadata has no {_FORMAT!r}")
    try:
        stated: dict[str, Any] = json.loads(metadata[_FORMAT])
        config = EmbeddingConfig(**{**stated, "relaxation": Relaxation(**stated["relaxation"])})
        embedding = DecoupledEmbedding(config)
        embedding.load_state_dict(tensors, strict=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as err:
        raise EmbeddingMismatch(f"{path}: {err}") from err
    return embedding


class JoinedProjections(nn.Module):
    """The qkv layers with the embedding's rows appended: at inference one GEMM gives both.

    Shapes: weights (3·A + d', C), the ViT's rows first.
    """

    def __init__(self, vit: nn.Module, embedding: DecoupledEmbedding) -> None:
        super().__init__()
        embedding.check_fits(vit)
        model: Any = vit
        self.dim = embedding.config.dim
        self.blocks = nn.ModuleList(
            _joined(block.attn.qkv, own) for block, own in zip(model.blocks, embedding.blocks, strict=True)
        )

    def forward(self, block: int, hidden: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys, values and the embedding. Shapes: (B, N, C) -> three of (B, N, A), (B, N, d')

        Parted at once: to part the embedding from qkv first would copy qkv once more.
        """
        layer: Any = self.blocks[block]
        width = (layer.out_features - self.dim) // 3
        parts: tuple[Tensor, ...] = layer(hidden).split([width, width, width, self.dim], dim=-1)
        return parts


@torch.no_grad()
def _joined(qkv: nn.Linear, own: Any) -> nn.Linear:
    bias = qkv.bias if qkv.bias is not None else torch.zeros(qkv.out_features, device=qkv.weight.device)
    layer = nn.Linear(qkv.in_features, qkv.out_features + own.out_features)
    layer.weight.copy_(torch.cat([qkv.weight, own.weight]))
    layer.bias.copy_(torch.cat([bias, own.bias]))
    return layer
