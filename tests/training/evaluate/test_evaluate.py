import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.training.commands import dtem
from tests.training.tiny_vit import ARGUMENTS, tiny_vit
from training.cli.model_options import ChosenModel, chosen_model
from training.cli.options import ModelOptions
from training.data.digits import draw
from training.data.sources import open_source, pixel_batches
from training.evaluate.results import Row, read_evaluation, write_evaluation
from training.merging.adaptive import Thresholds
from training.models.calibration import Calibration, Measured, load_calibration
from training.models.classifier import AdaptiveClassifier, frozen_classifier
from training.models.embedding import DecoupledEmbedding, EmbeddingConfig, load_embedding
from training.models.weights import weights_digest


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    save_file(tiny_vit().state_dict(), tmp_path / "weights.safetensors")
    model = ["--architecture", "vit_tiny_patch16_224", "--weights", str(tmp_path / "weights.safetensors")]
    rates = ["--rates", "0,30,60", "--n-images", "24", "--batch-size", "10"]
    data = ["--data", "digits", "--arguments", json.dumps(ARGUMENTS)]
    return [*model, *data, *rates, "--out", str(tmp_path / "result")]


def _chosen(folder: Path) -> ChosenModel:
    weights = str(folder / "weights.safetensors")
    name = "vit_tiny_patch16_224"
    return chosen_model(ModelOptions(architecture=name, weights=weights, arguments=ARGUMENTS, data="digits"))


@pytest.fixture
def embedding(tmp_path: Path) -> list[str]:
    torch.manual_seed(3)
    DecoupledEmbedding(EmbeddingConfig(depth=3, width=32, dim=8, r=30)).save(tmp_path / "own.safetensors")
    return ["--embedding", str(tmp_path / "own.safetensors")]


def test_evaluate_writes_table_json_and_picture(command: list[str], tmp_path: Path) -> None:
    assert dtem("evaluate", [*command, "--policies", "none,random,tome"]) == 0
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    expected = [("none", 0, 197), ("tome", 30, 107), ("tome", 60, 39), ("random", 30, 107), ("random", 60, 39)]
    assert [(row["policy"], row["r"], row["tokens_left"]) for row in rows] == expected
    assert rows[0]["gmacs"] > rows[1]["gmacs"] > rows[2]["gmacs"]
    assert all(row["n_images"] == 24 and row["ci95"][0] <= row["top1"] <= row["ci95"][1] for row in rows)
    table = (tmp_path / "result.md").read_text()
    assert sum(line.startswith("| ") for line in table.splitlines()) == 1 + len(rows)
    assert f"| tome | 30 | 107 | {rows[1]['gmacs']:.3f} |" in table
    with Image.open(tmp_path / "result.png") as picture:
        assert picture.width > 500
        assert len(set(picture.convert("RGB").get_flattened_data())) > 50


def test_evaluate_resumes_and_repeats_itself(command: list[str], tmp_path: Path) -> None:
    assert dtem("evaluate", command) == 0
    file = tmp_path / "result.json"
    whole = json.loads(file.read_text())
    cut = {**whole, "rows": whole["rows"][:2]}
    cut["rows"][0]["images_per_second"] = 12345.0  # a mark: this row is not measured again
    file.write_text(json.dumps(cut))
    assert dtem("evaluate", command) == 0
    resumed = json.loads(file.read_text())
    assert resumed["rows"][0]["images_per_second"] == 12345.0
    assert [row["top1"] for row in resumed["rows"]] == [row["top1"] for row in whole["rows"]]


def test_dtem_merges_by_its_embedding_and_costs_its_gemm(
    command: list[str], embedding: list[str], tmp_path: Path
) -> None:
    assert dtem("evaluate", [*command, *embedding]) == 0
    rows = {row.key: row for row in read_evaluation(tmp_path / "result.json").rows}
    assert list(rows) == ["none-r0", "tome-r30", "tome-r60", "dtem-r30", "dtem-r60"]
    # 197, 167 and 137 tokens enter the blocks, each meets 32 x 8 weights; scores by 8 numbers
    # instead of a head's 16
    scores = sum(n_a * n_b for n_a, n_b in ((98, 98), (83, 83), (68, 68)))
    own = (197 + 167 + 137) * 32 * 8 - scores * (16 - 8)
    assert (rows["dtem-r30"].gmacs - rows["tome-r30"].gmacs) * 1e9 == pytest.approx(own, abs=1)


