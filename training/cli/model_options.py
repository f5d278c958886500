"""The model and the images that a command's options name."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from training.cli.options import ModelOptions
from training.data.digits import SPLITS, Split
from training.data.folders import find_classes, read_labels
from training.data.pixel_rule import describe, override, read_rule
from training.data.preprocessing import InputRule
from training.data.sources import (
    DATASETS,
    REFERENCE_DATASET,
    FolderImages,
    Source,
    check_classes,
    find_dataset,
    open_source,
    published_data,
    run_data,
)
from training.models.calibration import Calibration, load_calibration
from training.models.checkpoints import is_source, open_checkpoint
from training.models.classifier import CLASSIFY, SOFTMAX, check_activation, input_rule
from training.models.embedding import DecoupledEmbedding, load_embedding
from training.tasks import TASKS, find_task
from training.tasks.task import Task

EMBEDDING, LABELS = "embedding.safetensors", "labels.json"


@dataclass(frozen=True)
class ChosenModel:
    """A loaded model, the arguments that rebuild it, its images and their preprocessing.

    labels: of the model's outputs; None means the folders of the data.
    """

    vit: nn.Module
    timm_name: str
    timm_arguments: dict[str, Any]
    rule: InputRule
    recipe: str
    embedding: DecoupledEmbedding | None = None
    task: Task = TASKS[CLASSIFY]
    data: str = REFERENCE_DATASET
    labels: tuple[str, ...] | None = None
    activation: str = SOFTMAX

    @property
    def n_outputs(self) -> int:
        model: Any = self.vit
        return int(model.num_classes)


def chosen_model(options: ModelOptions) -> ChosenModel:
    """Load the model that the options name, with its embedding.

    Raises: EmbeddingMismatch; ValueError where the options name no model or several, or invalid
        weights.
    """
    given = {
        "--run": options.run,
        "--published": options.published,
        "--weights": options.weights or options.architecture,
    }
    named = [name for name, value in given.items() if value]
    if len(named) != 1:
        raise ValueError(f"expected exactly one of {', '.join(given)}, not {' and '.join(named) or 'none'}")
    data = _chosen_data(options)
    labels = read_labels(options.labels) if options.labels else None
    chosen = _chosen_vit(options)
    # Weights alone do not say which pixels they learned from; a dataset with pixels of its own does.
    is_bare = not (options.run or options.published)
    rule = override(
        find_dataset(data).rule(lambda: chosen.rule) if is_bare else chosen.rule,
        mean=options.mean,
        std=options.std,
        crop_pct=options.crop_pct,
        crop_mode=options.crop_mode,
        interpolation=options.interpolation,
    )
    activation = options.activation or chosen.activation
    chosen = replace(chosen, rule=rule, data=data, labels=labels or chosen.labels, activation=activation)
    if chosen.task.name == CLASSIFY:
        check_activation(activation, chosen.n_outputs)
    default = (options.run or options.published or Path()) / EMBEDDING
    file = options.embedding or (default if default.is_file() and (options.run or options.published) else None)
    if file is None:
        return chosen
    embedding = load_embedding(file).eval()
    embedding.check_fits(chosen.vit)
    return replace(chosen, embedding=embedding)


def _chosen_data(options: ModelOptions) -> str:
    """Raises: ValueError where neither the options nor the model name the data"""
    if options.data:
        return options.data
    if options.run:
        return run_data(json.loads((options.run / "recipe.json").read_text()))
    options.require_data()
    folder = cast(Path, options.published)
    return published_data(json.loads((folder / "manifest.json").read_text()))


def _chosen_vit(options: ModelOptions) -> ChosenModel:
    if options.run:
        recipe = json.loads((options.run / "recipe.json").read_text())
        name, arguments, task = recipe["architecture"], recipe["arguments"], find_task(options.task)
        vit = task.load(name, weights=options.run / "weights.safetensors", **arguments)
        dataset = find_dataset(recipe.get("data", {}).get("source", REFERENCE_DATASET))
        rule = dataset.rule(lambda: input_rule(vit))
        labels = options.run / LABELS
        return ChosenModel(
            vit.eval(),
            name,
            arguments,
            rule,
            recipe["file"],
            task=task,
            labels=read_labels(labels) if labels.is_file() else None,
            activation=recipe.get("activation", SOFTMAX),
        )
    if options.published:
        manifest = json.loads((options.published / "manifest.json").read_text())
        name, arguments = manifest["architecture"]["timm_name"], manifest["architecture"]["timm_arguments"]
        task, rule = find_task(manifest.get("task", CLASSIFY)), read_rule(manifest["input"])
        vit = task.load(name, weights=options.published / "weights.safetensors", **arguments)
        return ChosenModel(
            vit.eval(),
            name,
            arguments,
            rule,
            manifest["training"]["recipe"],
            task=task,
            labels=tuple(manifest["labels"]),
            activation=manifest["output"].get("activation", SOFTMAX),
        )
    if options.weights == "pretrained" and options.architecture and not is_source(options.architecture):
        task = find_task(options.task)
        vit = task.load(options.architecture, weights="pretrained", **options.arguments)
        origin = f"timm {options.architecture}, weights pretrained"
        return ChosenModel(vit.eval(), options.architecture, options.arguments, input_rule(vit), origin, task=task)
    return _from_checkpoint(options)


def _from_checkpoint(options: ModelOptions) -> ChosenModel:
    """Raises: ValueError where the options name no file, folder or repository."""
    source, architecture = options.weights, options.architecture
    if architecture and is_source(architecture):
        if source not in (None, "pretrained"):
            raise ValueError(f"--architecture {architecture} has its own weights: leave --weights {source} out")
        source, architecture = architecture, None
    if source in (None, "pretrained"):
        raise ValueError("--architecture needs --weights ('pretrained', a file or a folder), and 'pretrained' needs it")
    checkpoint = open_checkpoint(str(source), architecture, options.arguments)
    task = find_task(options.task)
    vit = checkpoint.load(task.load)
    print(f"{source}: {checkpoint.architecture} {json.dumps(checkpoint.arguments)}")
    for note in checkpoint.notes:
        print(f"  {note}")
    return ChosenModel(
        vit,
        checkpoint.architecture,
        checkpoint.arguments,
        input_rule(vit),
        f"timm {checkpoint.architecture}, weights {source}",
        task=task,
        labels=checkpoint.labels,
        activation=checkpoint.activation,
    )


def newest_version(model: Path) -> Path | None:
    """Return the folder of a model's latest version, None where there is none."""
    versions = [folder for folder in model.iterdir() if folder.name.isdigit()] if model.is_dir() else []
    return max(versions, key=lambda folder: int(folder.name), default=None)


