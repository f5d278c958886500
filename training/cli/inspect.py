"""Say what a model is before anything is made of it, and write it as a run, which the other commands read."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from training.cli.devices import chosen_device
from training.cli.model_options import ChosenModel, chosen_model, chosen_source
from training.cli.options import ModelOptions
from training.data.decoded import DecodedImages
from training.data.pixel_rule import stated_config
from training.data.sources import Source
from training.evaluate.accuracy import Measurement, measure
from training.evaluate.progress import progress
from training.learn.run_folder import replaced
from training.models.activations import images_at_once, n_tokens
from training.models.classifier import SIGMOID
from training.models.weights import save_weights

_BATCH_SIZE = 50
_DTEM = """# DTEM for the model in this folder, modular: the ViT stays as it is, and an affine layer per block
# learns what to merge. training/recipes/README.md lists every key.

kind = "dtem"
mode = "modular"
seed = 0
r = {r}
n_images = {n_images}
batch_size = 64

[model]
architecture = {architecture}
arguments = {arguments}
weights = {weights}

[data]
source = {source}
labels = {labels}
min_crop = 0.5
flip = 0.0

[embedding]
learning_rate = [3e-3, 3e-5]
weight_decay = 1e-4
clip_norm = 5.0
"""
"""The settings of recipes/reference-dtem.toml, which learned from few images too. Whether a mirrored
image has the same label is not known."""


def run(model: ModelOptions, options: Namespace) -> int:
    device = chosen_device(options.device)
    chosen = chosen_model(model)
    print(f"model: {_architecture(chosen)}")
    if options.train and chosen.activation == SIGMOID:
        raise ValueError("--train: DTEM learns from one label per image, and the model has an activation of sigmoid")
    source = chosen_source(model, chosen)
    print(f"classes: {chosen.n_outputs} outputs, {chosen.activation}: {_shortened(source.labels)}")
    if options.out:
        _save(options.out, model, chosen, source, options)
    found = _measured(chosen, source, device)
    low, high = (100 * bound for bound in found.ci95)
    where = f"on {len(source)} images of {source.name}, split {source.split}"
    print(f"accuracy: {found.measure.label} {100 * found.value:.2f} % ({low:.2f} … {high:.2f}) unmerged, {where}")
    print(
        "Is that the accuracy you know of this model? If not, mean, std or crop are probably others than in its "
        "training, or the labels have another order"
    )
    return 0


def _architecture(chosen: ChosenModel) -> str:
    vit: Any = chosen.vit
    n_weights = sum(tensor.numel() for tensor in vit.parameters())
    return (
        f"{chosen.timm_name}, {len(vit.blocks)} blocks of width {vit.embed_dim}, {n_tokens(chosen.vit)} tokens, "
        f"{n_weights / 1e6:.1f} M weights"
    )


def _shortened(labels: Any, n_shown: int = 10) -> str:
    more = f", … ({len(labels)} in all)" if len(labels) > n_shown else ""
    return ", ".join(list(labels)[:n_shown]) + more


def _measured(chosen: ChosenModel, source: Source, device: torch.device) -> Measurement:
    batch_size = images_at_once(chosen.vit, _BATCH_SIZE)
    module = chosen.task.freeze(chosen.vit, chosen.rule, 0).to(device)
    images = DecodedImages(source, None, progress).batches(batch_size)
    batches = progress(images, "unmerged", -(-len(source) // batch_size))
    return measure(torch.inference_mode()(module.forward), batches, by=chosen.task.measure)


def _save(out: Path, model: ModelOptions, chosen: ChosenModel, source: Source, options: Namespace) -> None:
    """Write the model as a run: weights, recipe.json and labels.json; with images to learn from, dtem.toml."""
    out.mkdir(parents=True, exist_ok=True)
    # Pixels of a checkpoint or of the options become those of the architecture.
    arguments = {**chosen.timm_arguments, "pretrained_cfg_overlay": stated_config(chosen.rule)}
    recipe = {
        "file": chosen.recipe,
        "architecture": chosen.timm_name,
        "arguments": arguments,
        "activation": chosen.activation,
        "data": {"source": model.data, "validation": model.data},
    }
    labels, weights = out / "labels.json", out / "weights.safetensors"
    with replaced(weights) as file:
        save_weights(chosen.vit, None, file)
    with replaced(labels) as file:
        file.write_text(json.dumps(list(source.labels), ensure_ascii=False) + "\n")
    if options.train:
        entries: dict[str, Any] = {
            "architecture": chosen.timm_name,
            "arguments": arguments,
            "weights": str(weights),
            "source": str(options.train),
            "labels": str(labels),
            "n_images": options.n_learn,
            # Of 197 tokens in 12 blocks, 16, at which the published embeddings learned.
            "r": max(1, n_tokens(chosen.vit) // len(chosen.vit.blocks)),  # type: ignore[arg-type]
        }
        with replaced(out / "dtem.toml") as file:
            file.write_text(_DTEM.format(**{name: _toml(value) for name, value in entries.items()}))
    with replaced(out / "recipe.json") as file:
        file.write_text(json.dumps(recipe, indent=2, ensure_ascii=False) + "\n")
    print(f"wrote {out}, which the other commands read as --run {out}")


def _toml(value: Any) -> str:
    """Write a value inline. JSON and TOML agree but for objects."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_toml(one)}" for key, one in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(one) for one in value) + "]"
    return json.dumps(value, ensure_ascii=False)
