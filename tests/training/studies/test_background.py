import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from tests.training.tiny_vit import ARGUMENTS, tiny_vit
from training.data.digits import digit_patches
from training.models.embedding import DecoupledEmbedding, EmbeddingConfig
from training.studies import background
from training.studies.patches import FIGURES, Measured, estimate, patch_figures, summarise


def _source(token_of_patch: list[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    return np.array([[token == number for token in token_of_patch] for number in range(max(token_of_patch) + 1)])


def test_figures_of_groups_counted_by_hand() -> None:
    # Patches 0, 1, 2 are the digit's. Tokens: {0}, {1, 2, 3}, {4}, {5, 6}.
    source = _source([0, 1, 1, 1, 2, 3, 3])[None]
    is_digit = np.array([[True, True, True, False, False, False, False]])
    figures = patch_figures(source, is_digit)
    assert list(figures) == list(FIGURES)
    assert figures["digit_alone"] == pytest.approx([1 / 3])
    assert figures["background_alone"] == pytest.approx([1 / 4])
    assert figures["digit_group"] == pytest.approx([(1 + 3 + 3) / 3])
    assert figures["background_group"] == pytest.approx([(3 + 1 + 2 + 2) / 4])
    assert figures["purity"] == pytest.approx([1 / 2])


def test_figures_of_an_image_do_not_depend_on_the_batch() -> None:
    is_digit = np.array([[True, False, False], [True, True, False]])
    sources = np.stack([_source([0, 1, 1]), _source([0, 1, 0])])
    whole = patch_figures(sources, is_digit)
    for index in range(2):
        own = patch_figures(sources[index : index + 1], is_digit[index : index + 1])
        assert {name: values[index] for name, values in whole.items()} == pytest.approx(
            {name: values[0] for name, values in own.items()}, rel=1e-12
        )


def test_source_with_protected_tokens_is_refused() -> None:
    source, is_digit = _source([0, 1, 1])[None], np.array([[True, False, False]])
    with pytest.raises(ValueError, match="in exactly one token"):
        patch_figures(source[:, 1:], is_digit)
    with pytest.raises(ValueError, match="of the digit and of the background"):
        patch_figures(source, ~np.zeros_like(is_digit))


def test_digit_patches_are_those_with_an_eighth_of_ink() -> None:
    mask = np.zeros((8, 8), bool)
    mask[0, 0:2] = True  # 2 of 16 pixels: an eighth
    mask[0, 4] = True
    mask[5:7, 4:8] = True
    assert digit_patches(mask, 4).tolist() == [True, False, False, True]


def test_bootstrap_interval_agrees_with_the_normal_one_and_stays_in_range() -> None:
    values = np.random.default_rng(3).beta(0.5, 0.1, 800)
    found = estimate(values)
    half = 1.96 * values.std(ddof=1) / 800**0.5
    assert found.mean == pytest.approx(values.mean())
    assert found.ci95 == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)
    assert estimate(np.ones(10)).ci95 == (1, 1)
    with pytest.raises(ValueError, match="two or more"):
        estimate(np.ones(1))


def test_differences_are_paired_at_the_same_rate() -> None:
    images = np.random.default_rng(4).normal(0, 100, 40)  # images differ widely, policies by one
    measured: Measured = {
        ("tome", 2): [dict.fromkeys(FIGURES, images[:30]), dict.fromkeys(FIGURES, images[30:])],
        ("dtem", 2): [dict.fromkeys(FIGURES, images[:30] + 1), dict.fromkeys(FIGURES, images[30:] + 1)],
    }
    tome, dtem, difference = summarise(measured, base="tome")
    assert (tome.base, dtem.base, difference.base) == (None, None, "tome")
    assert dtem.figures["purity"].mean == pytest.approx(images.mean() + 1)
    assert difference.figures["purity"].mean == pytest.approx(1)
    assert difference.figures["purity"].ci95 == pytest.approx((1, 1))


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    run = tmp_path / "run"
    run.mkdir()
    save_file(tiny_vit().state_dict(), run / "weights.safetensors")
    DecoupledEmbedding(EmbeddingConfig(depth=3, width=32, dim=8, r=4)).save(run / "embedding.safetensors")
    recipe = {"file": "tiny.toml", "architecture": "vit_tiny_patch16_224", "arguments": ARGUMENTS}
    (run / "recipe.json").write_text(json.dumps(recipe))
    return ["--run", str(run), "--rates", "8,60", "--n-images", "6", "--batch-size", "4", "--n-pictures", "2"]


def test_background_writes_table_json_and_pictures(command: list[str], tmp_path: Path) -> None:
    assert background.main([*command, "--out", str(tmp_path / "v1.2")]) == 0
    rows = json.loads((tmp_path / "v1.2.json").read_text())["rows"]
    merging = [(row["policy"], row["r"], row["base"]) for row in rows]
    pairs = [("tome", 8, None), ("tome", 60, None), ("dtem", 8, None), ("dtem", 60, None)]
    assert merging == [*pairs, ("dtem", 8, "tome"), ("dtem", 60, "tome")]
    few, many = rows[0]["figures"], rows[1]["figures"]
    assert few["background_alone"]["mean"] > many["background_alone"]["mean"]
    assert 1 <= few["digit_group"]["mean"] < many["digit_group"]["mean"]
    assert "| dtem minus tome | 60 | " in (tmp_path / "v1.2.md").read_text()
    for name in ("v1.2.png", "v1.2-tokens.png"):
        with Image.open(tmp_path / name) as picture:
            assert len(set(picture.convert("RGB").get_flattened_data())) > 50


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--policies", "none,dtem"], "expected some that merge"),
        (["--rates", "0"], "expected some that merge"),
        (["--policies", "tome,dtm"], "expected some of none, tome, dtem, random"),
    ],
)
def test_background_of_other_data_or_policies_is_refused(
    command: list[str], extra: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert background.main([*command, "--out", str(tmp_path / "result"), *extra]) == 2
    assert message in capsys.readouterr().err
