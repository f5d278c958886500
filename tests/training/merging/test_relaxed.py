import pytest
import torch
from torch import Tensor

from tests.training.merging import relaxed_oracle
from training.merging import bipartite_soft_matching
from training.merging.relaxed import Relaxation, relaxed_matching, soft_grouping

SOFT = Relaxation(tau1=0.3, tau2=0.3)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("relaxation", [Relaxation(), SOFT, Relaxation(0.05, 0.5), Relaxation(0.1, 0.1, n_partners=1)])
@pytest.mark.parametrize("r", [1, 5, 12])
def test_soft_grouping_is_the_formula_and_so_is_its_gradient(r: int, relaxation: Relaxation) -> None:
    scores = drawn(r, 3, 12, 11).tanh().requires_grad_()
    weights = drawn(r + 1, 3, 12, 11)
    expected, found = relaxed_oracle.grouping(scores, r, relaxation), soft_grouping(scores, r, relaxation)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), scores)
    (gradient,) = torch.autograd.grad((found * weights).sum(), scores)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-7, atol=1e-10)


def test_soft_grouping_gradient_is_that_of_finite_differences() -> None:
    """Few picks of many rows, so that no row is clamped at 1, where the gradient differs on purpose."""
    scores = (drawn(0, 2, 7, 6).tanh() / 4).requires_grad_()
    assert float(soft_grouping(scores.detach(), 3, SOFT).sum(-1).max()) < 1
    assert torch.autograd.gradcheck(lambda s: soft_grouping(s, 3, SOFT), (scores,))


def test_relaxed_merge_gradient_is_that_of_finite_differences() -> None:
    x, size = drawn(1, 1, 9, 3).requires_grad_(), (drawn(2, 1, 9, 1).abs() + 0.5).requires_grad_()
    metric = drawn(3, 1, 9, 4).requires_grad_()

    def merged(x: Tensor, size: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
        return relaxed_matching(metric, 2, Relaxation(0.5, 0.5)).merge(x, size)

    assert torch.autograd.gradcheck(merged, (x, size, metric))


def test_soft_grouping_rows_sum_to_at_most_one_and_have_few_partners() -> None:
    share = soft_grouping(drawn(4, 8, 40, 41).tanh(), 20)
    assert float(share.sum(-1).max()) <= 1 + 1e-12
    assert float(share.min()) >= 0
    assert int((share > 0).sum(-1).max()) <= 3


@pytest.mark.parametrize("n_protected", [0, 1, 2, 5])
def test_relaxed_merge_tends_to_the_hard_one_as_tau2_falls(n_protected: int) -> None:
    for seed in range(50):
        metric, x = drawn(seed, 2, 33, 16), drawn(seed + 1000, 2, 33, 5)
        size = torch.randint(1, 5, (2, 33, 1), generator=torch.Generator().manual_seed(seed)).double()
        hard_x, hard_size = bipartite_soft_matching(metric, 9, n_protected=n_protected).merge_mean(x, size)
        matching = relaxed_matching(metric, 9, Relaxation(tau1=0.1, tau2=1e-6), n_protected=n_protected)
        soft_x, soft_size = matching.merge(x, size)
        torch.testing.assert_close(soft_x[:, :24], hard_x)
        torch.testing.assert_close(soft_size[:, :24], hard_size)
        assert float(soft_size[:, 24:].max()) < 1e-6


def test_relaxed_merge_keeps_the_sum_of_sizes_over_many_blocks() -> None:
    x, size = drawn(5, 4, 65, 6), torch.ones(4, 65, 1, dtype=torch.float64)
    n_active = 65
    for block in range(4):
        matching = relaxed_matching(drawn(block, 4, n_active, 8), 12, SOFT)
        x, size = matching.merge(x, size)
        n_active -= 12
        assert float((size.sum(1) - 65).abs().max()) < 1e-11
        assert float(size.min()) >= 0
    assert x.shape == (4, 65, 6)


def test_relaxed_merge_keeps_the_weighted_mean_of_the_tokens() -> None:
    """What moves from A to B takes its features along: the sum of size times features stays."""
    x, size = drawn(6, 3, 21, 4), drawn(7, 3, 21, 1).abs() + 0.1
    merged_x, merged_size = relaxed_matching(drawn(8, 3, 21, 8), 6, SOFT).merge(x, size)
    torch.testing.assert_close((merged_x * merged_size).sum(1), (x * size).sum(1))


def test_relaxed_merge_without_tail_is_the_same_tokens_cut_short() -> None:
    x, size = drawn(9, 2, 33, 4), drawn(10, 2, 33, 1).abs()
    matching = relaxed_matching(drawn(11, 2, 25, 8), 7)  # 25 of 33 are active
    kept_x, kept_size = matching.merge(x, size)
    short_x, short_size = matching.merge(x, size, keep_tail=False)
    assert short_x.shape == (2, 18, 4)
    assert torch.equal(short_x, kept_x[:, :18])
    assert torch.equal(short_size, kept_size[:, :18])
    assert torch.equal(kept_x[:, 25:], x[:, 25:])  # what faded before stays where it is


def test_relaxed_merge_keeps_protected_tokens() -> None:
    x, size = drawn(12, 2, 20, 4), torch.ones(2, 20, 1, dtype=torch.float64)
    merged_x, merged_size = relaxed_matching(drawn(13, 2, 20, 8), 5, n_protected=3).merge(x, size)
    assert torch.equal(merged_x[:, :3], x[:, :3])
    assert torch.equal(merged_size[:, :3], size[:, :3])


def test_relaxed_matching_is_float32_whatever_the_autocast() -> None:
    metric, x = drawn(14, 2, 33, 8).bfloat16(), drawn(15, 2, 33, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        merged_x, merged_size = relaxed_matching(metric, 8).merge(x, torch.ones(2, 33, 1))
    assert merged_x.dtype == merged_size.dtype == torch.float32
    expected_x, _ = relaxed_matching(metric.float(), 8).merge(x.float(), torch.ones(2, 33, 1))
    assert torch.equal(merged_x, expected_x)


def test_relaxed_matching_gradient_is_finite_where_all_tokens_are_alike() -> None:
    metric = torch.ones(1, 33, 8).requires_grad_()
    x = torch.randn(1, 33, 4, generator=torch.Generator().manual_seed(0))
    merged_x, merged_size = relaxed_matching(metric, 16, Relaxation(0.01, 0.01)).merge(x, torch.ones(1, 33, 1))
    (merged_x.square().sum() + merged_size.square().sum()).backward()  # type: ignore[no-untyped-call]
    assert metric.grad is not None
    assert bool(metric.grad.isfinite().all())


def test_relaxed_matching_refuses_what_a_hard_one_refuses() -> None:
    with pytest.raises(ValueError, match="r must be from 0 to 16 for 33 tokens"):
        relaxed_matching(torch.randn(1, 33, 4), 17)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"tau1": 0.0}, "tau1 0.0"), ({"tau2": -1.0}, "tau2 -1.0"), ({"n_partners": 0}, "n_partners 0")],
)
def test_relaxation_names_what_it_refuses(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Relaxation(**arguments)  # type: ignore[arg-type]
