"""Options for model and data that all commands share."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from training.data.digits import SPLITS
from training.data.preprocessing import InputRule
from training.data.sources import DATASETS, REFERENCE_DATASET, Source, find_dataset, open_source
from training.models.calibration import Calibration, CalibrationMismatch, load_calibration
from training.models.classifier import CLASSIFY, input_rule
from training.models.embedding import DecoupledEmbedding, load_embedding
from training.tasks import TASKS, find_task
from training.tasks.task import Task

EMBEDDING = "embedding.safetensors"


@dataclass(frozen=True)
class ChosenModel:
    """A loaded model, the arguments that rebuild it, and the preprocessing of its images."""

    vit: nn.Module
    timm_name: str
    timm_arguments: dict[str, Any]
    rule: InputRule
    recipe: str
    embedding: DecoupledEmbedding | None = None
    task: Task = TASKS[CLASSIFY]


def add_model_options(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model", "one of --run, --published, and --architecture with --weights")
    model.add_argument("--run", type=Path, help="folder of a training run (recipe.json, weights.safetensors)")
    model.add_argument("--published", type=Path, help="a version in the store, e.g. model_store/reference/5")
    model.add_argument("--architecture", help="a timm name, e.g. deit_small_patch16_224")
    model.add_argument("--weights", help="'pretrained' (timm's own) or a local safetensors file")
    model.add_argument("--arguments", type=json.loads, default={}, help="JSON arguments for timm.create_model")
    model.add_argument(
        "--task", default=CLASSIFY, choices=TASKS, help="of --run or --architecture; default: %(default)s"
    )
    model.add_argument(
        "--embedding", type=Path, help="embedding of DTEM, a safetensors file; default: that of the run or version"
    )
    data = parser.add_argument_group("data")
    named = ", ".join(DATASETS)
    data.add_argument(
        "--data",
        default=REFERENCE_DATASET,
        help=f"a dataset ({named}) or a folder with one subfolder per class; default: the reference task",
    )
    data.add_argument("--split", default="test", choices=SPLITS, help="split of a dataset that has splits")
    data.add_argument("--n-images", type=int, help="number of images; default: 10,000 digits, or the whole folder")


def chosen_model(options: argparse.Namespace) -> ChosenModel:
    """Load the model that the options name, with its embedding.

    Raises: EmbeddingMismatch; ValueError where the options name no model or several, or invalid
        weights.
    """
    named = [name for name in ("run", "published", "architecture") if getattr(options, name)]
    if len(named) != 1:
        raise ValueError(f"expected exactly one of --run, --published and --architecture, not {named or 'none'}")
    chosen = _chosen_vit(options)
    default = (options.run or options.published or Path()) / EMBEDDING
    file = options.embedding or (default if default.is_file() and not options.architecture else None)
    if file is None:
        return chosen
    embedding = load_embedding(file).eval()
    embedding.check_fits(chosen.vit)
    return replace(chosen, embedding=embedding)


def _chosen_vit(options: argparse.Namespace) -> ChosenModel:
    if options.run:
        recipe = json.loads((options.run / "recipe.json").read_text())
        name, arguments, task = recipe["architecture"], recipe["arguments"], find_task(options.task)
        vit = task.load(name, weights=options.run / "weights.safetensors", **arguments)
        dataset = find_dataset(recipe.get("data", {}).get("source", REFERENCE_DATASET))
        rule = dataset.rule(lambda: input_rule(vit))
        return ChosenModel(vit.eval(), name, arguments, rule, recipe["file"], task=task)
    if options.published:
        manifest = json.loads((options.published / "manifest.json").read_text())
        name, arguments = manifest["architecture"]["timm_name"], manifest["architecture"]["timm_arguments"]
        task, rule = find_task(manifest.get("task", CLASSIFY)), _rule_of(manifest["input"])
        vit = task.load(name, weights=options.published / "weights.safetensors", **arguments)
        return ChosenModel(vit.eval(), name, arguments, rule, manifest["training"]["recipe"], task=task)
    if not options.weights:
        raise ValueError("--architecture needs --weights: 'pretrained' or a safetensors file")
    weights = "pretrained" if options.weights == "pretrained" else Path(options.weights)
    task = find_task(options.task)
    vit = task.load(options.architecture, weights=weights, **options.arguments)
    origin = f"timm {options.architecture}, weights {options.weights}"
    return ChosenModel(vit.eval(), options.architecture, options.arguments, input_rule(vit), origin, task=task)


def newest_version(model: Path) -> Path | None:
    """Return the folder of a model's latest version, None where there is none."""
    versions = [folder for folder in model.iterdir() if folder.name.isdigit()] if model.is_dir() else []
    return max(versions, key=lambda folder: int(folder.name), default=None)


def published_rule(folder: Path) -> InputRule:
    """Return the preprocessing of a published version."""
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
    """Parse a comma-separated list of calibration files."""
    try:
        return [load_calibration(Path(name)) for name in text.split(",")]
    except (CalibrationMismatch, FileNotFoundError) as err:
        raise argparse.ArgumentTypeError(str(err)) from err


def published_calibrations(folder: Path | None) -> list[Calibration]:
    """Read the calibrations of a published version; an empty list without a version."""
    if folder is None:
        return []
    variants = json.loads((folder / "manifest.json").read_text())["variants"]
    names = dict.fromkeys(variant["calibration"] for variant in variants if "calibration" in variant)
    return [load_calibration(folder / name) for name in names]


def rates(text: str) -> tuple[int, ...]:
    """Parse rates: `0,2,4`, or `0:16:2` with the end included."""
    if ":" in text:
        first, last, step = (int(part) for part in text.split(":"))
        return tuple(range(first, last + 1, step))
    return tuple(int(part) for part in text.split(","))
