import pytest
import torch
from torch import Tensor

from tests.training.models.families import build, images
from tests.training.tiny_vit import tiny_vit
from training.merging.relaxed import Relaxation
from training.models.embedding import DecoupledEmbedding, EmbeddingConfig
from training.models.relaxed import RelaxedVisionTransformer
from training.models.vit import MergingVisionTransformer

HARD = Relaxation(tau1=0.1, tau2=1e-7)


def pixels(n_images: int = 2) -> Tensor:
    return torch.randn(n_images, 3, 112, 112, generator=torch.Generator().manual_seed(2))


def embedding() -> DecoupledEmbedding:
    torch.manual_seed(5)
    return DecoupledEmbedding(EmbeddingConfig(depth=3, width=32, dim=8, r=16))


@pytest.mark.parametrize("attention", ["augmented_values", "plain_augmented_values"])
@pytest.mark.parametrize("keep_tail", [True, False])
def test_relaxed_model_tends_to_the_hard_one_as_tau2_falls(attention: str, keep_tail: bool) -> None:
    vit, own = tiny_vit().double(), embedding().double()
    x = pixels().double()
    with torch.no_grad():
        expected = MergingVisionTransformer(vit, 16, metric=own)(x)
        found = RelaxedVisionTransformer(
            vit,
            16,
            metric=own,
            relaxation=HARD,
            keep_tail=keep_tail,
            attention=attention,  # type: ignore[arg-type]
        )(x)
        assert float((found - expected).abs().max()) < 1e-6
        assert float((expected - vit(x)).abs().max()) > 1e-3  # merging is seen in the logits


@pytest.mark.parametrize("family", ["deit-distilled", "registers", "average", "average-registers", "qk-norm"])
def test_relaxed_model_tends_to_the_hard_one_in_other_families(family: str) -> None:
    vit, x = build(family), images(2)
    model = MergingVisionTransformer(vit, [11, 0, 7])
    with torch.no_grad():
        found = RelaxedVisionTransformer(vit, [11, 0, 7], metric="keys", relaxation=HARD)(x)
        assert float((found - model(x)).abs().max()) < 1e-5


def test_relaxed_model_keeps_the_sum_of_sizes_and_the_class_token() -> None:
    model = RelaxedVisionTransformer(tiny_vit(), 16, metric=embedding())
    tokens, size, source = model.forward_features(pixels())
    assert tokens.shape == (2, 197, 32)
    assert source is None
    torch.testing.assert_close(size.sum(1), torch.full((2, 1), 197.0), rtol=1e-5, atol=0)
    assert torch.equal(size[:, 0], torch.ones(2, 1))


def test_relaxed_model_trains_every_block_that_merges_before_an_attention() -> None:
    """The last block merges after the last attention, so the class token does not depend on it."""
    own = embedding()
    vit = tiny_vit().requires_grad_(False)
    RelaxedVisionTransformer(vit, [16, 8, 8], metric=own)(pixels()).square().sum().backward()
    norms = [float(layer.weight.grad.norm()) for layer in own.blocks]  # type: ignore[union-attr,operator]
    assert norms[0] > 0
    assert norms[1] > 0
    assert norms[2] == 0
    assert all(parameter.grad is None for parameter in vit.parameters())


def test_relaxed_model_gradient_is_finite_under_autocast_at_the_highest_rate() -> None:
    own = embedding()
    model = RelaxedVisionTransformer(tiny_vit().requires_grad_(False), 98, exhausted="reduce", metric=own)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(pixels()).float().logsumexp(-1).sum()
    loss.backward()
    assert all(bool(layer.weight.grad.isfinite().all()) for layer in own.blocks)  # type: ignore[union-attr,operator]


def test_relaxed_model_has_no_source_map() -> None:
    with pytest.raises(ValueError, match="with_source"):
        RelaxedVisionTransformer(tiny_vit(), 4, metric="keys").forward_features(pixels(), with_source=True)
