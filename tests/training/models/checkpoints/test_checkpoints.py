"""From the checkpoints that training scripts write to a model of timm."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from training.models import UnsupportedArchitecture, load_vit
from training.models.checkpoints import UnreadableCheckpoint, open_checkpoint
from training.models.head import TOKEN_AND_AVERAGE

NAME = "vit_tiny_patch16_224"
SMALL: dict[str, Any] = {"img_size": 48, "patch_size": 8, "depth": 2, "num_classes": 7}


def vit_of(name: str = NAME, seed: int = 0, **arguments: Any) -> nn.Module:
    torch.manual_seed(seed)
    return load_vit(name, **{**SMALL, **arguments}).eval()


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def assert_equal(found: nn.Module, expected: nn.Module) -> None:
    images = torch.randn(1, 3, *expected.patch_embed.img_size)  # type: ignore[union-attr,misc]
    with torch.no_grad():
        assert torch.equal(found.eval()(images), expected.eval()(images))


def prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


WRAPPERS: dict[str, Any] = {
    "bare": lambda t, o: t,
    "state_dict": lambda t, o: {"state_dict": t, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
    "model": lambda t, o: {"model": t, "args": {"lr": 0.1}},
    "model_state": lambda t, o: {"model_state": t},
    "module": lambda t, o: {"module": prefixed(t, "module.")},
    "compiled": lambda t, o: prefixed(t, "module._orig_mod."),
    "compiled inside": lambda t, o: {"state_dict": prefixed(t, "_orig_mod.module.model.")},
    "lightning": lambda t, o: {"state_dict": {**prefixed(t, "net."), "train_acc.tp": torch.ones(2)}, "callbacks": {}},
    "ema": lambda t, o: {"model": o, "model_ema": t},
    "timm ema": lambda t, o: {"state_dict": o, "state_dict_ema": t, "version": 2},
    "averaged": lambda t, o: {"model": o, "ema": {"module": prefixed(t, "module."), "n_averaged": torch.tensor(5)}},
    "swa": lambda t, o: {**prefixed(t, "module."), "n_averaged": torch.tensor(5)},
    "teacher": lambda t, o: {"student": prefixed(o, "module.backbone."), "teacher": prefixed(t, "backbone.")},
    "student": lambda t, o: {"model": t, "student": o},
    "buffers": lambda t, o: {**t, "mask_token": torch.ones(1), "blocks.0.attn.total_ops": torch.zeros(1).double()},
    "named optimiser": lambda t, o: {"model": t, "optimizer": {"exp_avg": o}},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_checkpoint_gives_its_model(tmp_path: Path, wrapper: str) -> None:
    vit, other = vit_of(), vit_of(seed=1)
    path = save(tmp_path / "a.pth", WRAPPERS[wrapper](vit.state_dict(), other.state_dict()))
    checkpoint = open_checkpoint(path, NAME, {"patch_size": 8, "depth": 2})
    assert_equal(checkpoint.load(), vit)
    assert checkpoint.arguments == {"patch_size": 8, "depth": 2, "num_classes": 7, "img_size": 48}


def test_choice_and_ignored_entries_are_said(tmp_path: Path) -> None:
    tensors = vit_of().state_dict()
    path = save(tmp_path / "a.pth", {"model": tensors, "model_ema": tensors, "optimizer": {"x": torch.ones(1)}})
    notes = open_checkpoint(path, NAME, {"patch_size": 8, "depth": 2}).notes
    assert "weights of 'model_ema', not of model" in notes
    assert "ignored: model, optimizer" in notes


def test_copies_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pth", {"left": vit_of().state_dict(), "right": vit_of(seed=1).state_dict()})
    with pytest.raises(UnreadableCheckpoint, match="holds several models: left, right"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["classifier", "fc", "model.head", "linear_head"])
def test_head_beside_the_backbone_is_found(tmp_path: Path, name: str) -> None:
    vit = vit_of()
    tensors = vit.state_dict()
    head = {f"{name}.{kind}": tensors.pop(f"head.{kind}") for kind in ("weight", "bias")}
    path = save(tmp_path / "a.pth", {"state_dict": {**prefixed(tensors, "model.backbone."), **head}})
    checkpoint = open_checkpoint(path, NAME, {"patch_size": 8, "depth": 2})
    assert_equal(checkpoint.load(), vit)
    assert f"head: state_dict.{name}" in checkpoint.notes


def test_layers_between_the_backbone_and_its_head_are_refused(tmp_path: Path) -> None:
    tensors = vit_of().state_dict()
    head = {f"head.{kind}": tensors.pop(f"head.{kind}") for kind in ("weight", "bias")}
    path = save(tmp_path / "a.pth", {**prefixed(tensors, "backbone."), **head, "neck.weight": torch.ones(192, 192)})
    with pytest.raises(UnreadableCheckpoint, match=r"layers beside the ViT and its head: neck\.weight"):
        open_checkpoint(path)


INFERRED: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "named": (NAME, {"num_classes": 5}, NAME, {"num_classes": 5, "img_size": 224}),
    "another size": (NAME, {"num_classes": 5, "img_size": 96}, NAME, {"num_classes": 5, "img_size": 96}),
    "distilled": (
        "deit_tiny_distilled_patch16_224",
        {"num_classes": 3},
        "deit_tiny_distilled_patch16_224",
        {"num_classes": 3, "img_size": 224},
    ),
    "averaging": (
        NAME,
        {"num_classes": 5, "global_pool": "avg"},
        NAME,
        {"num_classes": 5, "img_size": 224, "global_pool": "avg"},
    ),
    "registers": (
        "vit_small_patch14_reg4_dinov2",
        {"num_classes": 2, "img_size": 56},
        "vit_small_patch14_reg4_dinov2",
        {"num_classes": 2, "img_size": 56},
    ),
}


@pytest.mark.parametrize("case", INFERRED)
def test_architecture_is_inferred_from_tensors(tmp_path: Path, case: str) -> None:
    source, arguments, name, expected = INFERRED[case]
    torch.manual_seed(0)
    vit = load_vit(source, **arguments)
    checkpoint = open_checkpoint(save(tmp_path / "a.pth", vit.state_dict()))
    assert (checkpoint.architecture, checkpoint.arguments) == (name, expected)
    assert_equal(checkpoint.load(), vit)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"qkv_bias": False, "init_values": 0.1, "reg_tokens": 2},
        {"class_token": False, "global_pool": "avg", "fc_norm": False, "no_embed_class": True},
        {"qk_norm": True, "pre_norm": True, "embed_dim": 96, "num_heads": 4, "mlp_ratio": 2.5},
    ],
)
def test_unnamed_architecture_is_built_from_shapes(tmp_path: Path, arguments: dict[str, Any]) -> None:
    vit: Any = vit_of(**arguments)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    checkpoint = open_checkpoint(save(tmp_path / "a.pth", vit.state_dict()))
    assert_equal(checkpoint.load(), vit)
    heads = arguments.get("num_heads", 3)
    assert any(f"a ViT with {heads} heads" in note for note in checkpoint.notes)


def test_heads_that_cannot_be_inferred_are_asked_for(tmp_path: Path) -> None:
    vit = vit_of(embed_dim=32, num_heads=2)
    path = save(tmp_path / "a.pth", vit.state_dict())
    with pytest.raises(UnreadableCheckpoint, match="is 32 wide, and its number of heads cannot be inferred"):
        open_checkpoint(path)
    assert_equal(open_checkpoint(path, arguments={"num_heads": 2}).load(), vit)


def test_architectures_that_compute_differently_are_both_named(tmp_path: Path) -> None:
    names = ("vit_base_patch32_clip_224", "vit_base_patch32_clip_quickgelu_224")
    vit = load_vit(names[0], num_classes=2, img_size=64)
    path = save(tmp_path / "a.pth", vit.state_dict())
    with pytest.raises(UnreadableCheckpoint, match=rf"compute differently: .*{names[0]}.*; {names[1]}.*--architecture"):
        open_checkpoint(path)
    assert_equal(open_checkpoint(path, names[0]).load(), vit)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        (NAME, {}),
        ("deit_tiny_distilled_patch16_224", {}),
        (NAME, {"reg_tokens": 3}),
        (NAME, {"reg_tokens": 2, "no_embed_class": True}),
        (NAME, {"class_token": False, "global_pool": "avg"}),
    ],
)
@pytest.mark.parametrize("size", [64, [32, 64]])
def test_position_embeddings_are_resampled_as_timm_does(
    tmp_path: Path, name: str, arguments: dict[str, Any], size: Any
) -> None:
    vit = vit_of(name, **arguments)
    path = save(tmp_path / "a.pth", vit.state_dict())
    given = {**SMALL, **arguments, "img_size": size}
    checkpoint = open_checkpoint(path, name, given)
    expected = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"file": str(path), "num_classes": 7}, **given
    )
    assert_equal(checkpoint.load(), expected)
    assert any("position embeddings resampled from 6x6 to" in note for note in checkpoint.notes)
    assert checkpoint.arguments["img_size"] == size


def test_image_of_as_many_patches_is_taken_as_it_is(tmp_path: Path) -> None:
    vit = vit_of(img_size=[32, 72])
    path = save(tmp_path / "a.pth", vit.state_dict())
    checkpoint = open_checkpoint(path, NAME, {**SMALL, "img_size": [32, 72]})
    assert_equal(checkpoint.load(), vit)
    assert not any("resampled" in note for note in checkpoint.notes)


def test_non_square_image_is_asked_for(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pth", vit_of(img_size=[32, 40]).state_dict())
    with pytest.raises(UnreadableCheckpoint, match="21 position embeddings, which are no square: state the image size"):
        open_checkpoint(path)
    assert open_checkpoint(path, arguments={"img_size": [32, 40]}).arguments["img_size"] == [32, 40]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"patch_size": 16}, "has patches of 8x8, and vit_tiny_patch16_224 has 16x16"),
        ({"num_classes": 10}, "a head of 7 classes, and num_classes 10 was asked for"),
        ({"depth": 3}, "does not fit vit_tiny_patch16_224: 12 missing: blocks.2"),
        ({"qkv_bias": False}, "2 unexpected: blocks.0.attn.qkv.bias"),
        ({"oops": 1}, "timm cannot build .*oops"),
    ],
)
def test_checkpoint_of_another_architecture_is_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    path = save(tmp_path / "a.pth", vit_of().state_dict())
    with pytest.raises(UnreadableCheckpoint, match=reason):
        open_checkpoint(path, NAME, {"patch_size": 8, "depth": 2, **change})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: {n: x for n, x in t.items() if not n.startswith("head")}, "no classifier"),
        (lambda t: {**t, "extra.weight": torch.ones(2)}, "1 unexpected: extra.weight"),
        (lambda t: {**t, "norm.weight": torch.full((192,), torch.nan)}, "norm.weight has values that are not finite"),
        (lambda t: {**t, "norm.weight": torch.ones(192, dtype=torch.int8)}, "torch.int8: expected floating-point"),
        (lambda t: {"layers.0.blocks.0.x": torch.ones(1), **t}, "is of no plain ViT: its stages"),
        (lambda t: {"rope.freqs": torch.ones(1), **t}, "rotates queries and keys"),
        (lambda t: {"conv1.weight": torch.ones(1), "fc.weight": torch.ones(1)}, "looks like a convolutional network"),
        (lambda t: {"epoch": 3}, "has no tensors, only epoch"),
    ],
)
def test_checkpoint_that_is_no_classifying_vit_is_refused(tmp_path: Path, change: Any, reason: str) -> None:
    path = save(tmp_path / "a.pth", change(vit_of().state_dict()))
    with pytest.raises(UnreadableCheckpoint, match=reason):
        open_checkpoint(path)


def test_half_precision_is_converted_and_said(tmp_path: Path) -> None:
    vit = vit_of().half()
    checkpoint = open_checkpoint(save(tmp_path / "a.pth", vit.state_dict()), NAME, {"patch_size": 8, "depth": 2})
    assert_equal(checkpoint.load(), vit.float())
    assert "converted from float16 to float32" in checkpoint.notes


def write_timm_folder(folder: Path, vit: nn.Module, **changes: Any) -> None:
    torch.save(vit.state_dict(), folder / "pytorch_model.bin")
    pretrained = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.8, "interpolation": "bilinear"}
    config = {
        "architecture": NAME,
        "num_classes": 7,
        "model_args": {key: SMALL[key] for key in ("img_size", "patch_size", "depth")},
        "label_names": [f"class {index}" for index in range(7)],
        "pretrained_cfg": {**pretrained, "crop_mode": "squash", "input_size": [3, 48, 48]},
    }
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_folder_of_timm_gives_model_labels_and_preprocessing(tmp_path: Path, prefix: str) -> None:
    vit = vit_of()
    write_timm_folder(tmp_path, vit)
    checkpoint = open_checkpoint(f"{prefix}{tmp_path}")
    assert checkpoint.architecture == NAME
    assert checkpoint.arguments == SMALL
    assert checkpoint.labels == tuple(f"class {index}" for index in range(7))
    assert_equal(checkpoint.load(), vit)
    loaded: Any = checkpoint.load()
    source: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=7)
    assert_equal(loaded, source)
    for key in ("mean", "std", "crop_pct", "crop_mode", "interpolation", "input_size"):
        expected = source.pretrained_cfg[key]
        assert loaded.pretrained_cfg[key] == (tuple(expected) if isinstance(expected, list) else expected)


def test_older_config_of_timm_is_read(tmp_path: Path) -> None:
    vit = load_vit(NAME, num_classes=3)
    torch.save(vit.state_dict(), tmp_path / "pytorch_model.bin")
    config = {"architecture": NAME, "num_classes": 3, "mean": [0.1] * 3, "labels": ["a", "b", "c"], "num_features": 192}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.labels, checkpoint.pixels["mean"]) == (("a", "b", "c"), (0.1, 0.1, 0.1))
    assert_equal(checkpoint.load(), vit)


def test_architecture_that_cannot_merge_is_refused(tmp_path: Path) -> None:
    write_timm_folder(tmp_path, vit_of(), architecture="vit_relpos_small_patch16_224")
    with pytest.raises(UnsupportedArchitecture, match="cannot merge tokens"):
        open_checkpoint(tmp_path)


def test_facebook_names_of_layer_scale_are_read(tmp_path: Path) -> None:
    vit = vit_of("deit3_small_patch16_224", embed_dim=64, num_heads=1)
    stored = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): tensor
        for name, tensor in vit.state_dict().items()
    }
    path = save(tmp_path / "a.pth", {"model": stored})
    given = {**SMALL, "embed_dim": 64, "num_heads": 1}
    assert_equal(open_checkpoint(path, "deit3_small_patch16_224", given).load(), vit)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_names_of_torchvision_are_read(tmp_path: Path, prefix: str) -> None:
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 48}
    model = torchvision.models.VisionTransformer(**sizes, num_classes=3).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    path = save(tmp_path / "a.pth", {"model": prefixed(model.state_dict(), prefix), "epoch": 1})
    vit = open_checkpoint(path, arguments={"num_heads": 2}).load()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(vit(images), model(images), rtol=0, atol=1e-4)


def test_token_and_average_is_an_argument_of_load_vit() -> None:
    vit: Any = load_vit("vit_small_patch14_dinov2", global_pool=TOKEN_AND_AVERAGE, norm_eps=1e-3, **SMALL)
    assert vit.head.weight.shape == (7, 2 * 384)
    assert {module.eps for module in vit.modules() if isinstance(module, nn.LayerNorm)} == {1e-3}
