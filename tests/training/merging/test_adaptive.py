import math
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.training.merging import oracle
from training.merging import identity_source
from training.merging.adaptive import Score, Split, Thresholds, adaptive_matching

SPLITS: tuple[Split, ...] = ("alternating", "size")
SCORES: tuple[Score, ...] = ("similarity", "error")


def images(seed: int, n_tokens: int, n_images: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a narrow metric (for many similar tokens), features and whole sizes, in float64."""
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(n_images, n_tokens, 3, generator=generator, dtype=torch.float64)
    x = torch.randn(n_images, n_tokens, 4, generator=generator, dtype=torch.float64)
    return metric, x, torch.randint(1, 9, (n_images, n_tokens, 1), generator=generator).double()


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 10**6),
    n_tokens=st.integers(1, 21),
    n_protected=st.integers(0, 3),
    threshold=st.sampled_from([-2.0, 0.0, 0.7, 0.95, 2.0]),
    split=st.sampled_from(SPLITS),
    score=st.sampled_from(SCORES),
)
def test_matching_and_merging_agree_with_the_definition(
    seed: int, n_tokens: int, n_protected: int, threshold: float, split: Split, score: Score
) -> None:
    n_protected = min(n_protected, n_tokens)
    metric, x, size = images(seed, n_tokens, 3)
    matching = adaptive_matching(metric, size, threshold, split=split, score=score, n_protected=n_protected)
    merged, sizes = matching.merge_mean(x, size)
    sums = matching.merge_sum(x)
    for image in range(3):
        own = size[image].flatten().numpy()
        parts = oracle.adaptive_groups(metric[image].numpy(), own, threshold, split, score, n_protected)
        expected, expected_sizes = oracle.merge_mean(x[image].numpy(), size[image].numpy(), parts)
        n_left = len(parts)
        np.testing.assert_allclose(merged[image, :n_left], expected, atol=1e-13)
        np.testing.assert_allclose(cast(Tensor, sizes)[image, :n_left], expected_sizes, atol=1e-13)
        np.testing.assert_allclose(sums[image, :n_left], [x[image][part].sum(0).numpy() for part in parts], atol=1e-13)
        assert not merged[image, n_left:].any()
        assert not cast(Tensor, sizes)[image, n_left:].any()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("split", SPLITS)
def test_merging_is_batch_invariant(split: Split, score: Score) -> None:
    metric, x, size = images(3, 40, 6)
    thresholds = (0.9, 0.8, 0.6)

    def run(first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        tokens, sizes = torch.cat([metric, x], dim=2)[first:last], size[first:last]
        source = identity_source(tokens)
        for threshold in thresholds:
            matching = adaptive_matching(tokens[..., :3], sizes, threshold, split=split, score=score)
            tokens, sizes = cast(tuple[Tensor, Tensor], matching.merge_mean(tokens, sizes))
            source = matching.merge_sum(source)
        return tokens, sizes, source

    batch_tokens, batch_sizes, batch_source = run(0, 6)
    lengths = set()
    for image in range(6):
        tokens, sizes, source = run(image, image + 1)
        n_tokens = tokens.shape[1]
        lengths.add(n_tokens)
        assert torch.equal(batch_source[image, :n_tokens], source[0])
        torch.testing.assert_close(batch_tokens[image, :n_tokens], tokens[0], atol=1e-13, rtol=0)
        assert torch.equal(batch_sizes[image, :n_tokens], sizes[0])  # sums of whole numbers
        assert not batch_sizes[image, n_tokens:].any()
    assert len(lengths) > 1


@pytest.mark.parametrize("split", SPLITS)
def test_size_is_conserved_and_every_patch_is_in_one_group(split: Split) -> None:
    metric, x, _ = images(5, 197, 3)
    size, source = torch.ones_like(x[..., :1]), identity_source(x)
    for block in range(8):
        matching = adaptive_matching(metric, size, 0.97 - 0.05 * block, split=split)
        source = matching.merge_sum(source)
        metric, size = cast(tuple[Tensor, Tensor], matching.merge_mean(metric, size))
    torch.testing.assert_close(size.sum(1), torch.full((3, 1), 197.0, dtype=torch.float64), atol=1e-10, rtol=0)
    assert torch.equal(source.sum(1), torch.ones(3, 197))
    assert torch.equal(source.sum(2, keepdim=True).double(), size)


def test_nothing_above_the_threshold_leaves_the_tokens_in_their_halves() -> None:
    metric, x, _ = images(7, 9, 2)
    merged, sizes = adaptive_matching(metric, None, 2.0).merge_mean(x)
    assert torch.equal(merged, x[:, [0, 2, 4, 6, 8, 1, 3, 5, 7]])
    assert torch.equal(cast(Tensor, sizes), torch.ones(2, 9, 1, dtype=torch.float64))


def test_two_large_tokens_never_merge_when_split_by_size() -> None:
    metric = torch.ones(1, 7, 2)  # all alike: every one of A merges
    size = torch.tensor([1.0, 50, 40, 1, 1, 30, 2]).reshape(1, 7, 1)
    _, sizes = adaptive_matching(metric, size, 0.5, split="size").merge_mean(metric, size)
    assert sorted(cast(Tensor, sizes).flatten().tolist()) == [1, 30, 40, 54]  # 1, 1 and 2 into 50
    _, sizes = adaptive_matching(metric, size, 0.5).merge_mean(metric, size)
    assert cast(Tensor, sizes).max() == 93  # split alternately they do


def test_autocast_changes_no_decision() -> None:
    metric, x, size = (tensor.float() for tensor in images(9, 60, 4))
    expected = adaptive_matching(metric, size, 0.9).merge_sum(x)
    with torch.autocast("cpu", torch.bfloat16):
        matching = adaptive_matching(metric, size, 0.9)
    assert torch.equal(matching.merge_sum(x), expected)


def test_thresholds_fall_with_depth_to_the_floor() -> None:
    found = Thresholds(0.9, 0.1, 0.5, 3).per_block(12)
    assert found[:3] == pytest.approx((0.9, 0.9 - (math.exp(0.1) - 1), 0.9 - (math.exp(0.2) - 1)))
    assert found[-1] == 0.5
    assert list(found) == sorted(found, reverse=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": math.nan}, "alpha nan: expected a finite number"),
        ({"beta": -0.1}, "beta -0.1: expected a number from 0"),
        ({"floor": "0"}, "floor '0': expected a finite number"),
        ({"split_depth": 1.5}, "split_depth 1.5: expected a whole number"),
        ({"score": "cosine"}, "score 'cosine': expected one of similarity, error"),
    ],
)
def test_thresholds_refuse_what_they_cannot_be(change: dict[str, object], message: str) -> None:
    fields: dict[str, object] = {"alpha": 0.9, "beta": 0.1, "floor": 0.5, "split_depth": 3}
    with pytest.raises(ValueError, match=message):
        Thresholds(**{**fields, **change})  # type: ignore[arg-type]
