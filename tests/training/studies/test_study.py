"""The study command on a ViT small enough for a test, a step or two a variant."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from tests.training.tiny_vit import ARGUMENTS, tiny_vit
from training.learn.recipe import DtemRecipe, read_recipe
from training.studies import study
from training.studies import variants as studies


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    save_file(
        {name: tensor.contiguous() for name, tensor in tiny_vit().state_dict().items()}, tmp_path / "w.safetensors"
    )
    arguments = ", ".join(f"{key} = {value}" for key, value in ARGUMENTS.items())
    file = tmp_path / "tiny.toml"
    file.write_text(
        f"""
        kind = "dtem"
        mode = "modular"
        seed = 1
        r = 16
        dim = 12
        n_images = 16
        batch_size = 8
        [model]
        architecture = "vit_tiny_patch16_224"
        arguments = {{ {arguments} }}
        weights = "{tmp_path / "w.safetensors"}"
        [data]
        n_distinct = 16
        [embedding]
        learning_rate = [1e-3, 1e-5]
        weight_decay = 1e-4
        clip_norm = 5.0
        """
    )
    return file


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "N_IMAGES", 16)
    monkeypatch.setattr(studies, "N_DISTINCT", 4000)


def run(recipe_file: Path, out: Path) -> Any:
    arguments = ["relaxation", "--recipe", str(recipe_file), "--out", str(out), "--n-images", "20", "--workers", "0"]
    assert study.main(arguments) == 0
    return json.loads((out / "relaxation.json").read_text())


@pytest.mark.parametrize("name", studies.STUDIES)
def test_study_varies_the_recipe_into_different_ones(name: str, recipe_file: Path) -> None:
    recipe = read_recipe(recipe_file)
    assert isinstance(recipe, DtemRecipe)
    variants = studies.STUDIES[name].vary(recipe)
    assert len(variants) >= 4
    assert len({str(variant) for variant in variants.values()}) == len(variants)


def test_study_evaluates_every_variant_and_the_untrained_model(recipe_file: Path, tmp_path: Path, short: None) -> None:
    rows = run(recipe_file, tmp_path / "out")["rows"]
    assert [(row["variant"], row["r"]) for row in rows][:3] == [("ToMe, untrained", r) for r in (0, 16, 24)]
    assert {row["variant"] for row in rows} == {
        "ToMe, untrained",
        "untrained",
        "tail dropped",
        "tail kept",
        "1 partner",
        "8 partners",
    }
    assert all(row["n_images"] == 20 and row["ci95"][0] <= row["top1"] <= row["ci95"][1] for row in rows)
    assert "| tail kept | 16 |" in (tmp_path / "out" / "relaxation.md").read_text()
    assert (tmp_path / "out" / "relaxation.png").stat().st_size > 10_000


def test_study_resumes_with_the_variants_that_are_missing(recipe_file: Path, tmp_path: Path, short: None) -> None:
    out = tmp_path / "out"
    whole = run(recipe_file, out)
    file = out / "relaxation.json"
    file.write_text(json.dumps({**whole, "rows": [row for row in whole["rows"] if row["variant"] != "tail kept"]}))
    kept = (out / "relaxation" / "tail-dropped" / "embedding.safetensors").stat().st_mtime_ns
    assert sorted(map(str, run(recipe_file, out)["rows"])) == sorted(map(str, whole["rows"]))
    assert (out / "relaxation" / "tail-dropped" / "embedding.safetensors").stat().st_mtime_ns == kept


def test_study_of_a_backbone_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", "--recipe", "training/recipes/reference.toml", "--out", str(tmp_path)]
    assert study.main(arguments) == 2
    assert "a study varies a recipe of DTEM" in capsys.readouterr().err
