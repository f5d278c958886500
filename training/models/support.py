"""Supported architectures, and the reasons why others cannot merge tokens.

Architectures are recognised by the names of timm's classes, since only `training.models.vit`
imports timm.
"""

from torch import nn


class UnsupportedArchitecture(ValueError):  # noqa: N818
    """The architecture cannot merge tokens; the message names it and the reason."""


_HIERARCHICAL = "its stages pool or window a grid of tokens, which merging would destroy"
_WINDOWED = "its attention runs within windows of a grid of tokens, which merging would destroy"
_RELATIVE = "its attention adds a bias for the distance of two grid positions, and a merged token has no position"
_ROTARY = "its attention rotates queries and keys by their grid position, and a merged token has no position"
_CONVOLUTION = "it has no tokens to merge: it consists of convolutions over a grid"

_FAMILIES = {
    "swin_transformer": _WINDOWED,
    "swin_transformer_v2": _WINDOWED,
    "swin_transformer_v2_cr": _WINDOWED,
    "vision_transformer_sam": _WINDOWED,
    "hieradet_sam2": _WINDOWED,
    "maxxvit": _WINDOWED,
    "gcvit": _WINDOWED,
    "davit": _WINDOWED,
    "focalnet": _HIERARCHICAL,
    "hiera": _HIERARCHICAL,
    "mvitv2": _HIERARCHICAL,
    "pvt_v2": _HIERARCHICAL,
    "twins": _HIERARCHICAL,
    "nest": _HIERARCHICAL,
    "pit": _HIERARCHICAL,
    "levit": _HIERARCHICAL,
    "vitamin": _HIERARCHICAL,
    "vision_transformer_relpos": _RELATIVE,
    "beit": _RELATIVE,
    "eva": _ROTARY,
    "vision_transformer_hybrid": "hybrid: its tokens come from a convolutional network, not from patches",
    "naflexvit": "its images have different numbers of tokens, and merging needs the same number for all",
    "convnext": _CONVOLUTION,
    "resnet": _CONVOLUTION,
    "efficientnet": _CONVOLUTION,
    "mobilenetv3": _CONVOLUTION,
    "regnet": _CONVOLUTION,
    "mlp_mixer": "it has no attention: its MLPs mix a fixed number of tokens",
    "cait": "its class token enters in later blocks than its patches",
    "xcit": "its attention is over channels and its blocks convolve a grid of tokens",
}
_ANY_OTHER = "it is not one of timm's plain vision transformers (VisionTransformer, VisionTransformerDistilled)"

_PARALLEL = "its blocks run attention and MLP in parallel, so there is no point between them to merge at"
_BLOCKS = {
    "ResPostBlock": "its blocks normalise after the attention",
    "ParallelScalingBlock": _PARALLEL,
    "DiffParallelScalingBlock": _PARALLEL,
    "ParallelThingsBlock": "its blocks run several attentions in parallel, so there is no one set of keys to compare",
    "DiffAttention": "its attention is the difference of two softmaxes (differential attention)",
}
_POOLINGS = {
    "map": "it pools by attention (global_pool='map'), which ignores token sizes",
    "prr": "it pools by attention (global_pool='prr'), which ignores token sizes",
    "max": "it pools by maximum (global_pool='max'), which merging changes",
    "avgmax": "it pools by maximum (global_pool='avgmax'), which merging changes",
    "": "it does not pool (global_pool=''), so it classifies tokens, not images",
}
_VIT = "timm.models.vision_transformer"
_TOKEN_AND_AVERAGE = ("training.models.head", "TokenAndAverage")
_SUPPORTED = {(_VIT, "VisionTransformer"), ("timm.models.deit", "VisionTransformerDistilled")}
_SUPPORTED_PARTS = {
    "patch embedding": {("timm.layers.patch_embed", "PatchEmbed")},
    "block": {(_VIT, "Block")},
    "attention": {("timm.layers.attention", "Attention")},
}


def check_family(name: str, module: str) -> None:
    """Raises: UnsupportedArchitecture, judged by the timm module before the model is built."""
    family = module.rpartition(".")[2]
    is_old_name = family == "_registry"  # timm builds it under its current name
    if family not in ("vision_transformer", "deit") and not is_old_name:
        raise UnsupportedArchitecture(f"{name} ({family}) cannot merge tokens: {_FAMILIES.get(family, _ANY_OTHER)}")


def check_model(model: nn.Module, name: str | None = None) -> None:
    """Raises: UnsupportedArchitecture for a part whose forward pass is unknown."""
    name = name or type(model).__name__
    if _identity(model) not in _SUPPORTED:
        family = type(model).__module__.rpartition(".")[2]
        raise UnsupportedArchitecture(f"{name} cannot merge tokens: {_FAMILIES.get(family, _ANY_OTHER)}")
    reason = _part_reason(model) or _head_reason(model)
    if reason:
        raise UnsupportedArchitecture(f"{name} cannot merge tokens: {reason}")


def _part_reason(model: nn.Module) -> str | None:
    parts = [("patch embedding", model.get_submodule("patch_embed"))]
    for block in model.get_submodule("blocks").children():
        parts.append(("block", block))
        if _identity(block) in _SUPPORTED_PARTS["block"]:
            parts.append(("attention", block.get_submodule("attn")))
    for role, part in parts:
        if _identity(part) not in _SUPPORTED_PARTS[role]:
            kind = type(part).__name__
            if kind == "HybridEmbed":
                return _FAMILIES["vision_transformer_hybrid"]
            return _BLOCKS.get(kind, f"its {role} is a {kind}, whose forward pass is unknown")
    return None


def _head_reason(model: nn.Module) -> str | None:
    if _identity(model.get_submodule("head")) == _TOKEN_AND_AVERAGE:
        return None
    pooling = getattr(model, "global_pool", None)
    if pooling not in ("token", "avg"):
        return _POOLINGS.get(str(pooling), f"its pooling {pooling!r} is unknown")
    head = getattr(model, "head", None)
    if head is None or isinstance(head, nn.Identity):
        return "it has no classifier (num_classes is 0: set the number of classes)"
    if not isinstance(head, nn.Linear):
        return f"its head is a {type(head).__name__}, whose forward pass is unknown; expected one linear layer"
    return None


def _identity(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__, type(module).__name__
