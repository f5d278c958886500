from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.training.models.families import build, images
from tests.training.tiny_vit import tiny_vit
from training.merging.adaptive import Score, Thresholds
from training.models import count_macs, vit_macs
from training.models.adaptive import AdaptiveVisionTransformer
from training.models.embedding import DecoupledEmbedding, EmbeddingConfig

FAMILIES = ["deit-distilled", "registers", "average", "average-registers", "qk-norm", "token-and-average"]
NEVER = Thresholds(alpha=2.0, beta=0.0, floor=2.0, split_depth=2)


def pixels(n_images: int) -> Tensor:
    """Return images of varying uniformity: noise on one colour, weaker with each image."""
    noise = torch.randn(n_images, 3, 112, 112, generator=torch.Generator().manual_seed(2))
    return 0.5 + noise / 4.0 ** torch.arange(n_images).view(-1, 1, 1, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_model_that_never_merges_gives_timms_logits(family: str) -> None:
    vit, x = build(family), images(2)
    with torch.no_grad():
        logits, counts = AdaptiveVisionTransformer(vit, NEVER).forward_counted(x)
        assert float((logits - vit(x)).abs().max()) < 1e-5
    assert (counts == counts[0, 0]).all()


@pytest.mark.parametrize("score", ["similarity", "error"])
@pytest.mark.parametrize("split_depth", [0, 1, 3])
def test_model_is_batch_invariant(split_depth: int, score: Score) -> None:
    model = AdaptiveVisionTransformer(tiny_vit().double(), Thresholds(0.9, 0.05, 0.5, split_depth, score))
    x = pixels(4).double()
    with torch.no_grad():
        batch, counts = model.forward_counted(x)
        single = [model.forward_counted(image[None]) for image in x]
    assert torch.equal(counts, torch.cat([count for _, count in single]))
    torch.testing.assert_close(batch, torch.cat([logits for logits, _ in single]), rtol=0, atol=1e-12)
    assert len(set(counts[:, -1].tolist())) > 2  # they keep different numbers of tokens
    assert (counts[:, 1:] <= counts[:, :-1]).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_rows_change_no_result_in_other_families(family: str) -> None:
    model = AdaptiveVisionTransformer(build(family).double(), Thresholds(0.6, 0.05, 0.2, 1))
    x = images(3).double()
    x[1] *= 0.05
    with torch.no_grad():
        batch, counts = model.forward_counted(x)
        for image in range(3):
            single, count = model.forward_counted(x[image : image + 1])
            torch.testing.assert_close(batch[image], single[0], rtol=0, atol=1e-10)
            assert torch.equal(count[0], counts[image])
    assert len(set(counts[:, -1].tolist())) > 1


def test_source_map_gives_each_patch_to_one_token_that_is_there() -> None:
    model = AdaptiveVisionTransformer(tiny_vit(), Thresholds(0.9, 0.05, 0.5, 2))
    with torch.no_grad():
        _, size, source = model.forward_features(pixels(3), with_source=True)
    assert source is not None
    assert torch.equal(source.sum(1), torch.ones(3, 197))
    torch.testing.assert_close(source.sum(2, keepdim=True), size)


def test_joined_embedding_decides_as_the_separate_embedding() -> None:
    torch.manual_seed(5)
    embedding = DecoupledEmbedding(EmbeddingConfig(depth=3, width=32, dim=8, r=16)).double().eval()
    vit, thresholds = tiny_vit().double().eval(), Thresholds(0.95, 0.05, 0.5, 2)
    with torch.no_grad():
        apart = AdaptiveVisionTransformer(vit, thresholds, metric=embedding).forward_counted(pixels(3).double())
        model = AdaptiveVisionTransformer(vit, thresholds, metric=embedding, join=True).double()
        joined = model.forward_counted(pixels(3).double())
    assert torch.equal(apart[1], joined[1])
    torch.testing.assert_close(apart[0], joined[0], rtol=0, atol=1e-10)
    assert apart[1][0, -1] != apart[1][2, -1]


@pytest.mark.parametrize("metric", ["keys", "features", "embedding"])
@pytest.mark.parametrize("split_depth", [0, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_macs_of_an_image_are_those_that_are_counted_as_it_runs(family: str, split_depth: int, metric: Any) -> None:
    vit: Any = build(family)
    if metric == "embedding":
        metric = DecoupledEmbedding(EmbeddingConfig(depth=3, width=int(vit.embed_dim), dim=5, r=4)).double()
    model = AdaptiveVisionTransformer(vit, Thresholds(1.2, 0.35, 0.1, split_depth), metric=metric).double()
    assert model.thresholds.per_block(3)[0] > 1 > model.thresholds.per_block(3)[1]  # one block skips matching
    x = images(2)
    with torch.no_grad():
        _, counts = model.forward_counted(x)
        for image, macs in zip(x, model.macs(counts).tolist(), strict=True):
            with FlopCounterMode(display=False) as counter:
                model(image[None])
            assert counter.get_total_flops() == 2 * macs
    assert (counts[:, -1] < counts[:, 0]).all()


def test_macs_of_a_model_that_never_merges_are_the_vits() -> None:
    vit = tiny_vit()
    model = AdaptiveVisionTransformer(vit, NEVER)
    with torch.no_grad():
        _, counts = model.forward_counted(pixels(1))
    assert model.macs(counts).tolist() == [vit_macs(vit, [0, 0, 0])] == [count_macs(vit, 112)]
