"""Weights from a local safetensors file, all of them or none."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

_MAX_NAMED = 5


class WeightsMismatch(ValueError):  # noqa: N818
    """A weights file does not hold exactly the tensors of the model; the message names file and tensors."""


def load_weights(model: nn.Module, path: Path) -> None:
    """Load every tensor of the model from a safetensors file, strictly.

    Raises: FileNotFoundError; WeightsMismatch where the file is not safetensors, or tensors are missing, unexpected or
        of another shape. The model is then as it was.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}")
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as err:
        raise WeightsMismatch(f"{path} is not a safetensors file: {err}") from err
    problems = _differences(model.state_dict(), found)
    if problems:
        raise WeightsMismatch(f"{path} does not fit {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict(found, strict=True)


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
