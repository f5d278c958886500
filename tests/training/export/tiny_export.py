"""A tiny model with an embedding, and the command that exports it."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.training.tiny_vit import ARGUMENTS, tiny_vit
from training.data.preprocessing import InputRule
from training.merging.adaptive import Thresholds
from training.models.calibration import Calibration, Measured
from training.models.classifier import AdaptiveClassifier, ServedClassifier, frozen_classifier
from training.models.embedding import DecoupledEmbedding, EmbeddingConfig
from training.models.weights import weights_digest

RATES = (0, 8, 32)
GRAPHS = [("none", 0), *((policy, r) for policy in ("tome", "dtem") for r in RATES if r)]
# As timm has it.
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
        shutil.copy("model_store/manifest.schema.json", folder / "store")
    model = ["--architecture", "vit_tiny_patch16_224", "--weights", str(folder / "weights.safetensors")]
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
