from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.training.models.families import SMALL, build
from tests.training.tiny_vit import tiny_vit
from training.models import MergingVisionTransformer, UnsupportedArchitecture, WeightsMismatch, load_vit
from training.models.embedding import DecoupledEmbedding, EmbeddingConfig
from training.models.weights import save_weights


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin_tiny_patch4_window7_224", "windows"),
        ("swinv2_tiny_window8_256", "windows"),
        ("beit_base_patch16_224", "distance"),
        ("vit_relpos_small_patch16_224", "distance"),
        ("eva02_tiny_patch14_224", "rotates"),
        ("vit_base_patch16_rope_224", "rotates"),
        ("vit_small_r26_s32_224", "hybrid"),
        ("convnext_atto", "convolutions"),
        ("resnet18", "convolutions"),
        ("mixer_s32_224", "no attention"),
        ("naflexvit_base_patch16_gap", "numbers of tokens"),
        ("crossvit_9_240", "not one of timm's plain"),
    ],
)
def test_family_that_cannot_merge_is_refused_by_name(name: str, reason: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=f"{name}.*cannot merge tokens: .*{reason}"):
        load_vit(name)


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("vit_small_patch16_18x2_224", {}, "several attentions"),
        ("vit_base_patch16_rpn_224", {}, "normalise after"),
        ("vit_base_patch16_xp_224", {}, "in parallel"),
        ("vit_dlittle_patch16_reg1_gap_256", {}, "differential"),
        ("vit_base_patch16_siglip_224", {"num_classes": 7}, "'map'"),
        ("vit_tiny_patch16_224", {"global_pool": "max"}, "'max'"),
        ("vit_tiny_patch16_224", {"global_pool": "avgmax"}, "'avgmax'"),
        ("vit_tiny_patch16_224", {"global_pool": ""}, "does not pool"),
        ("vit_tiny_patch16_224", {"num_classes": 0}, "no classifier"),
    ],
)
def test_vit_with_a_part_that_cannot_merge_is_refused(name: str, arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=f"{name} cannot merge tokens: .*{reason}"):
        load_vit(name, depth=1, **arguments)


def test_a_head_of_several_layers_is_named() -> None:
    vit = tiny_vit()
    vit.head = nn.Sequential(nn.Identity(), nn.Linear(32, 10))
    with pytest.raises(UnsupportedArchitecture, match=r"its head is a Sequential, .* expected one linear layer"):
        MergingVisionTransformer(vit)


def test_built_model_is_refused_by_its_class() -> None:
    with pytest.raises(UnsupportedArchitecture, match=r"ResNet cannot merge tokens: .*convolutions"):
        MergingVisionTransformer(timm.create_model("resnet18"))
    with pytest.raises(UnsupportedArchitecture, match="Linear cannot merge tokens"):
        MergingVisionTransformer(nn.Linear(2, 2))


def test_foreign_parts_are_refused() -> None:
    class Odd(nn.Module):
        pass

    vit: Any = build("augreg")
    vit.blocks[1].attn = Odd()
    with pytest.raises(UnsupportedArchitecture, match="its attention is a Odd"):
        MergingVisionTransformer(vit)
    hybrid = timm.create_model("vit_tiny_r_s16_p8_224", depth=1)
    with pytest.raises(UnsupportedArchitecture, match="hybrid"):
        MergingVisionTransformer(hybrid)


def test_unknown_name_is_refused_with_those_like_it() -> None:
    with pytest.raises(ValueError, match=r"no architecture 'vit_tiny_patch16_225'; like it: .*vit_tiny_patch16_224"):
        load_vit("vit_tiny_patch16_225")


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, path)
    return path


def test_local_weights_are_loaded_bit_identically(tmp_path: Path) -> None:
    saved = load_vit("vit_tiny_patch16_224", **SMALL).state_dict()
    path = write(tmp_path / "vit.safetensors", saved)
    loaded = load_vit("vit_tiny_patch16_224", weights=path, **SMALL).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in saved.items())


def test_embedding_rows_are_left_out_and_nothing_else_is(tmp_path: Path) -> None:
    vit = load_vit("vit_tiny_patch16_224", **SMALL)
    path = tmp_path / "weights.safetensors"
    save_weights(vit, DecoupledEmbedding(EmbeddingConfig(depth=3, width=192, dim=4, r=2)), path)
    tensors = load_file(path)
    assert tensors["blocks.2.attn.qkv.weight_embedding"].shape == (4, 192)
    loaded = load_vit("vit_tiny_patch16_224", weights=path, **SMALL).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in vit.state_dict().items())
    for name in ("blocks.0.attn.proj.weight_embedding", "blocks.0.attn.qkv.weight_embedding2", "weight_embedding"):
        write(path, {**tensors, name: torch.zeros(1)})
        with pytest.raises(WeightsMismatch, match=f"1 unexpected: {name}"):
            load_vit("vit_tiny_patch16_224", weights=path, **SMALL)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    tensors = load_vit("vit_tiny_patch16_224", **SMALL).state_dict()
    del tensors["norm.weight"]
    tensors["extra.weight"] = torch.zeros(1)
    tensors["head.bias"] = torch.zeros(9)
    path = write(tmp_path / "odd.safetensors", tensors)
    with pytest.raises(WeightsMismatch) as error:
        load_vit("vit_tiny_patch16_224", weights=path, **SMALL)
    message = str(error.value)
    for part in (str(path), "1 missing: norm.weight", "1 unexpected: extra.weight", "head.bias (9,) instead of (7,)"):
        assert part in message


def test_many_differences_are_counted_and_shortened(tmp_path: Path) -> None:
    path = write(tmp_path / "one.safetensors", {"norm.bias": torch.zeros(192)})
    with pytest.raises(WeightsMismatch, match=r"\d\d missing: cls_token, [^;]*, …$"):
        load_vit("vit_tiny_patch16_224", weights=path, **SMALL)


def test_file_that_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(WeightsMismatch, match=r"cut.safetensors is not a safetensors file"):
        load_vit("vit_tiny_patch16_224", weights=path, **SMALL)
    with pytest.raises(FileNotFoundError, match=r"nowhere.safetensors"):
        load_vit("vit_tiny_patch16_224", weights=tmp_path / "nowhere.safetensors", **SMALL)


def test_weights_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="'pretrained' or the path"):
        load_vit("vit_tiny_patch16_224", weights="vit.pth")  # type: ignore[arg-type]
