"""Does the background merge first? Measure where the digit's patches end up under each policy, by the task's masks.

  python -m training.studies.background --run runs/reference-dtem --rates 2,4,8,12,16 --out docs/results/background

Writes <out>.md, <out>.json and <out>.png, and <out>-tokens.png, which shows the tokens at the highest rate.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from training.cli.command import report, run_command
from training.cli.evaluate import chosen_policies
from training.cli.model_options import ChosenModel, chosen_model
from training.cli.options import ModelOptions, parse_rates
from training.data.digits import SPLITS, Scene, digit_patches, draw
from training.evaluate.results import with_suffix
from training.evaluate.table import frozen_policy, planned
from training.merging.policies import FIXED_POLICIES, UNMERGED
from training.models.frozen import FrozenModule
from training.models.weights import weights_digest
from training.studies.background_report import MergedImage, markdown, picture, plot
from training.studies.patches import BackgroundRow, Measured, patch_figures, summarise

Classifiers = dict[tuple[str, int], FrozenModule]
DEFAULT = "tome,dtem"


def main(arguments: list[str] | None = None) -> int:
    return run_command("measurement", __doc__, _add_options, _measure_background, arguments)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, help="folder of a training run")
    parser.add_argument("--published", type=Path, help="a version in the store")
    parser.add_argument("--split", default="test", choices=SPLITS)
    parser.add_argument("--n-images", type=int, default=2000)
    parser.add_argument("--rates", type=parse_rates, default=parse_rates("2:16:2"), help="2,8,16 or first:last:step")
    merging = ", ".join(name for name in FIXED_POLICIES if name != UNMERGED.name)
    parser.add_argument(
        "--policies",
        help=f"comma-separated, of {merging}; differences are relative to the first; default: {DEFAULT}",
    )
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--n-pictures", type=int, default=5, help="number of images to show, from the first on")
    parser.add_argument("--out", type=Path, required=True, help="writes <out>.md, .json and .png, and <out>-tokens.png")


def _measure_background(options: argparse.Namespace) -> None:
    chosen = chosen_model(ModelOptions(run=options.run, published=options.published))
    policies = chosen_policies(options.policies, chosen, default=DEFAULT)
    plan = planned(policies, options.rates)
    if UNMERGED.name in policies or not plan:
        raise ValueError(f"policies {','.join(policies)} at rates {options.rates}: expected some that merge, r above 0")
    classifiers = {
        (policy, r): frozen_policy(chosen.task, policy, chosen.vit, chosen.rule, r, chosen.embedding)
        for policy, r in plan
    }
    rows = summarise(_measured(classifiers, options), base=policies[0])
    _write(options, chosen, rows)
    r = max(options.rates)
    highest = {policy: classifier for (policy, rate), classifier in classifiers.items() if rate == r}
    scenes = [draw(options.split, index) for index in range(options.n_pictures)]
    if scenes:
        picture(_merged_images(highest, scenes), with_suffix(options.out, "-tokens.png"), r)


def _measured(classifiers: Classifiers, options: argparse.Namespace) -> Measured:
    measured: Measured = {key: [] for key in classifiers}
    for scenes in tqdm(_scene_batches(options), total=-(-options.n_images // options.batch_size), unit="batch"):
        pixels = torch.from_numpy(np.stack([scene.image for scene in scenes]))
        patch_pixels = _patch_pixels(next(iter(classifiers.values())))
        is_digit = np.stack([digit_patches(scene.mask, patch_pixels) for scene in scenes])
        for key, classifier in classifiers.items():
            measured[key].append(patch_figures(_source(classifier, pixels), is_digit))
    return measured


def _scene_batches(options: argparse.Namespace) -> Iterator[list[Scene]]:
    for first in range(0, options.n_images, options.batch_size):
        last = min(first + options.batch_size, options.n_images)
        yield [draw(options.split, index) for index in range(first, last)]


@torch.inference_mode()
def _source(classifier: FrozenModule, pixels: Tensor) -> NDArray[np.bool_]:
    """Return the patches of each token. Shapes: uint8 (B, H, W, 3) -> bool (B, tokens, patches)"""
    channels = pixels.permute(0, 3, 1, 2).float() * classifier.scale + classifier.offset
    source = classifier.model.forward_features(channels, with_source=True).source
    n_protected = classifier.model.n_protected
    if source is None:
        raise ValueError("the model returned no source map")
    found: NDArray[np.bool_] = (source[:, n_protected:, n_protected:] > 0).numpy()
    return found


def _patch_pixels(classifier: FrozenModule) -> int:
    return int(classifier.model.vit.patch_embed.patch_size[0])


def _merged_images(classifiers: dict[str, FrozenModule], scenes: list[Scene]) -> list[MergedImage]:
    pixels = torch.from_numpy(np.stack([scene.image for scene in scenes]))
    tokens = {policy: _source(classifier, pixels).argmax(1) for policy, classifier in classifiers.items()}
    return [
        MergedImage(scene.image, scene.mask, {policy: of_patch[index] for policy, of_patch in tokens.items()})
        for index, scene in enumerate(scenes)
    ]


def _write(options: argparse.Namespace, chosen: ChosenModel, rows: list[BackgroundRow]) -> None:
    model = str(options.published or options.run or options.architecture)
    about = {
        "model": model,
        "weights": weights_digest(chosen.vit),
        "embedding": weights_digest(chosen.embedding) if chosen.embedding else None,
        "split": options.split,
        "n_images": options.n_images,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    content = {"about": about, "rows": [asdict(row) for row in rows]}
    with_suffix(options.out, ".json").write_text(json.dumps(content, indent=2) + "\n")
    table = markdown(rows, options.n_images)
    title = f"Merging of digit and background, {model}"
    summary = "How patches of the digit and of the background are grouped into tokens."
    with_suffix(options.out, ".md").write_text(report(title, summary, options.command_line, table))
    plot(rows, with_suffix(options.out, ".png"), f"{model}, {options.n_images} {options.split} images")
    print(table)


if __name__ == "__main__":
    sys.exit(main())
