"""The tensors of one ViT in the nested content of a checkpoint.

Training scripts wrap a model in many ways: `state_dict`, `model`, `teacher`, `module.`,
`_orig_mod.`, `model.backbone.`, in any nesting. One rule undoes them all: the content is flattened
to dotted names, and what stands before `patch_embed.proj.weight` is the prefix of a ViT.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from training.models.checkpoints.files import UnreadableCheckpoint

_ANCHORS = {
    "timm": "patch_embed.proj.weight",
    "Hugging Face": "embeddings.patch_embeddings.projection.weight",
}
_TORCHVISION = (
    (r"\bconv_proj\.", "patch_embed.proj."),
    (r"\bclass_token$", "cls_token"),
    (r"\bencoder\.pos_embedding$", "pos_embed"),
    (r"\bencoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\bself_attention\.in_proj_", "attn.qkv."),
    (r"\bself_attention\.out_proj\.", "attn.proj."),
    (r"\bln_([12])\.", r"norm\1."),
    (r"\bmlp\.(0|linear_1)\.", "mlp.fc1."),
    (r"\bmlp\.(3|linear_2)\.", "mlp.fc2."),
    (r"\bencoder\.ln\.", "norm."),
    (r"\bheads\.head\.", "head."),
)
"""Names of torchvision's VisionTransformer, which computes the same as timm's."""
_EMA = re.compile(r"(^|_)ema($|_)|^teacher|averaged|^shadow")
_LAST = ("student", "online", "momentum")
_OPTIMISER = re.compile(r"optim|grad_scaler|lr_sched")
_HEADS = re.compile(r"(head|classifier|cls_head|fc|linear|linear_head)\.(?:fc\.|layers\.)?(weight|bias)")
_MAX_NAMED = 5


@dataclass(frozen=True)
class Found:
    """The tensors of one ViT, by the names that its author's code gives them.

    style: "timm" or "Hugging Face". names: all tensors of the content, which includes those of
        other parts.
    """

    style: str
    tensors: dict[str, Tensor]
    notes: tuple[str, ...]


def find_vit(content: Mapping[str, Any], file: Path) -> Found:
    """Return the tensors of the ViT in a checkpoint, without wrappers and prefixes.

    Of several copies, an averaged one (EMA, teacher) is taken before the trained one.
    Raises: UnreadableCheckpoint where there is no plain ViT, or several that cannot be told apart.
    """
    flat = dict(_flattened(content))
    is_torchvision = any("encoder_layer_0.self_attention.in_proj_weight" in name for name in flat)
    if is_torchvision:
        flat = {_from_torchvision(name): tensor for name, tensor in flat.items()}
    if not flat:
        raise UnreadableCheckpoint(f"{file} has no tensors, only {_some(content)}")
    prefixes = {style: _prefixes(flat, anchor) for style, anchor in _ANCHORS.items()}
    style = "timm" if prefixes["timm"] else "Hugging Face"
    if not prefixes[style]:
        raise UnreadableCheckpoint(f"{file} {_looks_like(flat)}")
    prefix, others = _chosen(prefixes[style], file)
    is_wrapped = prefix and style == "timm"
    notes = (
        [f"weights of {prefix.rstrip('.')!r}" + (f", not of {_some(others)}" if others else "")] if is_wrapped else []
    )
    if is_torchvision:
        notes.append("names of torchvision's VisionTransformer")
    tensors = {name.removeprefix(prefix): tensor for name, tensor in flat.items() if name.startswith(prefix)}
    if style == "Hugging Face":
        tensors = {name.removeprefix(prefix): tensor for name, tensor in flat.items()}
    elif head := _head(flat, prefix, tensors, file):
        tensors |= {f"head.{name.rpartition('.')[2]}": flat[name] for name in head}
        notes.append(f"head: {head[0].rpartition('.')[0]}")
    if ignored := _ignored(content, flat, prefix):
        notes.append(f"ignored: {_some(ignored)}")
    return Found(style, tensors, tuple(notes))


def _flattened(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping) and not _OPTIMISER.search(str(name).lower()):
            yield from _flattened(value, f"{prefix}{name}.")


def _from_torchvision(name: str) -> str:
    for pattern, replacement in _TORCHVISION:
        name = re.sub(pattern, replacement, name)
    return name


def _prefixes(flat: Mapping[str, Tensor], anchor: str) -> list[str]:
    return [name.removesuffix(anchor) for name in flat if name == anchor or name.endswith(f".{anchor}")]


def _chosen(prefixes: list[str], file: Path) -> tuple[str, list[str]]:
    """Return the prefix to take, and the others. Raises: UnreadableCheckpoint where two are equally good."""

    def rank(prefix: str) -> int:
        parts = prefix.lower().split(".")
        return 0 if any(map(_EMA.search, parts)) else 2 if any(part.startswith(_LAST) for part in parts) else 1

    best = min(map(rank, prefixes))
    chosen = [prefix for prefix in prefixes if rank(prefix) == best]
    if len(chosen) > 1:
        raise UnreadableCheckpoint(
            f"{file} holds several models: {_some([prefix.rstrip('.') or 'the top level' for prefix in chosen])}; "
            "save the state dict of one of them alone"
        )
    return chosen[0], [prefix.rstrip(".") for prefix in prefixes if prefix != chosen[0]]


def _head(flat: Mapping[str, Tensor], prefix: str, tensors: Mapping[str, Tensor], file: Path) -> list[str]:
    """Return the names of a linear classifier that stands beside the ViT, or has another name in it.

    Raises: UnreadableCheckpoint where other layers stand beside the ViT, since they may come between.
    """
    if "head.weight" in tensors:
        return []
    width = tensors["patch_embed.proj.weight"].shape[0]
    scope = prefix
    while True:
        inner = {name.removeprefix(scope): name for name in flat if name.startswith(scope)}
        found = [
            name
            for name in inner
            if (match := _HEADS.fullmatch(name))
            and match[2] == "weight"
            and flat[inner[name]].ndim == 2
            and flat[inner[name]].shape[1] == width
        ]
        if len(found) == 1:
            head = [name for name in (found[0], found[0].removesuffix("weight") + "bias") if name in inner]
            beside = [
                name
                for name in inner
                if name.endswith(".weight") and name not in head and not inner[name].startswith(prefix)
            ]
            if beside:
                raise UnreadableCheckpoint(f"{file} has layers beside the ViT and its head: {_some(beside)}")
            return [inner[name] for name in head]
        if not scope:
            return []
        scope = scope.rstrip(".").rpartition(".")[0]
        scope += "." if scope else ""


def _ignored(content: Mapping[str, Any], flat: Mapping[str, Tensor], prefix: str) -> list[str]:
    """Return the entries at the top of a wrapped checkpoint that the ViT is not in."""
    return [str(name) for name in content if prefix and str(name) not in flat and not prefix.startswith(f"{name}.")]


def _looks_like(flat: Mapping[str, Tensor]) -> str:
    names = list(flat)
    kinds = {
        "a CLIP model of OpenAI or OpenCLIP": r"visual\.(class_embedding|conv1|transformer)",
        "a convolutional network": r"(^|\.)(conv1|bn1|stem\.0|layer1\.0\.conv1|features\.0)\.",
        "an adapter (LoRA), without the weights of its model: merge it first": r"lora_[AB]",
        "the state of an optimiser": r"exp_avg",
    }
    for kind, pattern in kinds.items():
        if any(re.search(pattern, name) for name in names):
            return (
                f"looks like {kind}: expected a ViT with the names of timm or Hugging Face, such as blocks.0.attn.qkv"
            )
    return f"has no patch_embed.proj.weight: expected a ViT with the names of timm or Hugging Face, not {_some(names)}"


def _some(names: Any) -> str:
    shown = [str(name) for name in names]
    return ", ".join(shown[:_MAX_NAMED]) + (", …" if len(shown) > _MAX_NAMED else "")