def published_rule(folder: Path) -> InputRule:
    """Return the preprocessing of a published version."""
    return read_rule(json.loads((folder / "manifest.json").read_text())["input"])


def chosen_source(options: ModelOptions, chosen: ChosenModel) -> Source:
    """Open the images, and say which pixels the model sees.

    Raises: FileNotFoundError; ValueError for an unknown split, or other classes than the model's outputs.
    """
    source = opened_source(chosen, options.n_images, chosen_split(options.split))
    announce(chosen, source)
    return source


def opened_source(chosen: ChosenModel, n_images: int | None, split: Split, *, is_labelled: bool = True) -> Source:
    """Open a number of images, with the labels of the model.

    Raises: FileNotFoundError; ValueError naming folders that the labels do not have.
    """
    labels = chosen.labels if is_labelled else None
    if is_labelled and labels is None and chosen.n_outputs == 1 and chosen.data not in DATASETS:
        # The second of two folders is positive, as in negative and positive, or 0 and 1.
        labels = tuple(find_classes(Path(chosen.data)).names[-1:])
    return open_source(chosen.data, chosen.rule, n_images, split, labels)


def announce(chosen: ChosenModel, source: Source, *, is_labelled: bool = True) -> None:
    """Compare the classes with the model's outputs, and say which pixels it sees. Raises: ValueError naming both"""
    if chosen.task.name == CLASSIFY and is_labelled:
        check_classes(chosen.n_outputs, source)
    print(f"pixels: {describe(chosen.rule)}")
    if isinstance(source, FolderImages) and source.folders.empty:
        print(f"no classes, since without images: {', '.join(source.folders.empty)}")


def chosen_split(name: str) -> Split:
    """Raises: ValueError for an unknown split"""
    if name not in SPLITS:
        raise ValueError(f"--split {name}: expected one of {', '.join(SPLITS)}")
    return name


def read_calibrations(names: str) -> list[Calibration]:
    """Read a comma-separated list of calibration files. Raises: CalibrationMismatch, FileNotFoundError"""
    return [load_calibration(Path(name)) for name in names.split(",")]


def published_calibrations(folder: Path | None) -> list[Calibration]:
    """Read the calibrations of a published version; an empty list without a version."""
    if folder is None:
        return []
    variants = json.loads((folder / "manifest.json").read_text())["variants"]
    names = dict.fromkeys(variant["calibration"] for variant in variants if "calibration" in variant)
    return [load_calibration(folder / name) for name in names]
