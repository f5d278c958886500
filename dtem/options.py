"""Options that several commands share, and their types."""

from __future__ import annotations

import json
from collections.abc import Callable
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


def model_options(**defaults: Any) -> Callable[[Function], Function]:
    """Add the options of model and data; the command gets them as `model`, a ModelOptions."""
    options = [
        click.option("--run", type=FILE, help="folder of a training run"),
        click.option("--published", type=FILE, help="a version in the store, e.g. model_store/reference/5"),
        click.option(
            "--weights",
            help="a checkpoint: a file, a folder of Hugging Face or timm, or hf-hub:NAME; 'pretrained' for timm's own",
        ),
        click.option(
            "--architecture",
            help="a timm name, e.g. deit_small_patch16_224; default: what the checkpoint states or implies",
        ),
        click.option("--arguments", type=JsonObject(), default="{}", help="JSON arguments for timm.create_model"),
        click.option("--task", default=ModelOptions.task, help="of --run or --architecture"),
        click.option("--embedding", type=FILE, help="embedding of DTEM; default: that of the run or version"),
        click.option(
            "--data",
            help="'digits' (the reference task) or a folder with one subfolder per class; default: the validation "
            "images of the run, or the digits of a version that was measured on them",
        ),
        click.option(
            "--labels",
            type=FILE,
            help="names of the model's outputs, in order: one per line, a JSON list or a config.json; default: the "
            "sorted subfolders",
        ),
        click.option(
            "--split",
            default=defaults.get("split", ModelOptions.split),
            help="train, validation or test, of a dataset that has splits",
        ),
        click.option(
            "--n-images",
            type=click.IntRange(min=1),
            default=defaults.get("n_images"),
            help="number of images; default: the whole folder, or 10,000 digits",
        ),
        click.option("--mean", type=CHANNELS, help="of pixels from 0 to 1, e.g. 0.5,0.5,0.5; default: as the weights"),
        click.option("--std", type=CHANNELS, help="likewise"),
        click.option("--crop-pct", type=float, help="share of each resized side that is cropped, at most 1"),
        click.option("--crop-mode", type=click.Choice(["center", "squash", "border"]), help="as timm names them"),
        click.option(
            "--interpolation", type=click.Choice(["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"])
        ),
        click.option(
            "--activation",
            type=click.Choice(["softmax", "sigmoid"]),
            help="sigmoid: labels are independent, or there is one; default: softmax",
        ),
    ]

    def add(function: Function) -> Function:
        @wraps(function)
        def packed(**given: Any) -> Any:
            model = ModelOptions(**{part.name: given.pop(part.name) for part in fields(ModelOptions)})
            return function(model=model, **given)

        decorated: Function = packed
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return add


def example(*lines: str) -> str:
    """Return examples as the epilog of a help text, not re-wrapped."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
