from pathlib import Path

import pytest

from training.data.digits import REFERENCE_TASK
from training.learn.recipe import read_recipe

REFERENCE = Path("training/recipes/reference.toml")


def test_reference_recipe_ends_on_the_task_that_is_evaluated() -> None:
    recipe = read_recipe(REFERENCE)
    last = recipe.stages[-1]
    assert last.task.min_contrast < REFERENCE_TASK.min_contrast  # it learns on harder images than it is judged by
    assert (last.task.photo_percent, last.task.max_clutter) == (
        REFERENCE_TASK.photo_percent,
        REFERENCE_TASK.max_clutter,
    )
    assert last.kept_patches == 196
    assert last.token_label_weight == 0
    assert recipe.stages[0].task.light_on_dark


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('kind = "backbone"', 'kind = "embeding"', "kind 'embeding'"),
        ("batch_size = 64", "", "batch_size"),
        ("seed = 1", "seed = 1\ncolour = 3", "colour"),
        ("min_digit_pixels = 36", "min_digit_pixels = 360", "digit sizes 360"),
        ("[7e-4, 2e-4]", "7e-4", "learning_rate"),
        ("[model]", "[modle]", "model"),
    ],
)
def test_bad_recipe_is_refused_with_file_and_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = REFERENCE.read_text()
    assert old in text
    file = tmp_path / "mine.toml"
    file.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=rf"mine\.toml.*{message}"):
        read_recipe(file)
