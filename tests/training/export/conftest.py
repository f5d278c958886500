import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.export.tiny_export import command
from training.cli import export
from training.data.digits import draw


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    model = command(folder)  # writes the files that the rest names
    with_embedding = ["--embedding", str(folder / "own.safetensors")]
    adaptive = ["--calibrations", f"{folder / 'atm.json'},{folder / 'adaptive-dtem.json'}"]
    assert export.main([*model, *with_embedding, *adaptive, "--formats", "onnx,torchscript"]) == 0
    return folder / "store" / "tiny" / "1"


@pytest.fixture(scope="session")
def manifest(published: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((published / "manifest.json").read_text())
    return content


@pytest.fixture(scope="session")
def pixels() -> Tensor:
    return torch.stack([torch.from_numpy(draw("validation", index).image) for index in range(200)])
