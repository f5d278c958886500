"""Folders of Hugging Face, compared with a forward pass written from their definition."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from training.models.checkpoints import UnreadableCheckpoint, open_checkpoint
from training.models.checkpoints.huggingface import read_processor
from training.models.vit import MergingVisionTransformer, load_vit

WIDTH, HEADS, DEPTH, SIDE, PATCH, CLASSES = 24, 3, 2, 24, 8, 5
BASE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "image_size": SIDE,
    "patch_size": PATCH,
    "num_channels": 3,
}
PLAIN = BASE | {"intermediate_size": 40, "layer_norm_eps": 1e-2, "hidden_act": "gelu_new", "qkv_bias": False}
DINO = BASE | {"mlp_ratio": 2, "layer_norm_eps": 1e-2, "hidden_act": "gelu", "qkv_bias": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "ViTForImageClassification": PLAIN | {"model_type": "vit"},
    "DeiTForImageClassification": PLAIN | {"model_type": "deit", "qkv_bias": True},
    "DeiTForImageClassificationWithTeacher": PLAIN | {"model_type": "deit"},
    "Dinov2ForImageClassification": DINO | {"model_type": "dinov2"},
    "Dinov2WithRegistersForImageClassification": DINO
    | {"model_type": "dinov2_with_registers", "num_register_tokens": 4},
    "swiglu": DINO | {"model_type": "dinov2", "use_swiglu_ffn": True},
}
PROCESSOR = {
    "size": {"height": SIDE, "width": SIDE},
    "resample": 2,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
}


def class_of(kind: str) -> str:
    return "Dinov2ForImageClassification" if kind == "swiglu" else kind


def tensors_of(kind: str) -> dict[str, Tensor]:
    """Return random tensors with the names of `transformers`."""
    config, generator = CONFIGS[kind], torch.Generator().manual_seed(3)
    root, is_dino = config["model_type"], "dinov2" in config["model_type"]
    shapes: dict[str, tuple[int, ...]] = {
        f"{root}.embeddings.cls_token": (1, 1, WIDTH),
        f"{root}.embeddings.patch_embeddings.projection.weight": (WIDTH, 3, PATCH, PATCH),
        f"{root}.embeddings.patch_embeddings.projection.bias": (WIDTH,),
        f"{root}.embeddings.position_embeddings": (1, (SIDE // PATCH) ** 2 + 1 + (root == "deit"), WIDTH),
    }
    if root == "deit":
        shapes[f"{root}.embeddings.distillation_token"] = (1, 1, WIDTH)
    if is_dino:
        shapes[f"{root}.embeddings.mask_token"] = (1, WIDTH)
    if "num_register_tokens" in config:
        shapes[f"{root}.embeddings.register_tokens"] = (1, config["num_register_tokens"], WIDTH)
    n_hidden = 2 * WIDTH if is_dino else 40
    names = ("mlp.fc1", "mlp.fc2") if is_dino else ("intermediate.dense", "output.dense")
    linear = {"attention.output.dense": (WIDTH, WIDTH), names[0]: (n_hidden, WIDTH), names[1]: (WIDTH, n_hidden)}
    if config.get("use_swiglu_ffn"):
        n_hidden = (int(2 * WIDTH * 2 / 3) + 7) // 8 * 8
        linear |= {"mlp.weights_in": (2 * n_hidden, WIDTH), "mlp.weights_out": (WIDTH, n_hidden)}
        del linear["mlp.fc1"], linear["mlp.fc2"]
    norms = ("norm1", "norm2") if is_dino else ("layernorm_before", "layernorm_after")
    for index in range(DEPTH):
        block = f"{root}.encoder.layer.{index}"
        for part in ("query", "key", "value"):
            shapes[f"{block}.attention.attention.{part}.weight"] = (WIDTH, WIDTH)
            if config["qkv_bias"]:
                shapes[f"{block}.attention.attention.{part}.bias"] = (WIDTH,)
        for name, shape in linear.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
        for name in norms:
            shapes |= {f"{block}.{name}.weight": (WIDTH,), f"{block}.{name}.bias": (WIDTH,)}
        if is_dino:
            shapes |= {f"{block}.layer_scale{n}.lambda1": (WIDTH,) for n in (1, 2)}
    shapes |= {f"{root}.layernorm.weight": (WIDTH,), f"{root}.layernorm.bias": (WIDTH,)}
    heads = ("cls_classifier", "distillation_classifier") if kind.endswith("Teacher") else ("classifier",)
    for head in heads:
        shapes |= {f"{head}.weight": (CLASSES, WIDTH * (1 + is_dino)), f"{head}.bias": (CLASSES,)}
    shapes[f"{root}.pooler.dense.weight"] = (WIDTH, WIDTH)
    return {name: 0.4 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def reference_logits(kind: str, stored: dict[str, Tensor], images: Tensor) -> Tensor:
    """Return the logits by the definition of `transformers`, one operation after the other."""
    config = CONFIGS[kind]
    root, eps = config["model_type"], config["layer_norm_eps"]

    def get(name: str) -> Tensor:
        return stored.get(f"{root}.{name}", stored.get(name, torch.zeros(())))

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ get(f"{name}.weight").T + get(f"{name}.bias")

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled: Tensor = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * get(f"{name}.weight") + get(f"{name}.bias")

    def mlp(x: Tensor, block: str) -> Tensor:
        if config.get("use_swiglu_ffn"):
            gate, value = linear(x, f"{block}.mlp.weights_in").chunk(2, dim=-1)
            return linear(functional.silu(gate) * value, f"{block}.mlp.weights_out")
        first, second = ("mlp.fc1", "mlp.fc2") if "dinov2" in root else ("intermediate.dense", "output.dense")
        approximate = "tanh" if config["hidden_act"] == "gelu_new" else "none"
        return linear(functional.gelu(linear(x, f"{block}.{first}"), approximate=approximate), f"{block}.{second}")

    kernel = get("embeddings.patch_embeddings.projection.weight")
    patches = functional.conv2d(images, kernel, get("embeddings.patch_embeddings.projection.bias"), stride=PATCH)
    x = patches.flatten(2).transpose(1, 2)
    positions, n_grid, n_new = get("embeddings.position_embeddings"), SIDE // PATCH, images.shape[-1] // PATCH
    n_prefix = positions.shape[1] - n_grid**2
    if n_new != n_grid:
        grid = positions[:, n_prefix:].view(1, n_grid, n_grid, WIDTH).permute(0, 3, 1, 2)
        resized = functional.interpolate(grid, (n_new, n_new), mode="bicubic", antialias="registers" in root)
        positions = torch.cat([positions[:, :n_prefix], resized.permute(0, 2, 3, 1).reshape(1, -1, WIDTH)], dim=1)
    prefix = [get(f"embeddings.{name}") for name in ("cls_token", "distillation_token")[:n_prefix]]
    x = torch.cat([*(token.expand(len(x), -1, -1) for token in prefix), x], dim=1) + positions
    n_registers = config.get("num_register_tokens", 0)
    if n_registers:
        registers = get("embeddings.register_tokens").expand(len(x), -1, -1)
        x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)
    before, after = ("norm1", "norm2") if "dinov2" in root else ("layernorm_before", "layernorm_after")
    for index in range(DEPTH):
        block = f"encoder.layer.{index}"
        hidden = norm(x, f"{block}.{before}")
        q, k, v = (
            linear(hidden, f"{block}.attention.attention.{part}")
            .view(len(x), -1, HEADS, WIDTH // HEADS)
            .transpose(1, 2)
            for part in ("query", "key", "value")
        )
        weights = (q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)).softmax(-1)
        mixed = linear((weights @ v).transpose(1, 2).flatten(2), f"{block}.attention.output.dense")
        scale = [get(f"{block}.layer_scale{n}.lambda1") if "dinov2" in root else 1.0 for n in (1, 2)]
        x = x + mixed * scale[0]
        x = x + mlp(norm(x, f"{block}.{after}"), block) * scale[1]
    x = norm(x, "layernorm")
    if kind.endswith("Teacher"):
        return (linear(x[:, 0], "cls_classifier") + linear(x[:, 1], "distillation_classifier")) / 2
    pooled = torch.cat([x[:, 0], x[:, 1 + n_registers :].mean(1)], dim=-1) if "dinov2" in root else x[:, 0]
    return linear(pooled, "classifier")


def write(folder: Path, kind: str, processor: dict[str, Any] | None = None, **changes: Any) -> dict[str, Tensor]:
    stored = tensors_of(kind)
    save_file(stored, folder / "model.safetensors")
    config = {**CONFIGS[kind], "architectures": [class_of(kind)], **changes}
    (folder / "config.json").write_text(json.dumps(config))
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return stored


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_equal_the_definition(tmp_path: Path, kind: str) -> None:
    stored = write(tmp_path, kind)
    checkpoint = open_checkpoint(tmp_path)
    vit = checkpoint.load()
    images = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    expected = reference_logits(kind, stored, images)
    with torch.no_grad():
        torch.testing.assert_close(vit(images), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(MergingVisionTransformer(vit).eval()(images), expected, rtol=0, atol=1e-4)
    assert float(expected.std()) > 0.1
    # What the manifest states rebuilds the model.
    rebuilt = load_vit(checkpoint.architecture, **json.loads(json.dumps(checkpoint.arguments))).eval()
    rebuilt.load_state_dict(vit.state_dict())
    with torch.no_grad():
        assert torch.equal(rebuilt(images), vit(images))


@pytest.mark.parametrize("kind", ["Dinov2ForImageClassification", "Dinov2WithRegistersForImageClassification"])
def test_dinov2_reads_images_of_its_processor(tmp_path: Path, kind: str) -> None:
    size = 5 * PATCH
    processor = {"size": {"shortest_edge": 48}, "do_center_crop": True, "crop_size": {"height": size, "width": size}}
    stored = write(tmp_path, kind, {**PROCESSOR, **processor})
    checkpoint = open_checkpoint(tmp_path)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = checkpoint.load()(images)
    torch.testing.assert_close(found, reference_logits(kind, stored, images), rtol=0, atol=1e-4)
    assert "position embeddings resampled from 3x3 to 5x5 patches" in checkpoint.notes


def test_merged_patches_of_dinov2_count_with_their_size(tmp_path: Path) -> None:
    write(tmp_path, "Dinov2ForImageClassification")
    vit: Any = open_checkpoint(tmp_path).load()
    images = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    model = MergingVisionTransformer(vit, 1).eval()
    with torch.no_grad():
        tokens, size, _ = model.forward_features(images)
        copies = [row.repeat_interleave(n.long().view(-1), dim=0) for row, n in zip(tokens, size, strict=True)]
        torch.testing.assert_close(model(images), vit.head(torch.stack(copies)), rtol=0, atol=1e-5)


def test_labels_preprocessing_and_activation_are_carried(tmp_path: Path) -> None:
    labels = {str(index): f"class {index}" for index in range(CLASSES)}
    problem = "multi_label_classification"
    write(tmp_path, "ViTForImageClassification", PROCESSOR, id2label=labels, problem_type=problem)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.labels == tuple(labels.values())
    assert checkpoint.activation == "sigmoid"
    vit: Any = checkpoint.load()
    expected = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear", "crop_mode": "squash"}
    assert {key: vit.pretrained_cfg[key] for key in expected} == expected
    assert vit.pretrained_cfg["crop_pct"] == 1.0


def test_placeholder_labels_are_none(tmp_path: Path) -> None:
    write(tmp_path, "ViTForImageClassification", id2label={str(index): f"LABEL_{index}" for index in range(CLASSES)})
    assert open_checkpoint(tmp_path).labels is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"size": 32}, {"crop_mode": "squash", "crop_pct": 1.0, "input_size": (3, 32, 32)}),
        (
            {"size": {"height": 256, "width": 256}, "do_center_crop": True, "crop_size": 224},
            {"crop_mode": "squash", "crop_pct": 0.875, "input_size": (3, 224, 224)},
        ),
        (
            {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 192}},
            {"crop_mode": "center", "crop_pct": 0.875, "input_size": (3, 224, 192)},
        ),
        ({"resample": 3}, {"interpolation": "bicubic"}),
        ({"do_normalize": False}, {"mean": (0.0,) * 3, "std": (1.0,) * 3}),
        ({"rescale_factor": 0.00392156862745098}, {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}),
    ],
)
def test_processor_is_stated_in_the_terms_of_timm(
    tmp_path: Path, changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    pixels, _ = read_processor({**PROCESSOR, **changes}, tmp_path)
    assert {key: pixels[key] for key in expected} == expected


@pytest.mark.parametrize("changes", [{"rescale_factor": 1 / 127.5}, {"do_rescale": False}])
def test_another_scale_of_pixels_is_part_of_mean_and_std(tmp_path: Path, changes: dict[str, Any]) -> None:
    pixels, _ = read_processor({**PROCESSOR, **changes}, tmp_path)
    factor = changes.get("rescale_factor", 1.0)
    for channel in range(3):
        ours = (200 / 255 - pixels["mean"][channel]) / pixels["std"][channel]
        theirs = (200 * factor - PROCESSOR["image_mean"][channel]) / PROCESSOR["image_std"][channel]  # type: ignore[index]
        assert ours == pytest.approx(theirs)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architectures": ["SwinForImageClassification"]}, "is of SwinForImageClassification: expected one of ViTFor"),
        ({"num_channels": 1}, "num_channels 1: expected 3"),
        ({"hidden_act": "mish"}, "hidden_act 'mish': expected one of gelu"),
        ({"problem_type": "regression"}, "'regression'"),
        ({"id2label": {"0": "cat", "1": "dog"}}, "states 2 labels, and its head has 5 classes"),
        ({"id2label": {"0": "cat", "2": "dog"}}, "no label of class 1"),
    ],
)
def test_what_a_plain_vit_has_not_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    write(tmp_path, "ViTForImageClassification", **changes)
    with pytest.raises(UnreadableCheckpoint, match=reason):
        open_checkpoint(tmp_path)


def test_unclear_processor_and_missing_config_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "ViTForImageClassification", {**PROCESSOR, "size": {"longest_edge": 64}})
    with pytest.raises(UnreadableCheckpoint, match=r"preprocessor_config.json has .*longest_edge.*Remove that file"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UnreadableCheckpoint, match=r"names of Hugging Face.* no config.json beside it"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.filterwarnings("ignore")
def test_logits_equal_those_of_transformers(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = {**CONFIGS[kind], "num_labels": CLASSES}
    names = (class_of(kind), class_of(kind).partition("For")[0] + "Config")
    model_class, config_class = (getattr(transformers, name) for name in names)
    torch.manual_seed(0)
    model = model_class(config_class(**{key: value for key, value in config.items() if key != "model_type"})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        torch.testing.assert_close(open_checkpoint(tmp_path).load()(images), model(images).logits, rtol=0, atol=1e-4)
