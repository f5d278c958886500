"""A second task, from training to an answer: what docs/development.md lists for a `/segment` endpoint, and no more.

The task labels each patch: unmerge the tokens, apply the head to each, compare by mean intersection over union.
"""

import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from PIL import Image
from prometheus_client import CollectorRegistry
from safetensors.torch import save_file
from starlette.testclient import TestClient
from torch import Tensor, nn

from app import main
from app.api.classify import make_router as make_classify_router
from app.api.inference import INFERENCE, RECORD, PlainRoute, require_task
from app.api.parameters import read_query
from app.api.uploads import read_image
from app.backends import BackendOptions, open_backend
from app.observability.metrics import Metrics
from app.serving.service import Service
from app.settings import Settings
from app.store import outputs
from app.store.loader import StoreOptions
from app.store.manifest import Manifest
from app.store.outputs import GraphOutput
from app.store.selection import select
from app.store.start import load_catalogue
from tests.training.commands import dtem
from tests.training.export.tiny_export import calibrations
from tests.training.tiny_vit import ARGUMENTS
from training import tasks
from training.cli.model_options import published_rule
from training.data.digits import Split, draw, patch_ink
from training.data.preprocessing import InputRule, read_pixels
from training.data.sources import DATASETS, DigitScenes, ReferenceTask, Source
from training.evaluate.comparison import compare
from training.evaluate.results import read_evaluation
from training.merging.source import unmerge
from training.models.frozen import FrozenModule
from training.models.macs import count_macs
from training.models.vit import MergingVisionTransformer, MetricChoice, load_vit
from training.tasks.measure import Measure
from training.tasks.task import Output, Task

SEGMENT, CELLS, WIDTH = "segment", 14, 64
ARCHITECTURE = ARGUMENTS | {"num_classes": 11, "embed_dim": WIDTH}


class FrozenSegmenter(FrozenModule):
    task, is_adaptive = SEGMENT, False

    def forward(self, pixels: Tensor) -> Tensor:
        """Shapes: uint8 (B, H, W, 3) -> float32 (B, classes, 14, 14)"""
        tokens, _, source = self.model.forward_features(self.normalised(pixels), with_source=True)
        assert source is not None
        patches = unmerge(tokens, source)[:, self.model.n_protected :]
        logits: Tensor = self.model.vit.head(patches).transpose(1, 2)
        return logits.reshape(*logits.shape[:2], CELLS, CELLS).float()


def freeze(
    model: nn.Module, rule: InputRule, r: int, /, *, metric: MetricChoice = "keys", metric_seed: int = 0
) -> FrozenSegmenter:
    vit = MergingVisionTransformer(
        model, r, exhausted="reduce", metric=metric, metric_seed=metric_seed, attention="plain", join=r > 0
    )
    return FrozenSegmenter(vit, rule).eval()


def overlaps(logits: Tensor, labels: Tensor) -> NDArray[np.int64]:
    """Shapes: (B, classes, h, w), (B, h, w) -> (B, classes, 2), intersections and unions"""
    found, wanted = (nn.functional.one_hot(part, logits.shape[1]).bool() for part in (logits.argmax(1), labels))
    return torch.stack([(found & wanted).sum((1, 2)), (found | wanted).sum((1, 2))], -1).numpy()


def mean_iou(scores: NDArray[np.int64]) -> tuple[float, tuple[float, float]]:
    def mean(sample: NDArray[np.int64]) -> float:
        both, either = sample.sum(0).T
        return float((both[either > 0] / either[either > 0]).mean())

    draws = np.random.default_rng(0).integers(len(scores), size=(200, len(scores)))
    low, high = np.percentile([mean(scores[draw]) for draw in draws], [2.5, 97.5])
    return mean(scores), (float(low), float(high))


SEGMENTATION = Task(
    SEGMENT,
    result=Output("patches", dtype="float32"),
    measure=Measure("miou", "mIoU", overlaps, mean_iou),
    load=load_vit,
    freeze=freeze,
)


