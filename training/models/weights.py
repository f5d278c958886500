"""Weights in safetensors files, with an embedding's rows after those of the qkv layers.

A safetensors file orders tensors of one type by name. So `….qkv.weight_embedding` directly follows
`….qkv.weight`. The joined matrix is one range of the file, and the ViT's matrix is the start of
that range.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.models.embedding import DecoupledEmbedding

EMBEDDING_ROWS = "_embedding"
_IS_ROWS = re.compile(rf"blocks\.\d+\.attn\.qkv\.(weight|bias){EMBEDDING_ROWS}")
_MAX_NAMED = 5


class WeightsMismatch(ValueError):  # noqa: N818
    """The tensors of a weights file are not those of the model; the message names them."""


def save_weights(model: nn.Module, embedding: DecoupledEmbedding | None, path: Path) -> None:
    """Write all tensors of the model, and the embedding's rows after the qkv layers."""
    tensors = dict(model.state_dict())
    layers: Any = embedding.blocks if embedding is not None else ()
    for index, layer in enumerate(layers):
        for name, rows in layer.named_parameters():
            tensors[f"blocks.{index}.attn.qkv.{name}{EMBEDDING_ROWS}"] = rows.detach()
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load all tensors of the model from a safetensors file, strictly, without embedding rows.

    Raises: FileNotFoundError; WeightsMismatch where the file is not safetensors, or tensors are
        missing, unexpected or of another shape. The model is then unchanged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}")
    try:
        found = {name: tensor for name, tensor in load_file(path).items() if not _IS_ROWS.fullmatch(name)}
    except (SafetensorError, OSError) as err:
        raise WeightsMismatch(f"{path} is not a safetensors file: {err}") from err
    problems = differences(model.state_dict(), found)
    if problems:
        raise WeightsMismatch(f"{path} does not fit {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict(found, strict=True)


def weights_digest(module: nn.Module) -> str:
    """Return the SHA-256 of the names and bytes of all tensors of a module."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Return how tensors differ by name and shape: one phrase for each kind of difference."""
    other_shape = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    kinds = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": other_shape,
    }
    return [f"{len(names)} {kind}: {_shortened(names)}" for kind, names in kinds.items() if names]


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:_MAX_NAMED]) + (", …" if len(names) > _MAX_NAMED else "")
