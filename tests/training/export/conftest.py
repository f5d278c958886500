import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from tests.training.commands import dtem
from tests.training.export.tiny_export import command
from training.data.digits import draw
from training.export import formats
from training.export.formats import GraphFormat
from training.models.frozen import FrozenModule


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    model = command(folder)  # writes the files that the rest names
    with_embedding = ["--embedding", str(folder / "own.safetensors")]
    adaptive = ["--calibrations", f"{folder / 'atm.json'},{folder / 'adaptive-dtem.json'}"]
    assert dtem("export", [*model, *with_embedding, *adaptive, "--formats", "onnx,torchscript"]) == 0
    return folder / "store" / "tiny" / "1"


@pytest.fixture(scope="session")
def manifest(published: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((published / "manifest.json").read_text())
    return content


@pytest.fixture
def quick_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the formats by a fast one: eager answers, and an empty graph of the file's name.

    In precision int8 the logits are off by 0.05, as those of a quantised graph are.
    """
    classifiers: dict[str, FrozenModule] = {}

    def write(classifier: FrozenModule, example: Tensor, file: Path, weights: Path) -> list[str]:
        classifiers[file.name] = classifier
        graph = onnx.helper.make_graph([], file.name, [], [])
        onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), file)
        return [weights.name]

    def load(offset: float) -> Callable[[Path], Callable[[Tensor], Any]]:
        @torch.no_grad()
        def run(file: Path, pixels: Tensor) -> Any:
            answer = classifiers[file.name](pixels)
            return (answer[0] + offset, *answer[1:]) if isinstance(answer, tuple) else answer + offset

        return lambda file: lambda pixels: run(file, pixels)

    monkeypatch.setattr(
        formats,
        "FORMATS",
        (
            GraphFormat("onnx", "float32", ".onnx", 20, write, load(0.0)),
            GraphFormat("onnx", "int8", ".onnx", 20, write, load(0.05), parity_tolerance=0.1),
        ),
    )


@pytest.fixture(scope="session")
def pixels() -> Tensor:
    return torch.stack([torch.from_numpy(draw("validation", index).image) for index in range(200)])