@dataclass
class Masks(DigitScenes):
    """The digit's class in each patch that it covers, else background."""

    labels: tuple[str, ...] = ("background", *map(str, range(10)))

    def __getitem__(self, index: int) -> Any:
        scene = draw(self.split, index, self.task)
        ink = torch.from_numpy(patch_ink(scene.mask, 8)).view(CELLS, CELLS)
        return torch.from_numpy(scene.image), torch.where(ink > 0, scene.label + 1, 0)


class MaskedDigits(ReferenceTask):
    def open(self, rule: InputRule, n_images: int | None, split: Split = "test") -> Source:
        return Masks(split, n_images or 100)


def patches(manifest: Manifest) -> GraphOutput:
    side = math.isqrt(manifest.architecture.n_tokens - manifest.architecture.n_protected)
    return GraphOutput("patches", manifest.output.name, np.float32, (len(manifest.labels), side, side))


class SegmentRoute:
    """Stands for a module in app/api, which `create_app` lists."""

    @staticmethod
    def make_router(service: Service) -> APIRouter:
        router = APIRouter(route_class=PlainRoute)

        @router.post("/segment", openapi_extra=INFERENCE)
        async def segment(request: Request) -> JSONResponse:
            chosen = select(service.require_ready(), read_query(request))
            require_task(chosen, SEGMENT)
            upload = await read_image(request)
            (result,) = await service.infer(chosen, [upload.data], request.scope[RECORD])
            assert not isinstance(result, Exception)
            return JSONResponse({"r": result.variant.spec.r, "classes": result.outputs["patches"].argmax(0).tolist()})

        # `create_app` has one list of modules; the test adds to one of them.
        router.include_router(make_classify_router(service))
        return router


