"""Options that several commands share, and their types."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Any

import click

from training.cli.options import ModelOptions, parse_rates

Function = Callable[..., Any]
FILE = click.Path(path_type=Path)


class Rates(click.ParamType[tuple[int, ...]]):
    name = "rates"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if not isinstance(value, str):
            return tuple(value)
        try:
            return parse_rates(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class JsonObject(click.ParamType[dict[str, Any]]):
    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        try:
            found = json.loads(value)
        except json.JSONDecodeError as error:
            self.fail(f"{value!r} is no JSON: {error}", param, ctx)
        if not isinstance(found, dict):
            self.fail(f"{value!r}: expected a JSON object, such as '{{\"num_classes\": 37}}'", param, ctx)
        return found


class Channels(click.ParamType[tuple[float, ...]]):
    name = "r,g,b"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if not isinstance(value, str):
            return tuple(value)
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r}: expected three numbers, such as 0.485,0.456,0.406", param, ctx)


RATES, CHANNELS = Rates(), Channels()


def rates_option(default: str = "0:16:2") -> Callable[[Function], Function]:
    return click.option("--rates", type=RATES, default=default, help="0,8,16 or first:last:step")


def model_options(without: Sequence[str] = (), **defaults: Any) -> Callable[[Function], Function]:
    """Add the options of model and data; the command gets them as `model`, a ModelOptions.

    without: options that the command sets itself or does not have.
    """
    options: list[Callable[[Function], Function]] = []

    def option(name: str, **attributes: Any) -> None:
        if name not in without:
            options.append(click.option(name, **attributes))

    option("--run", type=FILE, help="folder of a training run")
    option("--published", type=FILE, help="a version in the store, e.g. model_store/reference/5")
    option(
        "--weights",
        help="a checkpoint: a file, a folder of Hugging Face or timm, or hf-hub:NAME; 'pretrained' for timm's own",
    )
    option(
        "--architecture",
        help="a timm name, e.g. deit_small_patch16_224; default: what the checkpoint states or implies",
    )
    option("--arguments", type=JsonObject(), default="{}", help="JSON arguments for timm.create_model")
    option("--task", default=ModelOptions.task, help="of --run or --architecture")
    option("--embedding", type=FILE, help="embedding of DTEM; default: that of the run or version")
    option(
        "--data",
        help="'digits' (the reference task) or a folder with one subfolder per class; default: the validation "
        "images of the run, or the digits of a version that was measured on them",
    )
    option(
        "--labels",
        type=FILE,
        help="names of the model's outputs, in order: one per line, a JSON list or a config.json; default: the "
        "sorted subfolders",
    )
    option(
        "--split",
        default=defaults.get("split", ModelOptions.split),
        help="train, validation or test, of a dataset that has splits",
    )
    option(
        "--n-images",
        type=click.IntRange(min=1),
        default=defaults.get("n_images"),
        help=defaults.get("n_images_help", "number of images; default: the whole folder, or 10,000 digits"),
    )
    option("--mean", type=CHANNELS, help="of pixels from 0 to 1, e.g. 0.5,0.5,0.5; default: as the weights")
    option("--std", type=CHANNELS, help="likewise")
    option("--crop-pct", type=float, help="share of each resized side that is cropped, at most 1")
    option("--crop-mode", type=click.Choice(["center", "squash", "border"]), help="as timm names them")
    option("--interpolation", type=click.Choice(["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]))
    option(
        "--activation",
        type=click.Choice(["softmax", "sigmoid"]),
        help="sigmoid: labels are independent, or there is one; default: softmax",
    )

    def add(function: Function) -> Function:
        @wraps(function)
        def packed(**given: Any) -> Any:
            names = [part.name for part in fields(ModelOptions) if part.name in given]
            model = ModelOptions(**{name: given.pop(name) for name in names})
            return function(model=model, **given)

        decorated: Function = packed
        for decorate in reversed(options):
            decorated = decorate(decorated)
        return decorated

    return add


def checkpoint_options(function: Function) -> Function:
    """As `model_options`, for a model that is always a checkpoint, the argument of the command."""
    decorated = model_options(without=("--run", "--published", "--weights", "--embedding", "--split", "--n-images"))(
        function
    )
    return click.argument("weights", metavar="CHECKPOINT")(decorated)


def as_arguments(model: ModelOptions) -> list[str]:
    """Return the options that give this model."""
    arguments = []
    for part in fields(ModelOptions):
        value = getattr(model, part.name)
        if value != getattr(ModelOptions(), part.name):
            text = json.dumps(value) if isinstance(value, dict) else value
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(text)
            arguments += [f"--{part.name.replace('_', '-')}", text]
    return arguments


def example(*lines: str) -> str:
    """Return examples as the epilog of a help text, not re-wrapped."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
