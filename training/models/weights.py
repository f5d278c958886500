"""Weights in a local safetensors file: loaded all or none, and saved with an embedding's rows behind the qkv layers'.

A safetensors file has its tensors of one type in the order of their names. So `….qkv.weight_embedding` lies right
behind `….qkv.weight`, and the matrix of both is one stretch of the file, of which the ViT's own is the beginning.
"""

import hashlib
import re
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
    """A weights file does not hold exactly the tensors of the model; the message names file and tensors."""


def save_weights(model: nn.Module, embedding: DecoupledEmbedding | None, path: Path) -> None:
    """Write every tensor of the model and, behind those of the qkv layers, the embedding's rows."""
    tensors = dict(model.state_dict())
    layers: Any = embedding.blocks if embedding is not None else ()
    for index, layer in enumerate(layers):
        for name, rows in layer.named_parameters():
            tensors[f"blocks.{index}.attn.qkv.{name}{EMBEDDING_ROWS}"] = rows.detach()
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load every tensor of the model from a safetensors file, strictly; an embedding's rows in it are left out.

    Raises: FileNotFoundError; WeightsMismatch where the file is not safetensors, or tensors are missing, unexpected or
        of another shape. The model is then as it was.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}")
    try:
        found = {name: tensor for name, tensor in load_file(path).items() if not _IS_ROWS.fullmatch(name)}
    except (SafetensorError, OSError) as err:
        raise WeightsMismatch(f"{path} is not a safetensors file: {err}") from err
    problems = _differences(model.state_dict(), found)
    if problems:
        raise WeightsMismatch(f"{path} does not fit {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict(found, strict=True)


def weights_digest(module: nn.Module) -> str:
    """Return the SHA-256 of all tensors of a module, names and bits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _differences(expected: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    misshaped = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    kinds = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "mis-shaped": misshaped,
    }
    return [f"{len(names)} {kind}: {_shortened(names)}" for kind, names in kinds.items() if names]


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:_MAX_NAMED]) + (", …" if len(names) > _MAX_NAMED else "")
