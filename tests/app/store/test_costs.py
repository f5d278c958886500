import pytest

from app.store.costs import DEFAULT_SECONDS, MAX_OUTLIER_RATIO, CostTable, Pace, batch_buckets


@pytest.mark.parametrize(("max_batch", "sizes"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16])])
def test_batch_buckets_double_up_to_the_maximum(max_batch: int, sizes: list[int]) -> None:
    assert batch_buckets(max_batch) == sizes


def test_table_is_linear_between_measurements_and_proportional_above() -> None:
    table = CostTable({1: 0.010, 4: 0.028, 8: 0.060})
    assert [table.seconds(n) for n in (1, 2, 3, 4, 6, 8, 16)] == pytest.approx(
        [0.010, 0.016, 0.022, 0.028, 0.044, 0.060, 0.120]
    )


def test_table_without_measurements_uses_the_default_cost() -> None:
    assert CostTable().seconds(3) == pytest.approx(3 * DEFAULT_SECONDS)


@pytest.mark.parametrize("n_images", [1, 3, 4, 6, 12])
def test_table_converges_to_the_duration_of_runs(n_images: int) -> None:
    table = CostTable({1: 0.010, 4: 0.028, 8: 0.060})
    for _ in range(200):
        table.learn(n_images, 0.1)
    assert table.seconds(n_images) == pytest.approx(0.1, rel=1e-3)
    assert all(table.seconds(n) > 0 for n in range(1, 20))


def test_table_stays_positive() -> None:
    table = CostTable({1: 0.010, 8: 0.060})
    for _ in range(500):
        table.learn(4, 1e-9)
    assert all(table.seconds(n) > 0 for n in (1, 4, 8))


def test_pace_follows_the_host_but_limits_outliers() -> None:
    pace = Pace()
    pace.learn(1000.0, 0.01)
    assert pace.factor <= 1 + 0.1 * (MAX_OUTLIER_RATIO - 1) + 1e-12
    for _ in range(100):
        pace.learn(0.02, 0.01)
    assert pace.factor == pytest.approx(2, rel=0.01)
