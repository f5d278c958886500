"""The decoupled embedding: the learned metric of DTEM, a small addition to an unchanged ViT."""

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
    """An embedding file is invalid, or belongs to a ViT of another shape; the message says which."""


@dataclass(frozen=True)
class EmbeddingConfig:
    """The shape of an embedding, and how it was trained.

    depth, width: of the ViT. dim: d', the width of the embedding. r: the rate of training.
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
    """Return the published d': 64, or 128 for a ViT of width 1024 or more."""
    return 128 if width >= 1024 else 64


class DecoupledEmbedding(nn.Module):
    """A trainable `Metric`: one affine layer per block on the attention's input, which is detached.

    So the loss reaches it only through the merging that it causes.
    Source: arXiv 2412.10569, section 3.1.
    """

    def __init__(self, config: EmbeddingConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(nn.Linear(config.width, config.dim) for _ in range(config.depth))

    def forward(self, *, block: int, hidden: Tensor, keys: Tensor | None = None) -> Tensor:
        """Embed in the precision of the weights, also under autocast: small differences matter.

        Shapes: hidden (B, N, C) -> (B, N, d')
        """
        layer: Any = self.blocks[block]
        with torch.autocast(hidden.device.type, enabled=False):
            embedded: Tensor = layer(hidden.detach().to(layer.weight.dtype))
        return embedded

    def check_fits(self, vit: nn.Module) -> None:
        """Raises: EmbeddingMismatch where the number of blocks or the width differ from the ViT's."""
        model: Any = vit
        found, expected = (len(model.blocks), int(model.embed_dim)), (self.config.depth, self.config.width)
        if found != expected:
            raise EmbeddingMismatch(
                f"the embedding belongs to a ViT with {expected[0]} blocks of width {expected[1]}, "
                f"not {found[0]} of width {found[1]}"
            )

    def save(self, path: Path) -> None:
        """Write weights and config to one safetensors file."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        # safetensors writes several metadata keys in random order, so everything is under one key.
        save_file(tensors, path, metadata={_FORMAT: json.dumps(asdict(self.config))})


def load_embedding(path: Path) -> DecoupledEmbedding:
    """Read a file that `DecoupledEmbedding.save` wrote.

    Raises: FileNotFoundError; EmbeddingMismatch for another kind of file, or tensors that do not
        match the config.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no embedding file {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - file is not a dict
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


def start_from(embedding: DecoupledEmbedding, file: Path) -> None:
    """Load the weights of another embedding, to train on from them.

    Raises: FileNotFoundError; EmbeddingMismatch where depth, width or d' differ.
    """
    given = load_embedding(file)
    expected, found = embedding.config, given.config
    if (expected.depth, expected.width, expected.dim) != (found.depth, found.width, found.dim):
        raise EmbeddingMismatch(
            f"embedding_weights {file} has {found.depth} blocks of width {found.width} and d' {found.dim}, "
            f"the recipe's {expected.depth} of width {expected.width} and d' {expected.dim}"
        )
    embedding.load_state_dict(given.state_dict())


class JoinedProjections(nn.Module):
    """The qkv layers with the embedding's rows appended: at inference one GEMM computes both.

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
        """Return queries, keys, values and the embedding.

        Shapes: (B, N, C) -> three of (B, N, A), (B, N, d')

        A single split avoids another copy of qkv.
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