def test_rows_record_which_images_were_right(command: list[str], embedding: list[str], tmp_path: Path) -> None:
    assert dtem("evaluate", [*command, *embedding]) == 0
    found = read_evaluation(tmp_path / "result.json")
    assert all(row.scores.shape == (24,) and row.scores.mean() == row.value for row in found.rows)
    chosen = _chosen(tmp_path)
    classifier = frozen_classifier(chosen.vit, chosen.rule, 30)
    is_right: list[bool] = []
    # Batches as in the evaluation: a decision may depend on the batch by rounding.
    for pixels, labels in pixel_batches(open_source("digits", chosen.rule, 24), 10, n_workers=0):
        with torch.inference_mode():
            is_right += (classifier(pixels).argmax(1) == labels).tolist()
    row = next(row for row in found.rows if row.key == "tome-r30")
    assert row.scores.tolist() == is_right


@pytest.fixture
def adaptive(tmp_path: Path, embedding: list[str]) -> list[str]:
    """Write calibrations of two policies, and return the option that names them."""
    measured = Measured("digits-on-photographs", "validation", 100, True, 0.1, 0.05, 0.0, (-1.0, 1.0))
    rest = (0.5, 0, 160, measured, measured)
    own = load_embedding(Path(embedding[1]))
    for metric, digest in (("features", None), ("embedding", weights_digest(own))):
        limits = Thresholds(0.9, 0.05, 0.5, 2)
        Calibration(metric, limits, weights_digest(tiny_vit()), digest, *rest).save(tmp_path / f"{metric}.json")
    return [*embedding, "--calibrations", f"{tmp_path / 'features.json'},{tmp_path / 'embedding.json'}"]


def test_adaptive_policies_have_separate_rows(command: list[str], adaptive: list[str], tmp_path: Path) -> None:
    assert dtem("evaluate", [*command, *adaptive]) == 0
    found = {row.key: row for row in read_evaluation(tmp_path / "result.json").rows}
    assert list(found)[-2:] == ["atm-features-drop0.5", "adaptive-dtem-embedding-drop0.5"]
    row = found["atm-features-drop0.5"]
    chosen = _chosen(tmp_path)
    batches = list(pixel_batches(open_source("digits", chosen.rule, 24), 10, n_workers=0))
    classifier = AdaptiveClassifier(load_calibration(tmp_path / "features.json").model(chosen.vit), chosen.rule).eval()
    with torch.inference_mode():
        parts = [classifier(pixels) for pixels, _ in batches]
    logits, tokens, gmacs = (torch.cat(outputs) for outputs in zip(*parts, strict=True))
    labels = torch.cat([labels for _, labels in batches])
    assert row.scores.tolist() == (logits.argmax(1) == labels).tolist()
    assert (row.r, row.metric, row.max_accuracy_drop) == (None, "features", 0.5)
    assert row.gmacs == pytest.approx(float(gmacs.mean()), rel=1e-6)
    assert row.tokens_left == pytest.approx(float(tokens[:, -1].double().mean()))
    spread = np.percentile(gmacs.numpy(), [5, 95])
    assert [row.gmacs_p5, row.gmacs_p95] == pytest.approx(spread.tolist(), rel=1e-6)
    table = (tmp_path / "result.md").read_text()
    assert (
        f"| atm (features) | drop 0.5 | {row.tokens_left:.1f} | {row.gmacs:.3f} ({spread[0]:.3f} … {spread[1]:.3f}) |"
        in table
    )
    assert dtem("evaluate", [*command, *adaptive]) == 0  # resumes: nothing is left to do
    found = {row.key: row for row in read_evaluation(tmp_path / "result.json").rows}
    assert found["atm-features-drop0.5"].images_per_second == row.images_per_second


def test_two_calibrations_of_the_same_row_are_refused(
    command: list[str], adaptive: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "features.json")
    assert dtem("evaluate", [*command, *adaptive, "--calibrations", f"{file},{file}"]) == 2
    assert (
        "atm-features-drop0.5, atm-features-drop0.5: expected each policy, metric and drop at most once"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "result.json").exists()


def test_an_adaptive_policy_can_be_compared(command: list[str], adaptive: list[str], tmp_path: Path) -> None:
    assert dtem("evaluate", [*command, *adaptive]) == 0
    pair = [str(tmp_path / "result.json"), "--base", "none", "--other", "tome,atm", "--out", str(tmp_path / "pairs")]
    assert dtem("compare", pair) == 0
    (*_, last) = json.loads((tmp_path / "pairs.json").read_text())["comparisons"]
    assert (last["other"]["series"], last["other"]["setting"]) == ("atm (features)", "drop 0.5")
    assert "| none r=0 | atm (features) drop 0.5 |" in (tmp_path / "pairs.md").read_text()
    with Image.open(tmp_path / "pairs.png") as picture:
        assert picture.width > 500


