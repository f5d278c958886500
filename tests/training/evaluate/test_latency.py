import time

import torch
from torch import Tensor

from training.evaluate.latency import median_ms


def test_graphs_take_turns_on_each_image_in_turn() -> None:
    seen: list[tuple[str, int]] = []

    def graph(name: str, seconds: float) -> object:
        def run(image: Tensor) -> None:
            assert image.shape == (1, 2, 2, 3)
            seen.append((name, int(image[0, 0, 0, 0])))
            time.sleep(seconds)

        return run

    images = torch.arange(2, dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 2, 2, 3)
    found = median_ms({"a": graph("a", 0.0), "b": graph("b", 0.02)}, images, n_rounds=2)  # type: ignore[dict-item]
    assert seen == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 0), ("b", 0)]
    assert found["b"] >= 20
