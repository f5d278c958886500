"""The architecture of a ViT, inferred from the names and shapes of its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from training.models.checkpoints.files import UnreadableCheckpoint
from training.models.support import UnsupportedArchitecture
from training.models.vit import behaviour, outline, plain_names

_HEAD_WIDTH = 64
_PLAIN, _DISTILLED = "vit_base_patch16_224", "deit_base_distilled_patch16_224"
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_NOT_PLAIN = {
    r"relative_position_bias_table|rel_pos": "its attention adds a bias for the distance of two positions",
    r"layers\.0\.blocks|stages\.0\.": "its stages window or pool a grid of tokens (Swin and its kind)",
    r"rope|freqs": "its attention rotates queries and keys by position",
    r"attn_pool": "it pools by attention",
    r"q_bias": "its qkv layers have a bias for q and v alone, as BEiT's",
    r"pre_logits": "it has a representation layer (pre_logits) before its head",
}
_BEYOND_SHAPES = ("img_size", "num_classes", "norm_eps", "global_pool", "reg_tokens", "no_embed_class", "act_layer")

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Inferred:
    architecture: str
    arguments: dict[str, Any]
    notes: tuple[str, ...]


def infer_architecture(tensors: Mapping[str, Tensor], given: Mapping[str, Any], file: Path) -> Inferred:
    """Return a timm architecture with exactly these tensors.

    given: arguments that the user states; they are kept.
    Raises: UnreadableCheckpoint where names or shapes are of no plain ViT, or fit several
        architectures that compute differently.
    """
    for pattern, reason in _NOT_PLAIN.items():
        if any(re.search(pattern, name) for name in tensors):
            raise UnreadableCheckpoint(f"{file} is of no plain ViT: {reason}")
    own = arguments_of(tensors, given, file)
    fixed = {key: value for key, value in given.items() if key != "img_size"}
    free: dict[str, Any] = {key: own[key] for key in ("img_size", "num_classes") if key in own}
    if own.get("global_pool") == "avg":
        free["global_pool"] = "avg"
    fits = fitting_names(tensors, free | fixed)
    if len(fits) > 1:
        names = "; ".join(", ".join(group[:3]) for group in fits.values())
        raise UnreadableCheckpoint(
            f"{file} fits architectures that compute differently: {names}. Name one by --architecture"
        )
    if fits:
        group = next(iter(fits.values()))
        others = f" (so do {', '.join(group[1:4])})" if len(group) > 1 else ""
        return Inferred(group[0], free | fixed, (f"the tensors fit timm's {group[0]}{others}",))
    is_known = "num_heads" in given or "blocks.0.attn.q_norm.weight" in tensors
    if not is_known and own["embed_dim"] % _HEAD_WIDTH:
        raise UnreadableCheckpoint(
            f"{file} is {own['embed_dim']} wide, and its number of heads cannot be inferred: "
            "state it by --architecture, or by --arguments '{\"num_heads\": …}'"
        )
    arguments = own | fixed
    assumed = "" if is_known else f" (assumed: {_HEAD_WIDTH} channels each)"
    note = f"the tensors fit no architecture that timm names: a ViT with {arguments['num_heads']} heads{assumed}"
    return Inferred(_DISTILLED if "dist_token" in tensors else _PLAIN, arguments, (note,))


def shortened(tensors: Mapping[str, Tensor], architecture: str, arguments: dict[str, Any]) -> Inferred:
    """Return a registered architecture that computes the same from fewer arguments, where there is one."""
    free = {key: value for key, value in arguments.items() if key in _BEYOND_SHAPES}
    found = fitting_names(tensors, free).get(behaviour(outline(architecture, **arguments)))
    return Inferred(found[0], free, ()) if found else Inferred(architecture, arguments, ())


def arguments_of(tensors: Mapping[str, Tensor], given: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the arguments of timm's VisionTransformer that tensors state.

    given: those of the user; its img_size tells the grid of as many patches.
    Raises: UnreadableCheckpoint.
    """
    if "blocks.0.attn.qkv.weight" not in tensors:
        raise UnreadableCheckpoint(f"{file} has no blocks.0.attn.qkv.weight: expected the names of timm's ViT")
    if "head.weight" not in tensors:
        raise UnreadableCheckpoint(f"{file} has no classifier (head.weight): fine-tune it first, or add its head")
    shape = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    width, n_channels, *patch = shape["patch_embed.proj.weight"]
    if n_channels != 3:
        raise UnreadableCheckpoint(f"{file} reads images of {n_channels} channels: expected 3")
    arguments: dict[str, Any] = {
        "num_classes": shape["head.weight"][0],
        "patch_size": patch[0] if patch[0] == patch[1] else list(patch),
        "embed_dim": width,
        "depth": n_blocks(tensors),
        "num_heads": _n_heads(shape, width),
        "mlp_ratio": shape["blocks.0.mlp.fc1.weight"][0] / width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in shape,
        "class_token": "cls_token" in shape,
    }
    optional = {
        "proj_bias": ("blocks.0.attn.proj.bias" in shape, True),
        "reg_tokens": (shape.get("reg_token", (1, 0))[1], 0),
        "qk_norm": ("blocks.0.attn.q_norm.weight" in shape, False),
        "scale_attn_norm": ("blocks.0.attn.norm.weight" in shape, False),
        "scale_mlp_norm": ("blocks.0.mlp.norm.weight" in shape, False),
        "init_values": (1e-5 if "blocks.0.ls1.gamma" in shape else None, None),
        "pre_norm": ("norm_pre.weight" in shape, False),
        "final_norm": ("norm.weight" in shape or "fc_norm.weight" in shape, True),
        "pos_embed": ("learn" if "pos_embed" in shape else "none", "learn"),
    }
    arguments |= {key: value for key, (value, default) in optional.items() if value != default}
    if "fc_norm.weight" in shape or "cls_token" not in shape:
        arguments["global_pool"] = "avg"
        arguments |= {} if "fc_norm.weight" in shape else {"fc_norm": False}
    if "pos_embed" in shape:
        n_prefix, grid = position_grid(shape, given.get("img_size"))
        if grid is None:
            raise UnreadableCheckpoint(
                f"{file} has {shape['pos_embed'][1]} position embeddings, which are no square: "
                "state the image size, such as --arguments '{\"img_size\": [height, width]}'"
            )
        sides = [n * side for n, side in zip(grid, patch, strict=True)]
        arguments["img_size"] = sides[0] if sides[0] == sides[1] else sides
        if not n_prefix and n_prefix_tokens(shape):
            arguments["no_embed_class"] = True
    return arguments


