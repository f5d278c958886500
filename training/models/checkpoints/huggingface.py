"""Checkpoints of Hugging Face's `transformers`: config, names of tensors, labels and preprocessing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.models.checkpoints.files import UnreadableCheckpoint
from training.models.checkpoints.stated import Stated, plain_labels
from training.models.head import TOKEN_AND_AVERAGE

_CLASSES = {
    "ViTForImageClassification": "vit_base_patch16_224",
    "DeiTForImageClassification": "vit_base_patch16_224",
    "DeiTForImageClassificationWithTeacher": "deit_base_distilled_patch16_224",
    "Dinov2ForImageClassification": "vit_base_patch14_dinov2",
    "Dinov2WithRegistersForImageClassification": "vit_base_patch14_reg4_dinov2",
}
"""Supported classes, and a timm architecture of the same kind; sizes come from the config."""
_SWIGLU = "vit_giant_patch14_dinov2"
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""Pillow's numbers of its filters."""
_MODULES = {
    "classifier": "head",
    "cls_classifier": "head",
    "distillation_classifier": "head_dist",
    "layernorm": "norm",
}
_EMBEDDINGS = {
    "cls_token": "cls_token",
    "distillation_token": "dist_token",
    "register_tokens": "reg_token",
    "position_embeddings": "pos_embed",
    "patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "patch_embeddings.projection.bias": "patch_embed.proj.bias",
}
_IN_BLOCK = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.weights_in": "mlp.fc1",
    "mlp.weights_out": "mlp.fc2",
}
_QKV = ("query", "key", "value")
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)")
_SCALE = re.compile(r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1")
_UNUSED = re.compile(r"embeddings\.mask_token|pooler\..*|embeddings\.position_ids")


def is_huggingface(config: Mapping[str, Any]) -> bool:
    return "model_type" in config and "architecture" not in config


def read_config(config: Mapping[str, Any], processor: Mapping[str, Any], file: Path) -> Stated:
    """Return architecture, labels and preprocessing that the folder states.

    processor: preprocessor_config.json, empty where there is none.
    Raises: UnreadableCheckpoint, naming the key that has no counterpart in a plain ViT of timm.
    """
    name = (config.get("architectures") or [f"a model of type {config['model_type']}"])[0]
    if name not in _CLASSES:
        raise UnreadableCheckpoint(f"{file} is of {name}: expected one of {', '.join(_CLASSES)}")
    is_dinov2 = name.startswith("Dinov2")
    required = {"num_channels": 3, "apply_layernorm": True} if is_dinov2 else {"num_channels": 3}
    for key, value in required.items():
        if config.get(key, value) != value:
            raise UnreadableCheckpoint(f"{file} has {key} {config[key]!r}: expected {value!r}")
    activation = config.get("hidden_act", "gelu")
    if activation not in _ACTIVATIONS:
        raise UnreadableCheckpoint(f"{file} has hidden_act {activation!r}: expected one of {', '.join(_ACTIVATIONS)}")
    width = config["hidden_size"]
    arguments: dict[str, Any] = {
        "img_size": config["image_size"],
        "patch_size": config["patch_size"],
        "embed_dim": width,
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "qkv_bias": config.get("qkv_bias", True),
        "norm_eps": config.get("layer_norm_eps", 1e-6 if is_dinov2 else 1e-12),
    }
    architecture = _CLASSES[name]
    if is_dinov2:
        arguments["global_pool"] = TOKEN_AND_AVERAGE
        arguments["reg_tokens"] = config.get("num_register_tokens", 0)
        arguments["mlp_ratio"] = config.get("mlp_ratio", 4)
    else:
        arguments["mlp_ratio"] = config["intermediate_size"] / width
    if name == "DeiTForImageClassification":
        # Its distillation token takes part in attention, and no head reads it: a register.
        arguments["reg_tokens"] = 1
    if config.get("use_swiglu_ffn"):
        architecture = _SWIGLU
        n_hidden = (int(width * arguments["mlp_ratio"] * 2 / 3) + 7) // 8 * 8
        arguments["mlp_ratio"] = 2 * n_hidden / width
        if arguments["reg_tokens"]:
            arguments["no_embed_class"] = True
    elif _ACTIVATIONS[activation] != "gelu":
        arguments["act_layer"] = _ACTIVATIONS[activation]
    pixels, notes = read_processor(processor, file)
    if is_dinov2 and "input_size" in pixels:
        # DINOv2 resamples its position embeddings to the images that the processor makes.
        arguments["img_size"] = list(pixels["input_size"][1:])
    problem = config.get("problem_type")
    if problem == "regression":
        raise UnreadableCheckpoint(f"{file} has problem_type 'regression': expected a classifier")
    return Stated(
        architecture=architecture,
        arguments=arguments,
        labels=plain_labels(config.get("id2label"), file),
        pixels=pixels,
        activation="sigmoid" if problem == "multi_label_classification" else "softmax",
        notes=(name, *notes),
        is_antialiased="Registers" in name or not is_dinov2,
    )


def read_processor(processor: Mapping[str, Any], file: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the preprocessing in the terms of timm's `pretrained_cfg`.

    Raises: UnreadableCheckpoint for a rule that they cannot state.
    """
    if not processor:
        return {}, ["no preprocessor_config.json: the preprocessing is not known"]
    size = _sides(processor.get("size", 224))
    crop = _sides(processor["crop_size"]) if processor.get("do_center_crop") and processor.get("crop_size") else None
    height, width = ((crop or size).get(side, 0) for side in ("height", "width"))
    is_squash = "height" in size
    resized = size["height"] if is_squash else size.get("shortest_edge", 0)
    if (
        not processor.get("do_resize", True)
        or not 0 < height <= resized
        or not 0 < width <= (size["width"] if is_squash else resized)
        or (is_squash and height * size["width"] != width * size["height"])
    ):
        stated = {key: processor.get(key) for key in ("do_resize", "size", "do_center_crop", "crop_size")}
        raise UnreadableCheckpoint(
            f"{file}: preprocessor_config.json has {stated}: expected a resize to height and width, or to "
            "shortest_edge and a center crop. Remove that file to state the preprocessing yourself"
        )
    pixels: dict[str, Any] = {
        "input_size": (3, height, width),
        "crop_mode": "squash" if is_squash else "center",
        "crop_pct": (height if is_squash else max(height, width)) / resized,
        "interpolation": _RESAMPLE[processor.get("resample", 2)],
    }
    # (p · factor - mean) / std is (p / 255 - mean · unit) / (std · unit).
    factor = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0
    unit = 1 / (255 * factor)
    is_normalised = processor.get("do_normalize", True)
    mean = processor.get("image_mean", (0.5,) * 3) if is_normalised else (0.0,) * 3
    std = processor.get("image_std", (0.5,) * 3) if is_normalised else (1.0,) * 3
    unit = 1.0 if abs(unit - 1) < 1e-6 else unit
    pixels["mean"], pixels["std"] = (tuple(float(value) * unit for value in values) for values in (mean, std))
    return pixels, []


def timm_tensors(tensors: Mapping[str, Tensor], stated: Stated) -> dict[str, Tensor]:
    """Return the tensors by timm's names. Tensors without a counterpart keep their names."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        inner = re.sub(r"^(vit|deit|dinov2|dinov2_with_registers)\.", "", name)
        if not _UNUSED.fullmatch(inner):
            renamed[_renamed(inner)] = tensor
    for name in [name for name in renamed if ".query." in name]:
        parts = [renamed.pop(name.replace("query", part)) for part in _QKV if name.replace("query", part) in renamed]
        renamed[name.replace("query.", "")] = torch.cat(parts)
    if "dist_token" in renamed and stated.arguments.get("reg_tokens"):
        renamed["reg_token"] = renamed.pop("dist_token")
    elif "reg_token" in renamed and "pos_embed" in renamed:
        # timm's register models add no position to the class token: it is part of the token.
        renamed["cls_token"] = renamed["cls_token"] + renamed["pos_embed"][:, :1]
        renamed["pos_embed"] = renamed["pos_embed"][:, 1:]
    return renamed


def _renamed(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if match := _SCALE.fullmatch(name):
        return f"blocks.{match[1]}.ls{match[2]}.gamma"
    if match := _LAYER.fullmatch(name):
        block, inner, kind = match.groups()
        part = inner.rpartition(".")[2]
        target = f"attn.qkv.{part}" if part in _QKV else _IN_BLOCK.get(inner)
        return f"blocks.{block}.{target}.{kind}" if target else name
    if module in _MODULES:
        return f"{_MODULES[module]}.{kind}"
    return _EMBEDDINGS.get(name.removeprefix("embeddings."), name)


def _sides(size: Any) -> dict[str, int]:
    """Return a size of a processor as a mapping; older ones are a number or a pair."""
    if isinstance(size, int):
        return {"height": size, "width": size}
    if isinstance(size, list | tuple):
        return {"height": size[0], "width": size[1]}
    return dict(size)
