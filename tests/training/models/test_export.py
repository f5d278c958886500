"""Merging survives export: same logits at any batch, also where tokens share a destination or tie."""

import io
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from tests.training.models.families import build, images
from training.models import MergingVisionTransformer

SCHEDULE = [9, 9, 9]  # leaves nothing of A in the last block
FEW_NODES = 70  # a block: about 24 without merging, 43 for it


def flat_and_busy(n: int) -> Tensor:
    """Return images with many equal tokens, so that destinations are shared."""
    x = images(n).float()
    x[0] = 0.5
    x[1:2, :, :24] = -0.5
    return x


def shares_a_destination(model: MergingVisionTransformer) -> bool:
    source = model.forward_features(flat_and_busy(2), with_source=True).source
    return source is not None and bool((source.sum(2) > 2).any())


@pytest.mark.parametrize("family", ["augreg", "registers", "average-no-class-token", "token-and-average"])
def test_onnx_graph_gives_eager_logits_at_any_batch(family: str, tmp_path: Path) -> None:
    model = MergingVisionTransformer(build(family).float(), SCHEDULE, attention="plain").eval()
    batch = {"images": {0: torch.export.Dim("batch")}}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (flat_and_busy(2),), dynamo=True, opset_version=20, dynamic_shapes=batch)
    assert program is not None
    path = tmp_path / "vit.onnx"
    program.save(path)
    graph = onnx.load(path).graph
    assert len(graph.node) < 3 * FEW_NODES + 15
    assert not {"ScatterElements", "ScatterND", "If", "Loop"} & {node.op_type for node in graph.node}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        assert shares_a_destination(model)
        for n in (1, 2, 5):
            x = flat_and_busy(n)
            (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            np.testing.assert_allclose(logits, model(x), atol=1e-4)


def test_traced_graph_gives_eager_logits_at_any_batch() -> None:
    model = MergingVisionTransformer(build("deit-distilled").float(), SCHEDULE).eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, flat_and_busy(2))  # type: ignore[no-untyped-call]
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer)
        buffer.seek(0)
        loaded = torch.jit.load(buffer)  # type: ignore[no-untyped-call]
        assert shares_a_destination(model)
        for n in (1, 2, 5):
            torch.testing.assert_close(loaded(flat_and_busy(n)), model(flat_and_busy(n)), atol=1e-5, rtol=0)