def fitting_names(tensors: Mapping[str, Tensor], arguments: dict[str, Any]) -> dict[object, list[str]]:
    """Return the registered architectures with these tensors, grouped by what they compute."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    first = {name: shape for name, shape in shapes.items() if (m := _BLOCK.match(name)) is None or m[1] == "0"}
    groups: dict[object, list[str]] = {}
    for name in plain_names():
        # One block tells most architectures apart, in a millisecond.
        if _shapes_of(name, {**arguments, "depth": 1}) == first and _shapes_of(name, arguments) == shapes:
            groups.setdefault(behaviour(outline(name, **arguments)), []).append(name)
    for names in groups.values():
        names.sort(key=lambda name: (not name.startswith("vit_"), len(name), name))
    return groups


def n_blocks(tensors: Mapping[str, Any]) -> int:
    return 1 + max(int(match[1]) for name in tensors if (match := _BLOCK.match(name)))


def n_prefix_tokens(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(name in shapes for name in ("cls_token", "dist_token")) + shapes.get("reg_token", (1, 0))[1]


def position_grid(
    shapes: Mapping[str, tuple[int, ...]], img_size: int | Sequence[int] | None = None
) -> tuple[int, tuple[int, int] | None]:
    """Return how many position embeddings belong to prefix tokens, and the grid of the others.

    It is the grid of img_size where that has as many patches, else a square, else None.
    """
    n_positions, n_prefix = shapes["pos_embed"][1], n_prefix_tokens(shapes)
    if img_size is not None:
        sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        height, width = (
            side // patch for side, patch in zip(sides, shapes["patch_embed.proj.weight"][2:], strict=True)
        )
        for n in (n_prefix, 0):
            if height * width == n_positions - n:
                return n, (height, width)
    for n in (n_prefix, 0):
        side = math.isqrt(max(0, n_positions - n))
        if side * side == n_positions - n:
            return n, (side, side)
    return n_prefix, None


def _shapes_of(name: str, arguments: dict[str, Any]) -> Shapes | None:
    try:
        return {key: tuple(tensor.shape) for key, tensor in outline(name, **arguments).state_dict().items()}
    except (UnsupportedArchitecture, TypeError, ValueError, AssertionError):
        return None


def _n_heads(shape: Mapping[str, tuple[int, ...]], width: int) -> int:
    attention_width = shape["blocks.0.attn.qkv.weight"][0] // 3
    (head_width,) = shape.get("blocks.0.attn.q_norm.weight", (_HEAD_WIDTH,))
    return max(1, attention_width // head_width)
