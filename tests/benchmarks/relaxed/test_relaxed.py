import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.relaxed import measure as relaxed
from benchmarks.relaxed.__main__ import main
from training.merging.relaxed import soft_grouping


def test_costs_of_relaxed_merging_are_measured_and_written(tmp_path: Path) -> None:
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "num_heads": 2, "depth": 2, "num_classes": 10}
    n_threads = torch.get_num_threads()
    model = ["--arguments", json.dumps(size), "--dim", "4", "--n-tokens", "17", "--batch-size", "2"]
    assert main([*model, "--rates", "3", "--rounds", "6", "--out", str(tmp_path / "cost")]) == 0
    torch.set_num_threads(n_threads)
    content = json.loads((tmp_path / "cost.json").read_text())
    names = [relaxed.FORWARD, relaxed.BOTH, "relaxed r=3, tail kept", "relaxed r=3, no tail"]
    assert [cost["step"] for cost in content["steps"]] == names
    forward, both, kept, dropped = (cost["peak_bytes"] for cost in content["steps"])
    assert 0 < forward < both
    assert dropped < kept
    assert content["steps"][0]["to_forward"] == pytest.approx(1)
    assert content["grouping"][0]["peak_bytes"] < content["grouping"][0]["plain_peak_bytes"]
    assert "| relaxed r=3, no tail |" in (tmp_path / "cost.md").read_text()


def test_peak_memory_is_the_maximum_held_at_once() -> None:
    def step() -> None:
        for _ in range(3):
            first = torch.ones(100_000)
            del first
        torch.ones(50_000) + 1

    assert relaxed.peak_bytes(step, "cpu") == pytest.approx(400_000, rel=0.01)


def test_a_grouping_that_differs_from_the_formula_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0))
    relaxed.check_same(scores, 3)

    def wrong(scores: Tensor, r: int) -> Tensor:
        return soft_grouping(scores, r) * 1.0001

    monkeypatch.setattr(relaxed, "soft_grouping", wrong)
    with pytest.raises(ValueError, match="shares of the grouping differ"):
        relaxed.check_same(scores, 3)
