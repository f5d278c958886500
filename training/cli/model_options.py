"""The options by which every command is told its model and its data: one of our runs, or any timm ViT."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from training.data.preprocessing import InputRule
from training.data.sources import REFERENCE_INPUT, Source, open_source
from training.models.calibration import Calibration, CalibrationMismatch, load_calibration
from training.models.classifier import input_rule
from training.models.embedding import DecoupledEmbedding, load_embedding
from training.models.vit import load_vit

EMBEDDING = "embedding.safetensors"


@dataclass(frozen=True)
class ChosenModel:
    """A loaded model, what rebuilds it, and how its images are prepared."""

    vit: nn.Module
    timm_name: str
    timm_arguments: dict[str, Any]
    rule: InputRule
    recipe: str
    embedding: DecoupledEmbedding | None = None


def add_model_options(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("the model: --run or --published, or --architecture with --weights")
    model.add_argument("--run", type=Path, help="folder of a training run (recipe.json, weights.safetensors)")
    model.add_argument("--published", type=Path, help="a version in the store, e.g. model_store/reference/4")
    model.add_argument("--architecture", help="a timm name, e.g. deit_small_patch16_224")
    model.add_argument("--weights", help="'pretrained' (timm's own) or a local safetensors file")
    model.add_argument("--arguments", type=json.loads, default={}, help="JSON for timm.create_model")
    model.add_argument("--embedding", type=Path, help="DTEM's, a safetensors file; default: the run's or version's own")
    data = parser.add_argument_group("the data")
    data.add_argument(
        "--data", default="digits", help="'digits' (the reference task) or a folder with one folder a class"
    )
    data.add_argument("--split", default="test", choices=["train", "validation", "test"], help="of the reference task")
    data.add_argument("--n-images", type=int, help="how many images (default: 10,000 digits, or the whole folder)")


def chosen_model(options: argparse.Namespace) -> ChosenModel:
    """Load what the options name, and the embedding that is beside it or named by itself.

    Raises: EmbeddingMismatch; ValueError where they name no model or more than one, or weights that are neither a file
        nor 'pretrained'.
    """
    named = [name for name in ("run", "published", "architecture") if getattr(options, name)]
    if len(named) != 1:
        raise ValueError(f"expected exactly one of --run, --published and --architecture, not {named or 'none'}")
    chosen = _chosen_vit(options)
    beside = (options.run or options.published or Path()) / EMBEDDING
    file = options.embedding or (beside if beside.is_file() and not options.architecture else None)
    if file is None:
        return chosen
    embedding = load_embedding(file).eval()
    embedding.check_fits(chosen.vit)
    return replace(chosen, embedding=embedding)


def _chosen_vit(options: argparse.Namespace) -> ChosenModel:
    if options.run:
        recipe = json.loads((options.run / "recipe.json").read_text())
        name, arguments = recipe["architecture"], recipe["arguments"]
        vit = load_vit(name, weights=options.run / "weights.safetensors", **arguments)
        is_digits = recipe.get("data", {}).get("source", "digits") == "digits"
        rule = REFERENCE_INPUT if is_digits else input_rule(vit)
        return ChosenModel(vit.eval(), name, arguments, rule, recipe["file"])
    if options.published:
        manifest = json.loads((options.published / "manifest.json").read_text())
        name, arguments = manifest["architecture"]["timm_name"], manifest["architecture"]["timm_arguments"]
        vit = load_vit(name, weights=options.published / "weights.safetensors", **arguments)
        return ChosenModel(vit.eval(), name, arguments, _rule_of(manifest["input"]), manifest["training"]["recipe"])
    if not options.weights:
        raise ValueError("--architecture needs --weights: 'pretrained' or a safetensors file")
    weights = "pretrained" if options.weights == "pretrained" else Path(options.weights)
    vit = load_vit(options.architecture, weights=weights, **options.arguments)  # type: ignore[arg-type]
    origin = f"timm {options.architecture}, weights {options.weights}"
    return ChosenModel(vit.eval(), options.architecture, options.arguments, input_rule(vit), origin)


def newest_version(model: Path) -> Path | None:
    """Return the folder of a model's highest version, None where there is none."""
    versions = [folder for folder in model.iterdir() if folder.name.isdigit()] if model.is_dir() else []
    return max(versions, key=lambda folder: int(folder.name), default=None)


def published_rule(folder: Path) -> InputRule:
    """Return how a published version's images are prepared."""
    return _rule_of(json.loads((folder / "manifest.json").read_text())["input"])


def _rule_of(entry: dict[str, Any]) -> InputRule:
    stated: dict[str, Any] = {
        key: value for key, value in entry.items() if key not in ("name", "layout", "dtype", "crop")
    }
    tuples: dict[str, Any] = {key: tuple(value) for key, value in stated.items() if isinstance(value, list)}
    return InputRule(**{**stated, **tuples})


def chosen_source(options: argparse.Namespace, rule: InputRule) -> Source:
    return open_source(options.data, rule, options.n_images, options.split)


def calibrations(text: str) -> list[Calibration]:
    """Read the calibrations that a list of files names."""
    try:
        return [load_calibration(Path(name)) for name in text.split(",")]
    except (CalibrationMismatch, FileNotFoundError) as err:
        raise argparse.ArgumentTypeError(str(err)) from err


def published_calibrations(folder: Path | None) -> list[Calibration]:
    """Read those that a published version was exported with; none where there is no version."""
    if folder is None:
        return []
    variants = json.loads((folder / "manifest.json").read_text())["variants"]
    names = dict.fromkeys(variant["calibration"] for variant in variants if "calibration" in variant)
    return [load_calibration(folder / name) for name in names]


def rates(text: str) -> tuple[int, ...]:
    """Read `0,2,4` or `0:16:2` (end included)."""
    if ":" in text:
        first, last, step = (int(part) for part in text.split(":"))
        return tuple(range(first, last + 1, step))
    return tuple(int(part) for part in text.split(","))
