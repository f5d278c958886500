"""Checkpoints of plain ViTs, as timm, Hugging Face and training scripts write them.

`open_checkpoint` returns timm's name and arguments, the tensors that fit them exactly, and what is
stated beside them: labels, preprocessing, activation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.models.checkpoints import huggingface, timm_folder
from training.models.checkpoints.files import PREFERRED, UnreadableCheckpoint, read_checkpoint, read_json
from training.models.checkpoints.hub import downloaded
from training.models.checkpoints.shapes import infer_architecture, position_grid, shortened
from training.models.checkpoints.stated import Activation, Stated
from training.models.checkpoints.tensors import find_vit
from training.models.vit import load_vit, outline, resample_positions
from training.models.weights import differences

__all__ = ["Checkpoint", "UnreadableCheckpoint", "is_source", "open_checkpoint"]

LOCAL, HUB = "local-dir:", "hf-hub:"
_UNUSED = re.compile(
    r"mask_token|(.*\.)?(total_ops|total_params|n_averaged|num_batches_tracked)|decoder.*|.*\.qkv\.(weight|bias)_embedding"
)
"""Tensors that training scripts save and no classifier reads; the last are an embedding's, see `save_weights`."""
_LAYER_SCALE = re.compile(r"(blocks\.\d+)\.gamma_([12])")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that fits an architecture of timm exactly.

    architecture, arguments: for `load_vit`; a plain name, never a path. labels, pixels: None and
        empty where nothing is stated; pixels has keys of timm's `pretrained_cfg`. activation: of
        the logits. notes: what was found, chosen, assumed and ignored, for the user.
    """

    architecture: str
    arguments: dict[str, Any]
    tensors: dict[str, Tensor]
    labels: tuple[str, ...] | None
    pixels: dict[str, Any]
    activation: Activation
    notes: tuple[str, ...]

    def load(self, load: Callable[..., nn.Module] = load_vit) -> nn.Module:
        """Return the model with these tensors; its `pretrained_cfg` has the stated preprocessing.

        load: of a task, as `load_vit`.
        """
        model: Any = load(self.architecture, **self.arguments)
        model.load_state_dict(self.tensors, strict=True)
        model.pretrained_cfg = {**model.pretrained_cfg, **self.pixels}
        built: nn.Module = model.eval()
        return built


def is_source(name: str) -> bool:
    """Tell whether a name is of a folder or a repository, not of an architecture."""
    return name.startswith((LOCAL, HUB))


def open_checkpoint(
    source: str | Path, architecture: str | None = None, arguments: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Read a checkpoint of a plain ViT: a file, a folder, `local-dir:PATH` or `hf-hub:NAME`.

    architecture, arguments: of timm. They replace what the checkpoint states, and what would be
        inferred from its tensors. An img_size resamples the position embeddings.
    Raises: FileNotFoundError; UnreadableCheckpoint or WeightsMismatch where it is no classifying
        plain ViT, or not the named one; ValueError for an unknown architecture;
        UnsupportedArchitecture.
    """
    given = dict(arguments or {})
    path = _folder(source) if is_source(str(source)) else Path(source)
    content, file = read_checkpoint(path)
    found = find_vit(content, file)
    config = read_json(file.parent / "config.json") if path.is_dir() or file.name in PREFERRED else {}
    stated, tensors = _described(found.style, found.tensors, config, file)
    tensors, ignored = _cleaned(tensors, file)
    _check_classes(tensors, given, file)
    notes = [*stated.notes, *found.notes, *ignored]
    if architecture is not None:
        name, known = architecture, {}
    elif stated.architecture is not None:
        name, known = stated.architecture, stated.arguments
    else:
        inferred = infer_architecture(tensors, given, file)
        name, known = inferred.architecture, inferred.arguments
        notes += inferred.notes
    native = _native_size(tensors, {**known, **given}, stated)
    sizes = {} if native is None else {"img_size": native}
    fitted = {"num_classes": int(tensors["head.weight"].shape[0]), **sizes, **known, **given}
    tensors, resampled = _resampled(tensors, name, fitted, stated, file)
    _check_fits(tensors, name, fitted, file)
    if found.style == "Hugging Face":
        short = shortened(tensors, name, fitted)
        name, fitted = short.architecture, short.arguments
    labels = stated.labels
    if labels is not None and len(labels) != fitted["num_classes"]:
        raise UnreadableCheckpoint(
            f"{file} states {len(labels)} labels, and its head has {fitted['num_classes']} classes"
        )
    if not stated.pixels:
        notes.append(f"no preprocessing stated: mean, std and crop are those of timm's {name}, unless you state them")
    return Checkpoint(name, fitted, tensors, labels, stated.pixels, stated.activation, (*notes, *resampled))


def _folder(source: str | Path) -> Path:
    kind, _, name = str(source).partition(":")
    folder = downloaded(name) if f"{kind}:" == HUB else Path(name)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: {LOCAL}PATH names a folder with config.json and weights")
    return folder


