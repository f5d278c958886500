import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.merging import oracle
from tests.training.models.families import FAMILIES, SMALL, build, images
from training.merging import Schedule, unmerge
from training.models import MergingVisionTransformer, load_vit
from training.models.head import TokenAndAverage


def reference_logits(vit: Any, pixels: Tensor, schedule: list[int], is_proportional: bool) -> Tensor:
    """Return one image's logits, every merge done one token at a time."""
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(pixels)))
    size = torch.ones(x.shape[1], 1, dtype=x.dtype)
    for block, r in zip(vit.blocks, schedule, strict=True):
        attn, hidden = block.attn, block.norm1(x)
        q, k, v = attn.qkv(hidden).reshape(1, x.shape[1], 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(q), attn.k_norm(k)
        logits = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 + (size.T.log() if is_proportional else 0)
        mixed = attn.norm((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = x + block.ls1(attn.proj(mixed))
        if r:
            parts = oracle.groups(k.mean(1)[0].numpy(), r, vit.num_prefix_tokens)
            merged, sizes = oracle.merge_mean(x[0].numpy(), size.numpy(), parts)
            x, size = torch.from_numpy(merged).unsqueeze(0), torch.from_numpy(sizes)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    x = vit.norm(x)
    if vit.global_pool == "token":
        return torch.as_tensor(vit.forward_head(x))
    first = 0 if vit.pool_include_prefix else vit.num_prefix_tokens
    pooled = (x * size)[:, first:].sum(1) / size[first:].sum()
    if isinstance(vit.head, TokenAndAverage):
        return torch.cat([x[:, 0], pooled], dim=1) @ vit.head.weight.T + vit.head.bias
    return torch.as_tensor(vit.head(vit.fc_norm(pooled)))


@pytest.mark.parametrize("family", FAMILIES)
def test_r_0_is_timms_own_forward(family: str) -> None:
    vit, x = build(family), images()
    with torch.no_grad():
        assert (MergingVisionTransformer(vit)(x) - vit(x)).abs().max() < 1e-12
        vit, x = vit.float(), x.float()
        expected = vit(x)
        assert expected.std() > 0.01
        for form in ("masked", "plain"):
            model = MergingVisionTransformer(vit, attention=form)
            assert (model(x) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_agrees_with_a_reference_one_token_at_a_time(family: str) -> None:
    vit, x, schedule = build(family), images(3), [11, 0, 7]
    model = MergingVisionTransformer(vit, schedule)
    with torch.no_grad():
        expected = torch.cat([reference_logits(vit, one, schedule, model.is_proportional) for one in torch.split(x, 1)])
        assert (model(x) - expected).abs().max() < 1e-11
        assert (vit(x) - expected).abs().max() > 1e-4  # merging is seen in the logits


@pytest.mark.parametrize("family", ["augreg", "average"])
@pytest.mark.parametrize("is_proportional", [True, False])
def test_proportional_attention_can_be_chosen(family: str, is_proportional: bool) -> None:
    vit, x = build(family), images(1)
    model = MergingVisionTransformer(vit, [9, 9, 0], proportional_attention=is_proportional)
    with torch.no_grad():
        expected = reference_logits(vit, x, [9, 9, 0], is_proportional)
        assert (model(x) - expected).abs().max() < 1e-11
    assert MergingVisionTransformer(vit).is_proportional == (family == "augreg")


@pytest.mark.parametrize("form", ["plain", "augmented_keys", "augmented_values"])
def test_forms_of_attention_agree(form: Any) -> None:
    vit, x = build("augreg"), images()
    with torch.no_grad():
        expected = MergingVisionTransformer(vit, 6)(x)
        assert (MergingVisionTransformer(vit, 6, attention=form)(x) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("family", ["augreg", "deit-distilled", "registers", "average-no-class-token"])
def test_features_carry_sizes_and_sources(family: str) -> None:
    model = MergingVisionTransformer(build(family), (6, -1))
    n_in, n_out = model.tokens[0], model.tokens[-1]
    with torch.no_grad():
        tokens, size, source = model.forward_features(images(), with_source=True)
        assert model.forward_features(images()).source is None
    assert source is not None
    assert (tokens.shape[1], size.shape, source.shape) == (n_out, (2, n_out, 1), (2, n_out, n_in))
    assert torch.equal(source.sum(1), torch.ones(2, n_in))
    assert torch.equal(source.sum(2, keepdim=True).double(), size)
    protected = torch.eye(n_in)[: model.n_protected].expand(2, -1, -1)
    assert torch.equal(source[:, : model.n_protected], protected)
    assert unmerge(tokens, source).shape == (2, n_in, tokens.shape[2])


def test_unmerged_features_have_size_one() -> None:
    with torch.no_grad():
        assert torch.equal(
            MergingVisionTransformer(build("augreg")).forward_features(images()).size, torch.ones(2, 37, 1)
        )


def test_schedule_is_resolved_and_shown() -> None:
    vit = build("augreg")
    model = MergingVisionTransformer(vit, 16, exhausted="reduce")
    assert model.schedule == (16, 10, 5)
    assert model.tokens == (37, 21, 11, 6)
    assert MergingVisionTransformer(vit, model.schedule).tokens == model.tokens
    with pytest.raises(ValueError, match="block 1 cannot remove r=16"):
        MergingVisionTransformer(vit, 16)


def test_timms_model_is_left_as_it_was() -> None:
    vit, x = build("registers"), images()
    before, state = vit(x), copy.deepcopy(vit.state_dict())
    attributes = {name: set(vars(module)) for name, module in vit.named_modules()}
    MergingVisionTransformer(vit, 8)(x)
    assert torch.equal(vit(x), before)
    assert attributes == {name: set(vars(module)) for name, module in vit.named_modules()}
    assert all(torch.equal(value, state[name]) for name, value in vit.state_dict().items())


def test_random_metric_repeats_with_its_seed() -> None:
    vit, x = build("augreg"), images()
    with torch.no_grad():
        first, same, other = (MergingVisionTransformer(vit, 8, metric="random", metric_seed=s)(x) for s in (0, 0, 1))
        assert torch.equal(first, same)
        assert not torch.allclose(first, other)
        assert not torch.allclose(first, MergingVisionTransformer(vit, 8)(x))


def test_metric_can_be_any_function_of_hidden_and_keys() -> None:
    vit, x, seen = build("augreg"), images(), []

    def metric(*, block: int, hidden: Tensor, keys: Tensor) -> Tensor:
        seen.append((block, tuple(hidden.shape), tuple(keys.shape)))
        return hidden

    MergingVisionTransformer(vit, [8, 0, 8], metric=metric)(x)
    assert seen == [(0, (2, 37, 192), (2, 3, 37, 64)), (2, (2, 29, 192), (2, 3, 29, 64))]
    with pytest.raises(ValueError, match="'keys', 'features', 'random'"):
        MergingVisionTransformer(vit, metric="values")


@pytest.mark.parametrize("family", ["augreg", "deit-distilled", "average-registers"])
def test_loss_reaches_every_weight_through_merging(family: str) -> None:
    model = MergingVisionTransformer(build(family), 8).train()
    model(images()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_patch_dropout_merges_among_the_patches_kept() -> None:
    vit = load_vit("vit_tiny_patch16_224", **SMALL, patch_drop_rate=0.5).double()
    model = MergingVisionTransformer(vit, [6, 3, 1]).train()
    assert model.forward_features(images()).tokens.shape[1] == 1 + 18 - 10
    assert model.eval().forward_features(images()).tokens.shape[1] == 37 - 10
    with pytest.raises(ValueError, match="of the 19 that reach it"):
        MergingVisionTransformer(vit, [10, 0, 0]).train()(images())


@pytest.mark.parametrize("schedule", [5, [9, 4, 0]])
def test_dynamic_size_merges_any_number_of_tokens(schedule: Schedule) -> None:
    vit, x = build("dynamic-size"), images(1, size=64)
    model = MergingVisionTransformer(vit, schedule)
    with torch.no_grad():
        expected = reference_logits(vit, x, [5, 5, 5] if schedule == 5 else [9, 4, 0], True)
        assert (model(x) - expected).abs().max() < 1e-11
