"""Parity follows decisions: near ties pass, faults do not."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from tests.training.export.tiny_export import RULE, embedding, frozen, frozen_adaptive
from tests.training.tiny_vit import tiny_vit
from training.export.formats import FORMATS, GraphFormat
from training.export.parity import (
    MIN_MARGIN,
    ParityError,
    check_parity,
    golden_images,
    margins,
    parity_pixels,
    rounding_spread,
    varied,
)
from training.export.scores import ShownScores, steered
from training.merging import matching
from training.models.classifier import ServedClassifier, frozen_classifier
from training.models.frozen import FrozenModule
from training.models.vit import MergingVisionTransformer

pytestmark = pytest.mark.timeout(900)
ONNX, TORCHSCRIPT = FORMATS


def check(module: FrozenModule, graph_format: GraphFormat, file: Path, pixels: Tensor) -> Any:
    batch = parity_pixels(module, pixels, 32)
    return check_parity(module, graph_format, file, graph_format.load(file), batch, 1e-4)


@pytest.mark.parametrize("graph_format", FORMATS, ids=lambda entry: entry.name)
@pytest.mark.parametrize("stem", ["none-r0", "tome-r8", "tome-r32", "dtem-r32", "atm", "adaptive-dtem"])
def test_published_graphs_follow_eager(published: Path, pixels: Tensor, graph_format: GraphFormat, stem: str) -> None:
    policy, _, r = stem.partition("-r")
    module = frozen(policy, int(r)) if r else frozen_adaptive(policy)
    # 40 images, of which none is left out.
    found = check(module, graph_format, published / f"{stem}{graph_format.suffix}", pixels[:40])
    assert (found.n_images, found.difference < 1e-4, found.noise < 1e-4) == (32, True, True)


def with_other_weights() -> FrozenModule:
    vit: Any = tiny_vit()
    with torch.no_grad():
        weight = vit.blocks[2].mlp.fc1.weight
        weight += 1e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    return frozen_classifier(vit, RULE, 8)


FAULTS: dict[str, Callable[[], FrozenModule]] = {
    "one token more per block": lambda: frozen("tome", 9),
    "features instead of keys": lambda: frozen_classifier(tiny_vit(), RULE, 8, metric="features"),
    "embedding instead of keys": lambda: frozen_classifier(tiny_vit(), RULE, 8, metric=embedding()),
    "no sizes in attention": lambda: ServedClassifier(
        MergingVisionTransformer(
            tiny_vit(), 8, exhausted="reduce", attention="plain", proportional_attention=False
        ).eval(),
        RULE,
    ),
    "weights of one layer off by 1e-3": with_other_weights,
    "no merging": lambda: frozen("none", 0),
    "other mean": lambda: frozen_classifier(tiny_vit(), replace(RULE, mean=(0.5, 0.5, 0.51)), 8),
}


@pytest.mark.parametrize("graph_format", FORMATS, ids=lambda entry: entry.name)
@pytest.mark.parametrize("fault", FAULTS)
def test_graph_and_eager_that_differ_are_refused(
    published: Path, pixels: Tensor, graph_format: GraphFormat, fault: str
) -> None:
    with pytest.raises(ParityError, match=r"tome-r8\.\w+: batch"):
        check(FAULTS[fault](), graph_format, published / f"tome-r8{graph_format.suffix}", pixels[:32])


def last_of_equal_partners(graph: onnx.ModelProto) -> None:
    for node in graph.graph.node:
        if node.op_type == "ArgMax":
            kept = [attribute for attribute in node.attribute if attribute.name != "select_last_index"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("select_last_index", 1)])


def test_graph_that_takes_the_last_of_equal_partners_is_refused(
    published: Path, pixels: Tensor, tmp_path: Path
) -> None:
    shutil.copy(published / "weights.safetensors", tmp_path)
    graph = onnx.load(published / "tome-r8.onnx", load_external_data=False)
    last_of_equal_partners(graph)
    onnx.save(graph, tmp_path / "tome-r8.onnx")
    with pytest.raises(ParityError, match="equal scores"):
        check(frozen("tome", 8), ONNX, tmp_path / "tome-r8.onnx", pixels[:32])


def test_graph_that_ranks_equal_scores_otherwise_is_refused(
    published: Path, pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def last_first(best: Tensor) -> Tensor:
        return best.shape[-1] - 1 - best.flip(-1).sort(dim=-1, descending=True, stable=True).indices

    monkeypatch.setattr(matching, "descending", last_first)
    with pytest.raises(ParityError, match="equal scores"):
        check(frozen("tome", 8), ONNX, published / "tome-r8.onnx", pixels[:32])


def noisy(module: FrozenModule, noise: float) -> GraphFormat:
    """Return a format whose graphs are eager with other rounding of the scores."""

    @torch.no_grad()
    def run(pixels: Tensor) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)

        def rounded(scores: Tensor, _: Any) -> Tensor:
            return scores + noise * (2 * torch.rand(scores.shape, generator=generator) - 1)

        shown = ShownScores(module)
        with steered(module, rounded):
            plain = module(pixels)
        generator.manual_seed(0)
        own = matching.cosine_scores
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("training.export.scores.cosine_scores", lambda *given: rounded(own(*given), None))
            return (plain, *shown(pixels)[1:])

    return replace(ONNX, show=lambda *_: run, feed=None, load=lambda _: lambda pixels: run(pixels)[0])


def test_near_ties_pass_and_are_counted(pixels: Tensor) -> None:
    module = frozen("tome", 32)
    with torch.no_grad():
        graph = noisy(module, 5e-5).load(Path())
        assert float((graph(pixels[:32]) - module(pixels[:32])).abs().max()) > 1e-4, "no decision differs"
    found = check(module, noisy(module, 5e-5), Path("noisy"), pixels[:32])
    assert (found.n_images, found.n_near_ties > 0, found.difference) == (32, True, 0)
    assert 4e-5 < found.noise <= 5.1e-5
    with pytest.raises(ParityError, match="scores differ from eager by"):
        check(module, noisy(module, 1e-3), Path("noisy"), pixels[:32])


def test_wrong_results_at_one_batch_size_are_found(published: Path, pixels: Tensor) -> None:
    exported = ONNX.load(published / "tome-r8.onnx")

    def wrong_at_two(images: Tensor) -> Tensor:
        logits: Tensor = exported(images)
        return logits.flip(0) if len(images) == 2 else logits

    with pytest.raises(ParityError, match="batch 2, without scores: differs"):
        check_parity(frozen("tome", 8), ONNX, published / "tome-r8.onnx", wrong_at_two, pixels[:32], 1e-4)


def test_wrong_token_counts_of_a_graph_are_found(published: Path, pixels: Tensor) -> None:
    exported = ONNX.load(published / "atm.onnx")

    def wrong(images: Tensor) -> Any:
        logits, tokens, gmacs = exported(images)
        return logits, tokens + 1, gmacs

    with pytest.raises(ParityError, match="batch 1, without scores: tokens"):
        check_parity(frozen_adaptive("atm"), ONNX, published / "atm.onnx", wrong, pixels[:32], 1e-4)


def test_few_images_are_varied() -> None:
    one = torch.randint(0, 256, (1, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = varied(one, 32)
    assert len({image.numpy().tobytes() for image in found}) == 32
    assert torch.equal(found[0], one[0])
    assert torch.equal(found, varied(one, 32))


def test_golden_images_are_clear_in_every_graph(pixels: Tensor) -> None:
    modules = [frozen("tome", 8), frozen("dtem", 8)]
    found = golden_images(modules, pixels.split(50), 3)  # type: ignore[no-untyped-call]
    assert len(found.pixels) == 3
    smallest = torch.stack([margins(module, found.pixels) for module in modules]).min()
    # Margins depend on the batch by rounding.
    assert float(smallest) > MIN_MARGIN / 2
    assert found.margin >= MIN_MARGIN


def test_golden_image_is_the_clearest_alone_where_none_is_clear() -> None:
    images = torch.randint(0, 4, (40, 112, 112, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    vit: Any = tiny_vit()
    with torch.no_grad():
        vit.pos_embed *= 1e-4
        vit.patch_embed.proj.weight *= 1e-4  # all tokens are nearly the same, so all scores nearly tie
    module = frozen_classifier(vit, RULE, 32)
    found = golden_images([module], images.split(20), 4)  # type: ignore[no-untyped-call]
    assert len(found.pixels) == 1
    assert found.margin < MIN_MARGIN


def test_spread_is_what_near_ties_change(pixels: Tensor) -> None:
    module = frozen("tome", 32)
    unclear = pixels[margins(module, pixels).argsort()[:4]]
    graph = noisy(module, MIN_MARGIN).load(Path())
    with torch.no_grad():
        changed = float((graph(unclear) - module(unclear)).abs().max())
    assert rounding_spread(module, graph, unclear) >= changed > 1e-5
    assert rounding_spread(frozen("none", 0), frozen("none", 0), unclear) == 0
