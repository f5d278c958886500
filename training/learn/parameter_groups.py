"""Parameter groups for AdamW: weight decay applies to matrices, not to biases and scales."""

from __future__ import annotations

from typing import Any

from torch import nn


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    decayed = [parameter for parameter in module.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in module.parameters() if parameter.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def layerwise_groups(vit: Any, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Return groups with `lr_scale`, the factor of their learning rate.

    It is 1 for the head and the final norm, and lower by layer_decay for each block before; the
    embeddings come before the first block. Position embeddings and prefix tokens have no weight
    decay.
    Source: arXiv 2106.08254, appendix.
    """
    depth, without_decay = len(vit.blocks), vit.no_weight_decay()
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in vit.named_parameters():
        layer = _layer(name, depth)
        is_decayed = parameter.ndim > 1 and name not in without_decay
        group = {
            "params": [],
            "weight_decay": weight_decay if is_decayed else 0.0,
            "lr_scale": layer_decay ** (depth + 1 - layer),
        }
        groups.setdefault((layer, is_decayed), group)["params"].append(parameter)
    return list(groups.values())


def _layer(name: str, depth: int) -> int:
    part, _, rest = name.partition(".")
    if part == "blocks":
        return 1 + int(rest.partition(".")[0])
    return depth + 1 if part in ("norm", "fc_norm", "head", "head_dist") else 0
