"""A tiny model with an embedding, and the command that exports it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.training.tiny_vit import ARGUMENTS, tiny_vit
from training.data.preprocessing import InputRule
from training.export.parity import MIN_MARGIN, margins
from training.merging.adaptive import Thresholds
from training.models.calibration import Calibration, Measured
from training.models.classifier import AdaptiveClassifier, ServedClassifier, frozen_classifier
from training.models.embedding import DecoupledEmbedding, EmbeddingConfig
from training.models.frozen import FrozenModule
from training.models.weights import weights_digest
from training.tasks.task import output_tensors

RATES = (0, 8, 32)
GRAPHS = [("none", 0), *((policy, r) for policy in ("tome", "dtem") for r in RATES if r)]
# As timm has it, not as the digits have it.
RULE = InputRule(height=112, width=112, resize_height=124, resize_width=124, mean=(0.5,) * 3, std=(0.5,) * 3)


def embedding() -> DecoupledEmbedding:
    torch.manual_seed(5)
    return DecoupledEmbedding(EmbeddingConfig(depth=3, width=32, dim=8, r=16, recipe="some.toml"))


def calibrations() -> list[Calibration]:
    """Return thresholds at which the tiny model merges much of some images and little of others."""
    measured = Measured("digits-on-photographs", "validation", 100, True, 0.1, 0.05, 0.0, (-1.0, 1.0))
    weights = weights_digest(tiny_vit())
    rest = (0.0, 0, 160, measured, measured)
    return [
        Calibration("features", Thresholds(0.9, 0.05, 0.5, 2), weights, None, *rest),
        Calibration("embedding", Thresholds(0.95, 0.05, 0.5, 1), weights, weights_digest(embedding()), *rest),
    ]


def frozen_adaptive(policy: str) -> AdaptiveClassifier:
    (found,) = [calibration for calibration in calibrations() if calibration.policy == policy]
    return AdaptiveClassifier(found.model(tiny_vit(), embedding()), RULE).eval()


def frozen(policy: str, r: int) -> ServedClassifier:
    return frozen_classifier(tiny_vit(), RULE, r, metric=embedding() if policy == "dtem" else "keys")


def command(folder: Path) -> list[str]:
    if not (folder / "weights.safetensors").exists():
        save_file(tiny_vit().state_dict(), folder / "weights.safetensors")
        embedding().save(folder / "own.safetensors")
        for calibration in calibrations():
            calibration.save(folder / f"{calibration.policy}.json")
        (folder / "store").mkdir()
    model = ["--architecture", "vit_tiny_patch16_224", "--weights", str(folder / "weights.safetensors")]
    model += ["--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5", "--crop-pct", "0.9"]
    data = [
        "--data",
        "digits",
        "--arguments",
        json.dumps(ARGUMENTS),
        "--n-images",
        "300",
        "--rates",
        ",".join(map(str, RATES)),
    ]
    return [*model, *data, "--name", "tiny", "--store", str(folder / "store")]


def clear(module: FrozenModule, pixels: Tensor, n_images: int) -> Tensor:
    """Return images whose decisions are the same in every correct implementation."""
    found = pixels[margins(module, pixels) >= MIN_MARGIN][:n_images]
    assert len(found) >= min(n_images, 32)
    return found


@torch.no_grad()
def largest_difference(
    module: FrozenModule, exported: Callable[[Tensor], Any], pixels: Tensor, batches: tuple[int, ...]
) -> float:
    """Return the largest difference of the result from eager, over batch sizes."""
    differences = []
    for n_images in batches:
        eager, found = output_tensors(module(pixels[:n_images])), output_tensors(exported(pixels[:n_images]))
        differences.append(float((eager[0] - found[0]).abs().max()))
        assert all(torch.allclose(one, other, rtol=1e-6) for one, other in zip(eager[1:], found[1:], strict=True))
    return max(differences)