def _described(
    style: str, tensors: dict[str, Tensor], config: dict[str, Any], file: Path
) -> tuple[Stated, dict[str, Tensor]]:
    """Return what the configuration states, and the tensors by timm's names."""
    if style == "Hugging Face":
        if not huggingface.is_huggingface(config):
            raise UnreadableCheckpoint(
                f"{file} has the names of Hugging Face's transformers, and no config.json beside it: "
                "give the folder that model.save_pretrained wrote"
            )
        stated = huggingface.read_config(config, read_json(file.parent / "preprocessor_config.json"), file)
        return stated, huggingface.timm_tensors(tensors, stated)
    return (timm_folder.read_config(config, file) if timm_folder.is_timm(config) else Stated()), tensors


def _cleaned(tensors: Mapping[str, Tensor], file: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return float32 tensors by today's names, without unused ones, and notes.

    Raises: UnreadableCheckpoint for quantised or non-finite tensors.
    """
    kept = {_LAYER_SCALE.sub(r"\1.ls\2.gamma", name): t for name, t in tensors.items() if not _UNUSED.fullmatch(name)}
    for name, tensor in kept.items():
        if not tensor.is_floating_point() or tensor.is_quantized:
            raise UnreadableCheckpoint(f"{file}: {name} is of {tensor.dtype}: expected floating-point weights")
        if not tensor.float().sum().isfinite():
            raise UnreadableCheckpoint(f"{file}: {name} has values that are not finite")
    unused = [name for name in tensors if _UNUSED.fullmatch(name)]
    notes = [f"ignored: {', '.join(unused[:3])}" + (", …" if len(unused) > 3 else "")] if unused else []
    others = {str(tensor.dtype).removeprefix("torch.") for tensor in kept.values() if tensor.dtype != torch.float32}
    if others:
        notes.append(f"converted from {', '.join(sorted(others))} to float32")
    return {name: tensor.detach().float().contiguous() for name, tensor in kept.items()}, notes


def _check_classes(tensors: Mapping[str, Tensor], given: Mapping[str, Any], file: Path) -> None:
    if "head.weight" not in tensors:
        raise UnreadableCheckpoint(
            f"{file} has no classifier (head.weight): expected a ViT that was trained to classify"
        )
    n_classes = tensors["head.weight"].shape[0]
    if (asked := given.get("num_classes", n_classes)) != n_classes:
        raise UnreadableCheckpoint(f"{file} has a head of {n_classes} classes, and num_classes {asked} was asked for")


def _native_size(tensors: Mapping[str, Tensor], arguments: Mapping[str, Any], stated: Stated) -> int | list[int] | None:
    """Return the image size of the checkpoint's position embeddings, None where it has none."""
    if "pos_embed" not in tensors:
        return None
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for size in (arguments.get("img_size"), stated.pixels.get("input_size", (3, 0, 0))[1:], None):
        grid = position_grid(shapes, size)[1]
        if grid is not None:
            break
    if grid is None:
        return None
    sides = [n * patch for n, patch in zip(grid, shapes["patch_embed.proj.weight"][2:], strict=True)]
    return sides[0] if sides[0] == sides[1] else sides


def _resampled(
    tensors: dict[str, Tensor], name: str, arguments: dict[str, Any], stated: Stated, file: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors with position embeddings of the model's grid, and a note if they changed.

    Raises: UnreadableCheckpoint for a patch embedding of another size.
    """
    vit: Any = _outline(name, arguments, file)
    found, expected = (
        tuple(patch.shape[2:]) for patch in (tensors["patch_embed.proj.weight"], vit.patch_embed.proj.weight)
    )
    if found != expected:
        raise UnreadableCheckpoint(f"{file} has patches of {_sides(found)}, and {name} has {_sides(expected)}")
    if "pos_embed" not in tensors or vit.pos_embed is None or tensors["pos_embed"].shape == vit.pos_embed.shape:
        return tensors, []
    n_prefix = 0 if vit.no_embed_class else int(vit.num_prefix_tokens)
    side = math.isqrt(tensors["pos_embed"].shape[1] - n_prefix)
    if n_prefix + side**2 != tensors["pos_embed"].shape[1]:
        return tensors, []
    grid = (side, side)
    positions = resample_positions(
        tensors["pos_embed"], vit, old_grid=grid, n_prefix=n_prefix, antialias=stated.is_antialiased
    )
    note = f"position embeddings resampled from {_sides(grid)} to {_sides(vit.patch_embed.grid_size)} patches"
    return {**tensors, "pos_embed": positions}, [note]


def _check_fits(tensors: Mapping[str, Tensor], name: str, arguments: dict[str, Any], file: Path) -> None:
    if problems := differences(_outline(name, arguments, file).state_dict(), tensors):
        raise UnreadableCheckpoint(f"{file} does not fit {name}: {'; '.join(problems)}")


def _outline(name: str, arguments: dict[str, Any], file: Path) -> nn.Module:
    try:
        return outline(name, **arguments)
    except (TypeError, AssertionError, RuntimeError) as err:
        raise UnreadableCheckpoint(f"{file}: timm cannot build {name} with {arguments}: {err}") from err


def _sides(sides: Sequence[int]) -> str:
    return "x".join(map(str, sides))
