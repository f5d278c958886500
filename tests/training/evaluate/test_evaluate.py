import json
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import save_file

from tests.training.tiny_vit import ARGUMENTS, tiny_vit
from training.cli import evaluate


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    save_file(tiny_vit().state_dict(), tmp_path / "weights.safetensors")
    model = ["--architecture", "vit_tiny_patch16_224", "--weights", str(tmp_path / "weights.safetensors")]
    rates = ["--rates", "0,30,60", "--n-images", "24", "--batch-size", "10"]
    return [*model, "--arguments", json.dumps(ARGUMENTS), *rates, "--out", str(tmp_path / "result")]


def test_evaluate_writes_table_json_and_picture(command: list[str], tmp_path: Path) -> None:
    assert evaluate.main(command) == 0
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    expected = [("none", 0, 197), ("tome", 30, 107), ("tome", 60, 39), ("random", 30, 107), ("random", 60, 39)]
    assert [(row["policy"], row["r"], row["tokens_left"]) for row in rows] == expected
    assert rows[0]["gmacs"] > rows[1]["gmacs"] > rows[2]["gmacs"]
    assert all(row["n_images"] == 24 and row["ci95"][0] <= row["top1"] <= row["ci95"][1] for row in rows)
    table = (tmp_path / "result.md").read_text()
    assert len(table.splitlines()) == 2 + len(rows)
    assert f"| tome | 30 | 107 | {rows[1]['gmacs']:.3f} |" in table
    with Image.open(tmp_path / "result.png") as picture:
        assert picture.width > 500
        assert len(set(picture.convert("RGB").get_flattened_data())) > 50


def test_evaluate_resumes_and_repeats_itself(command: list[str], tmp_path: Path) -> None:
    assert evaluate.main(command) == 0
    file = tmp_path / "result.json"
    whole = json.loads(file.read_text())
    cut = {**whole, "rows": whole["rows"][:2]}
    cut["rows"][0]["images_per_second"] = 12345.0  # a mark: this row is not measured again
    file.write_text(json.dumps(cut))
    assert evaluate.main(command) == 0
    resumed = json.loads(file.read_text())
    assert resumed["rows"][0]["images_per_second"] == 12345.0
    assert [row["top1"] for row in resumed["rows"]] == [row["top1"] for row in whole["rows"]]


def test_rows_of_another_evaluation_are_not_mixed_in(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(command) == 0
    assert evaluate.main([*command, "--n-images", "12"]) == 2
    assert "holds another evaluation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--policies", "none,dtm"], "policies ['dtm']: expected some of none, tome, random"),
        (["--run", "somewhere"], "expected exactly one of"),
        (["--weights", "nowhere.safetensors"], "no weights file nowhere.safetensors"),
        (["--data", "nowhere"], "nowhere"),
        (["--rates", "0,120"], "cannot remove r=120"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    command: list[str], extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([*command, *extra]) == 2
    assert message in capsys.readouterr().err