def test_evaluate_takes_a_folder_of_images(command: list[str], tmp_path: Path) -> None:
    for index in range(4):
        scene = draw("test", index)
        folder = tmp_path / "val" / f"class{scene.label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene.image).save(folder / f"{index}.png")
    (tmp_path / "labels.txt").write_text("\n".join(f"class{index}" for index in range(10)))
    data = ["--data", str(tmp_path / "val"), "--labels", str(tmp_path / "labels.txt")]
    assert dtem("evaluate", [*command, *data, "--rates", "0", "--n-images", "3"]) == 0
    found = read_evaluation(tmp_path / "result.json")
    assert (found.about["split"], found.about["n_images"], len(found.rows[0].scores)) == ("val", 3, 3)


def test_another_embedding_is_another_evaluation(
    command: list[str], embedding: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert dtem("evaluate", [*command, *embedding, "--rates", "30"]) == 0
    DecoupledEmbedding(EmbeddingConfig(depth=3, width=32, dim=8, r=30)).save(Path(embedding[1]))
    assert dtem("evaluate", [*command, *embedding, "--rates", "30"]) == 2
    assert "holds another evaluation" in capsys.readouterr().err


def test_a_row_is_never_without_its_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(r: int) -> Row:
        return Row("tome", r, 11, 0.3, 0.5, (0.2, 0.8), 10, 1.0, np.arange(10) % 2 == r % 2)

    def fail(*arguments: object, **options: object) -> str:
        raise KeyboardInterrupt

    out = tmp_path / "v1.2"
    write_evaluation(out, {}, [row(2)])
    with monkeypatch.context() as patch:
        patch.setattr("training.evaluate.results.json.dumps", fail)  # stopped after the arrays, before the figures
        with pytest.raises(KeyboardInterrupt):
            write_evaluation(out, {}, [row(2), row(3)])
    found = read_evaluation(tmp_path / "v1.2.json").rows
    assert [one.r for one in found] == [2]
    assert found[0].scores.tolist() == row(2).scores.tolist()
    write_evaluation(out, {}, [row(2), row(3)])
    assert [one.scores.tolist() for one in read_evaluation(tmp_path / "v1.2.json").rows] == [
        row(2).scores.tolist(),
        row(3).scores.tolist(),
    ]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["v1.2.json", "v1.2.npz"]


def test_rows_without_or_with_other_arrays_are_refused(tmp_path: Path) -> None:
    row = Row("tome", 2, 11, 0.3, 0.5, (0.2, 0.8), 4, 1.0, np.array([True, True, False, False]))
    write_evaluation(tmp_path / "one", {}, [row])
    with pytest.raises(FileNotFoundError, match=r"no evaluation .*two\.json"):
        read_evaluation(tmp_path / "two.json")
    arrays: dict[str, Any] = {"tome-r2": np.packbits([True, False, False, False])}
    np.savez(tmp_path / "one.npz", **arrays)
    with pytest.raises(ValueError, match=r"row tome-r2 has top-1 0\.5, its array 0\.25"):
        read_evaluation(tmp_path / "one.json")
    np.savez(tmp_path / "one.npz", **{"tome-r4": arrays["tome-r2"]})
    with pytest.raises(ValueError, match="row tome-r2 has no array"):
        read_evaluation(tmp_path / "one.json")
    (tmp_path / "one.npz").unlink()
    with pytest.raises(FileNotFoundError, match="evaluate again"):
        read_evaluation(tmp_path / "one.json")


def test_rows_of_another_evaluation_are_not_mixed_in(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dtem("evaluate", command) == 0
    assert dtem("evaluate", [*command, "--n-images", "12"]) == 2
    assert "holds another evaluation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--policies", "none,dtm"], "policies ['none', 'dtm']: expected some of none, tome, dtem, random"),
        (["--policies", "tome,tome"], "each once"),
        (["--policies", "tome", "--rates", "0"], "nothing to measure"),
        (["--policies", "dtem"], "policy dtem needs an embedding"),
        (["--run", "somewhere"], "expected exactly one of"),
        (["--weights", "nowhere.safetensors"], "no checkpoint nowhere.safetensors"),
        (["--data", "nowhere"], "nowhere"),
        (["--rates", "0,120"], "cannot remove r=120"),
        (["--device", "nowhere"], "--device nowhere: expected cpu, cuda or cuda:<number>"),
        (["--device", "cuda:99"], "--device cuda:99: expected cpu, or one of the"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    command: list[str], extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dtem("evaluate", [*command, *extra]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "batch/s" not in error  # before the first image
