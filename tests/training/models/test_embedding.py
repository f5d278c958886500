import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.training.tiny_vit import ARGUMENTS, tiny_vit
from training.merging.relaxed import Relaxation
from training.models.embedding import (
    DecoupledEmbedding,
    EmbeddingConfig,
    EmbeddingMismatch,
    default_dim,
    load_embedding,
)
from training.models.vit import MergingVisionTransformer, load_vit

CONFIG = EmbeddingConfig(depth=3, width=32, dim=8, r=4, relaxation=Relaxation(0.2, 0.3, 2), recipe="some.toml")


def embedding() -> DecoupledEmbedding:
    torch.manual_seed(5)
    return DecoupledEmbedding(CONFIG)


def test_embedding_is_one_affine_layer_a_block_of_what_attention_reads_detached() -> None:
    own = embedding()
    hidden = torch.randn(2, 7, 32, requires_grad=True)
    found = own(block=1, hidden=hidden)
    layer = own.blocks[1]
    torch.testing.assert_close(found, hidden.detach() @ layer.weight.T + layer.bias)  # type: ignore[operator]
    found.sum().backward()
    assert hidden.grad is None
    assert [name for name, parameter in own.named_parameters() if parameter.grad is not None] == [
        "blocks.1.weight",
        "blocks.1.bias",
    ]


def test_embedding_of_deit_small_has_the_published_number_of_weights() -> None:
    own = DecoupledEmbedding(EmbeddingConfig(depth=12, width=384, dim=default_dim(384), r=16))
    assert sum(parameter.numel() for parameter in own.parameters()) == 295_680
    assert (default_dim(768), default_dim(1024)) == (64, 128)


def test_saved_embedding_comes_back_with_its_config(tmp_path: Path) -> None:
    own = embedding()
    own.save(tmp_path / "embedding.safetensors")
    found = load_embedding(tmp_path / "embedding.safetensors")
    assert found.config == CONFIG
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), found.parameters(), strict=True))


def test_embedding_file_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "embedding.safetensors"
    with pytest.raises(FileNotFoundError, match=r"embedding\.safetensors"):
        load_embedding(file)
    file.write_bytes(b"not a safetensors file")
    with pytest.raises(EmbeddingMismatch, match="is not a safetensors file"):
        load_embedding(file)
    save_file({"head.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(EmbeddingMismatch, match="is not a decoupled embedding"):
        load_embedding(file)


def test_embedding_file_whose_tensors_are_not_its_configs_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "embedding.safetensors"
    own = embedding()
    own.save(file)
    tensors = load_file(file)
    del tensors["blocks.2.bias"]
    save_file(tensors, file, metadata={"dtem-embedding": json.dumps(asdict(CONFIG))})
    with pytest.raises(EmbeddingMismatch, match=r"blocks\.2\.bias"):
        load_embedding(file)
    save_file(load_file(file), file, metadata={"dtem-embedding": json.dumps({**asdict(CONFIG), "depth": 0})})
    with pytest.raises(EmbeddingMismatch, match="depth 0"):
        load_embedding(file)


def test_embedding_of_another_vit_is_refused() -> None:
    other = DecoupledEmbedding(EmbeddingConfig(depth=12, width=384, dim=64, r=16))
    with pytest.raises(EmbeddingMismatch, match="12 blocks of width 384, not 3 of width 32"):
        MergingVisionTransformer(tiny_vit(), 4, metric=other)


@pytest.mark.parametrize("r", [0, 4, 16])
def test_joined_projections_give_what_two_layers_give(r: int) -> None:
    vit, own = tiny_vit().double(), embedding().double()
    images = torch.randn(3, 3, 112, 112, dtype=torch.float64)
    with torch.no_grad():
        apart = MergingVisionTransformer(vit, r, metric=own)(images)
        joined = MergingVisionTransformer(vit, r, metric=own, join=True).double()(images)
    assert float((apart - joined).abs().max()) < 1e-11


def test_joined_projections_work_without_a_qkv_bias() -> None:
    torch.manual_seed(3)
    vit = load_vit("vit_tiny_patch16_224", qkv_bias=False, **ARGUMENTS).eval().double()
    own = embedding().double()
    images = torch.randn(2, 3, 112, 112, dtype=torch.float64)
    with torch.no_grad():
        apart = MergingVisionTransformer(vit, 8, metric=own)(images)
        joined = MergingVisionTransformer(vit, 8, metric=own, join=True).double()(images)
    assert float((apart - joined).abs().max()) < 1e-11


def test_embedding_under_autocast_is_float32() -> None:
    own, hidden = embedding(), torch.randn(2, 7, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found = own(block=0, hidden=hidden.bfloat16())
    assert torch.equal(found, own(block=0, hidden=hidden.bfloat16().float()))
