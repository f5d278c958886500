import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from app.store.manifest import Manifest, render_schema
from tests.app.tiny_store import make_manifest, write_store

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "training" / "export" / "manifest.schema.json"
VALIDATOR = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return json.dumps(make_manifest(write_store(tmp_path_factory.mktemp("store"))))


@pytest.fixture
def manifest(text: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(text)
    return document


def test_committed_schema_is_up_to_date() -> None:
    assert SCHEMA.read_text(encoding="utf-8") == render_schema(), "run: python -m app.store.manifest > " + str(SCHEMA)


def test_schema_is_valid_and_accepts_a_manifest(manifest: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(VALIDATOR.schema)
    VALIDATOR.validate(manifest)
    assert Manifest.model_validate_json(json.dumps(manifest)).name == "tiny"


@pytest.mark.parametrize("path", sorted((ROOT / "model_store").glob("*/*/manifest.json")), ids=str)
def test_schema_and_models_accept_every_manifest_in_the_store(path: Path) -> None:
    VALIDATOR.validate(json.loads(path.read_bytes()))
    assert Manifest.model_validate_json(path.read_bytes()).version == path.parent.name


def resized(**changes: Any) -> dict[str, Any]:
    return {"resize_shorter_side": None, "resize_height": 8, "resize_width": 8, **changes}


Change = Callable[[dict[str, Any]], object]
BOTH_REFUSE: dict[str, Change] = {
    "missing key": lambda m: m.pop("golden"),
    "unknown key": lambda m: m.update(extra=1),
    "unknown key of a variant": lambda m: m["variants"][0].update(speed=1),
    "schema version": lambda m: m.update(schema_version=2),
    "version that is no number": lambda m: m.update(version="1a"),
    "version as a number": lambda m: m.update(version=1),
    "upper-case digest": lambda m: m["files"]["golden.npz"].update(sha256="A" * 64),
    "path in a file name": lambda m: m["variants"][0].update(file="../x.onnx"),
    "absolute file name": lambda m: m["golden"].update(file="/etc/passwd"),
    "hidden file name": lambda m: m["golden"].update(file=".golden.npz"),
    "text for a number": lambda m: m["variants"][0].update(r="0"),
    "negative rate": lambda m: m["variants"][0].update(r=-2),
    "zero atol": lambda m: m["golden"].update(atol=0),
    "accuracy above one": lambda m: m["variants"][1]["accuracy"].update(top1=97.0),
    "short commit": lambda m: m.update(git_commit="abc"),
    "no labels": lambda m: m.update(labels=[]),
    "no variants": lambda m: m.update(variants=[]),
    "other layout": lambda m: m["input"].update(layout="NCHW"),
    "other interpolation": lambda m: m["input"].update(interpolation="cubic"),
    "other crop": lambda m: m["input"].update(crop="corner"),
    "other activation": lambda m: m["output"].update(activation="tanh"),
    "background of four": lambda m: m["input"].update(alpha_background=[1, 2, 3, 4]),
    "embedding without its rate": lambda m: m.update(embedding={"file": "golden.npz", "dim": 8, "recipe": ""}),
    "float channel": lambda m: m["input"].update(alpha_background=[1.5, 2, 3]),
}
MODELS_REFUSE: dict[str, tuple[Change, str]] = {
    "unlisted graph": (lambda m: m["files"].pop("tome-r8.onnx"), "tome-r8.onnx is referenced but not listed"),
    "unlisted golden": (lambda m: m["golden"].update(file="other.npz"), "other.npz is referenced"),
    "unlisted embedding": (
        lambda m: m.update(embedding={"file": "own.safetensors", "dim": 8, "r": 16, "recipe": ""}),
        "own.safetensors is referenced",
    ),
    "unlisted weights": (lambda m: m["variants"][0].update(requires=["w.bin"]), "w.bin is referenced"),
    "manifest in files": (
        lambda m: m["files"].update({"manifest.json": m["files"]["golden.npz"]}),
        "cannot contain its own digest",
    ),
    "same variant twice": (lambda m: m["variants"].append({**m["variants"][0], "id": "x"}), "is listed more than once"),
    "same id twice": (lambda m: m["variants"][0].update(id=m["variants"][1]["id"]), "is listed more than once"),
    "unknown default": (lambda m: m.update(default={"policy": "tome", "r": 4}), "no variant"),
    "short schedule": (lambda m: m["variants"][2].update(schedule=[8]), "2 blocks need 2 numbers"),
    "tokens off by one": (lambda m: m["variants"][2].update(tokens=[65, 57, 48]), "do not follow"),
    "other first token count": (
        lambda m: m["variants"][2].update(tokens=[64, 56, 48]),
        "tokens must start at n_tokens",
    ),
    "rate of an adaptive policy": (lambda m: m["variants"][-1].update(r=4), "r=4 contradicts data_dependent=True"),
    "no rate of a fixed policy": (lambda m: m["variants"][2].update(r=None), "r=None contradicts data_dependent=False"),
    "no promise": (lambda m: m["variants"][-1].pop("promise"), "data_dependent requires gmacs_spread and promise"),
    "no spread": (lambda m: m["variants"][-1].pop("gmacs_spread"), "data_dependent requires gmacs_spread and promise"),
    "no output of the cost": (lambda m: m["output"].pop("gmacs"), "requires tokens and gmacs"),
    "unlisted calibration": (lambda m: m["variants"][-1].update(calibration="t.json"), "t.json is referenced"),
    "merging at zero": (
        lambda m: m["variants"][0].update(schedule=[1, 0], tokens=[65, 64, 64]),
        "r is 0, but schedule merges tokens",
    ),
    "interval the wrong way": (
        lambda m: m["variants"][1]["accuracy"].update(ci95=[0.98, 0.96]),
        "not in ascending order",
    ),
    "crop larger than the image": (lambda m: m["input"].update(height=9), r"\(8\) is smaller than the crop \(9 x 8\)"),
    "no resized size": (lambda m: m["input"].pop("resize_shorter_side"), "expected resize_height and resize_width, or"),
    "two resized sizes": (lambda m: m["input"].update(resize_height=8, resize_width=8), "expected resize_height and"),
    "one resized side": (lambda m: m["input"].update(resized(resize_width=None)), "expected resize_height and"),
    "squash of one side": (lambda m: m["input"].update(crop="squash"), "'squash' needs resize_height and"),
    "crop wider than the image": (
        lambda m: m["input"].update(resized(resize_width=7)),
        r"\(8 x 7\) is smaller than the crop \(8 x 8\)",
    ),
    "border of no colour": (
        lambda m: m["input"].update(resized(crop="border", mean=[123.7, 116.3, 103.5])),
        r"mean \[123.7, 116.3, 103.5\] is no colour",
    ),
    "softmax over one label": (lambda m: m.update(labels=["red"]), "always 1; expected activation 'sigmoid'"),
    "date without zone": (lambda m: m.update(created="2026-11-20T12:00:00"), "timezone"),
}


@pytest.mark.parametrize("name", BOTH_REFUSE)
def test_schema_and_models_refuse(manifest: dict[str, Any], name: str) -> None:
    BOTH_REFUSE[name](manifest)
    assert not VALIDATOR.is_valid(manifest)
    with pytest.raises(ValidationError):
        Manifest.model_validate_json(json.dumps(manifest))


@pytest.mark.parametrize("name", MODELS_REFUSE)
def test_models_refuse_contradictions(manifest: dict[str, Any], name: str) -> None:
    change, reason = MODELS_REFUSE[name]
    change(manifest)
    with pytest.raises(ValidationError, match=reason):
        Manifest.model_validate_json(json.dumps(manifest))


def test_models_accept_mean_token_counts_of_adaptive_policies(manifest: dict[str, Any]) -> None:
    assert manifest["variants"][-1]["data_dependent"]
    manifest["variants"][-1].update(tokens=[65, 60, 50])
    Manifest.model_validate_json(json.dumps(manifest))


@pytest.mark.parametrize("crop", ["center", "squash", "border"])
def test_both_sides_may_take_the_place_of_the_shorter_one(manifest: dict[str, Any], crop: str) -> None:
    del manifest["input"]["resize_shorter_side"]
    manifest["input"].update(resize_height=9, resize_width=10, crop=crop)
    VALIDATOR.validate(manifest)
    assert Manifest.model_validate_json(json.dumps(manifest)).input.resize_width == 10


def test_a_head_of_one_output_has_a_sigmoid(manifest: dict[str, Any]) -> None:
    manifest["labels"], manifest["output"]["activation"] = ["red"], "sigmoid"
    VALIDATOR.validate(manifest)
    assert Manifest.model_validate_json(json.dumps(manifest)).output.activation == "sigmoid"


def test_default_may_be_an_adaptive_policy(manifest: dict[str, Any]) -> None:
    manifest.update(default={"policy": "atm", "r": None})
    VALIDATOR.validate(manifest)
    assert Manifest.model_validate_json(json.dumps(manifest)).default.r is None