def command(folder: Path) -> list[str]:
    torch.manual_seed(3)
    vit = load_vit("vit_tiny_patch16_224", **ARCHITECTURE)
    for parameter in vit.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    save_file(vit.state_dict(), folder / "weights.safetensors")
    model = ["--architecture", "vit_tiny_patch16_224", "--weights", str(folder / "weights.safetensors")]
    model += ["--arguments", json.dumps(ARCHITECTURE), "--task", SEGMENT, "--data", "masks", "--n-images", "100"]
    return [*model, "--name", "segmenter", "--store", str(folder), "--rates", "0,8", "--default-policy", "tome"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a store with an exported segmenter, while both halves know the task."""
    folder = tmp_path_factory.mktemp("segment")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tasks.TASKS, SEGMENT, SEGMENTATION)
        patch.setitem(DATASETS, "masks", MaskedDigits())
        patch.setitem(outputs.TASKS, SEGMENT, patches)
        patch.setattr(main, "classify", SegmentRoute)
        assert dtem("export", command(folder)) == 0
        yield folder


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    service = Service(Settings(), Metrics(CollectorRegistry()))
    backend = open_backend("onnxruntime", BackendOptions("cpu", 1, share_weights=True))
    with TestClient(main.create_app(service)) as client:
        service.publish(load_catalogue(folder, backend, StoreOptions("onnx", "float32", None)))
        yield client


def png(pixels: NDArray[np.uint8]) -> bytes:
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "png")
        return file.getvalue()


def frozen(folder: Path, r: int) -> FrozenModule:
    vit = load_vit("vit_tiny_patch16_224", weights=folder / "weights.safetensors", **ARCHITECTURE)
    return freeze(vit.eval(), published_rule(folder / "segmenter/1"), r)


def test_measure_of_the_task_is_published(folder: Path) -> None:
    manifest = json.loads((folder / "segmenter/1/manifest.json").read_text())
    assert (manifest["task"], len(manifest["labels"])) == (SEGMENT, 11)
    images = Masks("test", 100)
    logits = torch.cat([frozen(folder, 8)(images[index][0][None]).detach() for index in range(100)])
    wanted = torch.stack([images[index][1] for index in range(100)])
    ious = [
        float(((logits.argmax(1) == one) & (wanted == one)).sum() / ((logits.argmax(1) == one) | (wanted == one)).sum())
        for one in range(11)
        if ((logits.argmax(1) == one) | (wanted == one)).any()
    ]
    accuracy = next(entry["accuracy"] for entry in manifest["variants"] if entry["r"] == 8)
    assert accuracy["measure"] == "miou"
    assert accuracy["value"] == pytest.approx(np.mean(ious), abs=1e-3)
    assert accuracy["ci95"][0] < accuracy["value"] < accuracy["ci95"][1]


def test_cost_includes_the_head(folder: Path) -> None:
    evaluation = read_evaluation(folder / "segmenter/1/evaluation.json")
    unmerged = next(row for row in evaluation.rows if row.r == 0)
    # The head runs on 196 patches, while a classifier's runs once.
    head_macs = CELLS**2 * WIDTH * 11
    assert unmerged.gmacs * 1e9 == pytest.approx(count_macs(frozen(folder, 0).model, 112) - WIDTH * 11 + head_macs)
    with pytest.raises(ValueError, match=r"miou: only top-1 is compared in pairs"):
        compare(evaluation, evaluation, "none", "tome")


def test_evaluation_resumes_from_scores_of_any_measure(folder: Path, tmp_path: Path) -> None:
    published = ["--published", str(folder / "segmenter/1"), "--data", "masks", "--out", str(tmp_path / "found")]
    assert dtem("evaluate", [*published, "--measured"]) == 0
    assert read_evaluation(tmp_path / "found.json").rows == read_evaluation(folder / "segmenter/1/evaluation.json").rows
    assert "| mIoU % |" in (tmp_path / "found.md").read_text()


def test_adaptive_policies_are_refused_where_the_task_has_none(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calibrations()[0].save(folder / "atm.json")
    assert dtem("export", [*command(folder), "--calibrations", str(folder / "atm.json")]) == 2
    assert "calibration of atm: task segment has no adaptive policies" in capsys.readouterr().err


@pytest.mark.parametrize("r", [0, 8])
def test_service_answers_as_eager_does(client: TestClient, folder: Path, tmp_path: Path, r: int) -> None:
    (tmp_path / "a.png").write_bytes(png(draw("test", 0).image))
    answer = client.post("/segment", params={"policy": "tome", "r": r}, content=(tmp_path / "a.png").read_bytes())
    assert (answer.status_code, answer.json()["r"]) == (200, r)
    module = frozen(folder, r)
    pixels = torch.from_numpy(read_pixels(tmp_path / "a.png", published_rule(folder / "segmenter/1")))
    expected = module(pixels[None]).argmax(1)[0]
    assert (np.array(answer.json()["classes"]) == expected.numpy()).mean() > 0.99


def test_service_offers_the_task_by_its_measure(client: TestClient) -> None:
    (model,) = client.get("/models").json()["models"]
    best = max(variant["accuracy"]["value"] for variant in model["variants"])
    assert {variant["accuracy"]["measure"] for variant in model["variants"]} == {"miou"}
    image = png(draw("test", 1).image)
    accepted = client.post("/segment", params={"min_accuracy": best - 1e-6}, content=image)
    assert accepted.status_code == 200, accepted.text
    refused = client.post("/segment", params={"min_accuracy": 0.99}, content=image)
    assert (refused.status_code, refused.json()["maximum"]) == (422, pytest.approx(best))
    assert "measured miou of at least 0.99" in refused.json()["detail"]
    other = client.post("/classify", content=image)
    assert (other.status_code, other.json()["accepted"]) == (422, ["classify"])
    assert client.get("/v2/models/segmenter").json()["outputs"][0]["shape"] == [-1, 11, CELLS, CELLS]
