from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.training.merging import oracle
from training.merging import (
    IDENTITY,
    BipartiteMatching,
    bipartite_soft_matching,
    cosine_scores,
    identity_source,
    match_by_scores,
    max_r,
    unmerge,
)


def random_case(seed: int, n_tokens: int, n_images: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Return metric, features and sizes of whole patches, in float64."""
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(n_images, n_tokens, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(n_images, n_tokens, 3, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 9, (n_images, n_tokens, 1), generator=generator).double()
    return metric, x, size


@settings(deadline=None, max_examples=150)
@given(seed=st.integers(0, 10**6), n_tokens=st.integers(1, 25), n_protected=st.integers(0, 5), data=st.data())
def test_matching_and_merging_agree_with_the_definition(
    seed: int, n_tokens: int, n_protected: int, data: st.DataObject
) -> None:
    n_protected = min(n_protected, n_tokens)
    r = data.draw(st.integers(0, max_r(n_tokens, n_protected)))
    metric, x, size = random_case(seed, n_tokens)
    matching = bipartite_soft_matching(metric, r, n_protected=n_protected)
    merged, sizes = matching.merge_mean(x, size)
    plain, counts = matching.merge_mean(x)
    sums = matching.merge_sum(x)
    for image in range(2):
        parts = oracle.groups(metric[image].numpy(), r, n_protected) if r else [[i] for i in range(n_tokens)]
        expected, expected_sizes = oracle.merge_mean(x[image].numpy(), size[image].numpy(), parts)
        np.testing.assert_allclose(merged[image], expected, atol=1e-13)
        np.testing.assert_allclose(cast(Tensor, sizes)[image], expected_sizes, atol=1e-13)
        ones = np.ones((n_tokens, 1))
        np.testing.assert_allclose(plain[image], oracle.merge_mean(x[image].numpy(), ones, parts)[0], atol=1e-13)
        np.testing.assert_allclose(sums[image], [x[image][part].sum(0).numpy() for part in parts], atol=1e-13)
        if r:
            assert cast(Tensor, counts)[image].flatten().tolist() == [len(part) for part in parts]


@pytest.mark.parametrize(("n_tokens", "n_protected"), [(197, 1), (198, 2), (196, 0), (201, 5), (50, 3)])
def test_repeated_merging_conserves_size_and_partitions_the_patches(n_tokens: int, n_protected: int) -> None:
    generator = torch.Generator().manual_seed(n_tokens)
    x = torch.randn(3, n_tokens, 4, generator=generator, dtype=torch.float64)
    original, size, source = x, None, identity_source(x)
    while (r := min(7, max_r(x.shape[1], n_protected))) > 0:
        matching = bipartite_soft_matching(x, r, n_protected=n_protected)
        x, size = matching.merge_mean(x, size)
        source = matching.merge_sum(source)
        assert size is not None
        assert (size.sum(1) - n_tokens).abs().max() < 1e-13 * n_tokens
        assert ((source == 0) | (source == 1)).all()
        assert torch.equal(source.sum(1), torch.ones(3, n_tokens))
        assert torch.equal(source.sum(2, keepdim=True), size.float())
        torch.testing.assert_close(source.double() @ original / size, x, atol=1e-12, rtol=0)
    protected = torch.eye(n_tokens)[:n_protected].expand(3, -1, -1)
    assert torch.equal(source[:, :n_protected], protected)
    assert torch.equal(x[:, :n_protected], original[:, :n_protected])


def test_result_is_protected_tokens_then_the_rest_of_a_then_b() -> None:
    metric = torch.tensor([[1.0, 0.0], [0.1, 1], [0.9, 1], [1, 0.0], [1, 0.01], [0.5, 0.5], [-1, 0.2]]).unsqueeze(0)
    index = torch.arange(7.0).reshape(1, 7, 1)
    matching = bipartite_soft_matching(metric, 1, n_protected=1)
    assert matching.merge_mean(index)[0].flatten().tolist() == [0, 2, 6, 1, 3.5, 5]
    matching = bipartite_soft_matching(metric, 1, n_protected=2)
    assert matching.merge_mean(index)[0].flatten().tolist() == [0, 1, 2, 6, 3.5, 5]


def test_several_tokens_share_one_destination() -> None:
    metric = torch.tensor([[0.0, 1.0], [1.0, 0.0]] * 4).unsqueeze(0)
    metric[0, 1] = torch.tensor([0.0, 1.0])  # the only one of B that is like A
    x = torch.arange(8.0).reshape(1, 8, 1)
    merged, size = bipartite_soft_matching(metric, 4, n_protected=0).merge_mean(x)
    assert merged.flatten().tolist() == pytest.approx([(0 + 2 + 4 + 6 + 1) / 5, 3, 5, 7])
    assert cast(Tensor, size).flatten().tolist() == [5, 1, 1, 1]


def test_equal_scores_are_taken_in_order() -> None:
    metric = torch.ones(2, 9, 4)
    index = torch.arange(9.0).reshape(1, 9, 1).expand(2, -1, -1)
    source = bipartite_soft_matching(metric, 2).merge_sum(identity_source(index))
    assert source[:, 3].nonzero()[:, 1].tolist() == [1, 2, 4, 1, 2, 4]


def test_unmerged_tokens_stay_bit_identical() -> None:
    metric, x, size = random_case(3, 21)
    matching = bipartite_soft_matching(metric, 6)
    for sizes in (None, size):
        merged, after = matching.merge_mean(x.float(), None if sizes is None else sizes.float())
        source = matching.merge_sum(identity_source(x))
        is_unmerged = source.sum(2) == 1
        expected = torch.take_along_dim(x.float(), source.argmax(2, keepdim=True), dim=1)
        assert torch.equal(merged[is_unmerged], expected[is_unmerged])
        assert is_unmerged.sum() >= 2 * (15 - 6)
        assert after is not None


def test_r_0_is_the_identity() -> None:
    metric, x, size = random_case(0, 9)
    matching = bipartite_soft_matching(metric, 0)
    assert matching is IDENTITY
    assert match_by_scores(cosine_scores(metric), 0, n_tokens=9) is IDENTITY
    merged, after = matching.merge_mean(x, size)
    assert merged is x
    assert after is size
    assert matching.merge_mean(x) == (x, None)
    assert matching.merge_sum(x) is x


@pytest.mark.parametrize(
    ("n_tokens", "r", "n_protected"), [(9, -1, 1), (9, 5, 1), (10, 5, 1), (3, 1, 2), (1, 1, 0), (4, 0, 5), (4, 0, -1)]
)
def test_impossible_r_or_protection_is_refused(n_tokens: int, r: int, n_protected: int) -> None:
    with pytest.raises(ValueError, match="must be from 0 to"):
        bipartite_soft_matching(torch.randn(1, n_tokens, 4), r, n_protected=n_protected)


def test_metric_without_images_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(9, 4\)"):
        bipartite_soft_matching(torch.randn(9, 4), 1)


def test_zero_metric_merges_without_nan() -> None:
    merged, _ = bipartite_soft_matching(torch.zeros(1, 9, 4), 4).merge_mean(torch.randn(1, 9, 2))
    assert merged.isfinite().all()


def test_matching_scales_with_neither_token_nor_head() -> None:
    metric, x, _ = random_case(5, 15)
    scaled = metric * torch.rand(2, 15, 1, dtype=torch.float64).add(0.1)
    before, after = (bipartite_soft_matching(m, 5).merge_sum(identity_source(x)) for m in (metric, scaled))
    assert torch.equal(before, after)


def test_matching_is_batch_invariant() -> None:
    metric, x, size = random_case(7, 20, n_images=4)
    source = identity_source(x)
    batch = bipartite_soft_matching(metric, 6)
    batch_source, batch_x = batch.merge_sum(source), batch.merge_mean(x, size)[0]
    for image in range(4):
        one = slice(image, image + 1)
        matching = bipartite_soft_matching(metric[one], 6)
        assert torch.equal(matching.merge_sum(source[one]), batch_source[one])
        torch.testing.assert_close(matching.merge_mean(x[one], size[one])[0], batch_x[one], atol=1e-13, rtol=0)


def test_gradient_of_a_mean_is_each_tokens_share() -> None:
    metric, x, size = random_case(11, 13)
    metric.requires_grad_()
    x.requires_grad_()
    matching = bipartite_soft_matching(metric, 5)
    merged, total = matching.merge_mean(x, size)
    merged.sum().backward()  # type: ignore[no-untyped-call]
    source = matching.merge_sum(identity_source(x)).double()
    share = size / (source.transpose(1, 2) @ cast(Tensor, total))
    torch.testing.assert_close(cast(Tensor, x.grad), share.expand_as(x), atol=1e-14, rtol=0)
    assert metric.grad is None


def test_half_precision_features_keep_exact_sizes() -> None:
    x = torch.ones(1, 1400, 2, dtype=torch.bfloat16)
    size: Tensor | None = None
    while (r := max_r(x.shape[1], 0)) > 0:
        x, size = bipartite_soft_matching(x, r, n_protected=0).merge_mean(x, size)
    assert x.dtype == torch.bfloat16
    assert cast(Tensor, size).item() == 1400


def test_matching_takes_scores_of_any_kind() -> None:
    scores = -torch.cdist(torch.randn(2, 4, 3), torch.randn(2, 4, 3))
    matching = match_by_scores(scores, 3, n_tokens=9)
    assert isinstance(matching, BipartiteMatching)
    source = matching.merge_sum(identity_source(torch.empty(2, 9, 1)))
    assert source.shape == (2, 6, 9)
    assert torch.equal(source.sum(1), torch.ones(2, 9))


def test_unmerging_what_was_merged_gives_each_place_its_group_mean() -> None:
    metric, x, _ = random_case(13, 17)
    matching = bipartite_soft_matching(metric, 8)
    merged, size = matching.merge_mean(x)
    source = matching.merge_sum(identity_source(x))
    spread = unmerge(merged, source)
    torch.testing.assert_close(spread, source.double().transpose(1, 2) @ merged)
    remerged, _ = matching.merge_mean(spread)
    torch.testing.assert_close(remerged, merged)
    assert torch.equal(
        unmerge(cast(Tensor, size), source).squeeze(-1), (source.transpose(1, 2) @ source).sum(2).double()
    )
    assert torch.equal(unmerge(x, identity_source(x)), x)


def test_unmerging_with_the_source_of_other_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="differ"):
        unmerge(torch.zeros(1, 5, 2), torch.eye(6).unsqueeze(0))


def test_matching_under_autocast_decides_as_without() -> None:
    metric = torch.randn(4, 65, 8, generator=torch.Generator().manual_seed(3))
    x = torch.randn(4, 65, 3, generator=torch.Generator().manual_seed(4))
    expected, _ = bipartite_soft_matching(metric, 20).merge_mean(x)
    with torch.autocast("cpu", torch.bfloat16):
        matching = bipartite_soft_matching(metric, 20)
    found, _ = matching.merge_mean(x)
    assert torch.equal(found, expected)
