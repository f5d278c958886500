from pathlib import Path

import pytest
import torch

from training.data.augmentation import augmentation
from training.data.digits import REFERENCE_TASK
from training.learn.prepare import recipe_rule
from training.learn.recipe import DtemRecipe, FinetuneRecipe, Recipe, read_recipe
from training.models.classifier import input_rule
from training.models.vit import MergingVisionTransformer, load_vit

REFERENCE = Path("training/recipes/reference.toml")
MODULAR = Path("training/recipes/deit-small.toml")
ALL = sorted(Path("training/recipes").glob("*.toml"))


def test_reference_recipe_ends_on_the_task_that_is_evaluated() -> None:
    recipe = read_recipe(REFERENCE)
    assert isinstance(recipe, Recipe)
    last = recipe.stages[-1]
    assert (
        last.task.min_contrast < REFERENCE_TASK.min_contrast
    )  # training images are harder than those of the evaluation
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
        ("[model]", "[modle]", r"the recipe has no key 'modle': did you mean 'model'\? expected loss, model"),
        ("warmup_images", "warmup_image", r"\[optimiser\] has no key 'warmup_image': did you mean 'warmup_images'"),
        ("kept_patches = 96", "kept_patch = 96", r"\[\[stage\]\] 3 has no key 'kept_patch'"),
        ("max_tilt_degrees = 20, max_clutter", "tilt = 20, max_clutter", r"\[\[stage\]\] 1 task has no key 'tilt'"),
        ("[optimiser]", "[[optimiser]]", r"\[optimiser\] \[.*: expected a table"),
    ],
)
def test_bad_recipe_is_refused_with_file_and_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = REFERENCE.read_text()
    assert old in text
    file = tmp_path / "mine.toml"
    file.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=rf"mine\.toml.*{message}"):
        read_recipe(file)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('mode = "modular"', 'mode = "modlar"', "mode 'modlar': expected one of modular, end-to-end"),
        ('mode = "modular"', "mode = modular", "Invalid value"),
        ('mode = "modular"', 'mode = "end-to-end"', r"\[embedding\] and \[vit\]"),
        ("r = 16", "r = 0", "r 0"),
        ("r = 16", "r = 1.5", "r 1.5: expected a whole number"),
        ("r = 16", 'r = "16"', "r '16'"),
        ("r = 16", "r = 16\ndim = 0", "dim 0"),
        ("epochs = 30", "epochs = 30\nn_images = 4000", "n_images 4000 and epochs 30: expected one"),
        ("epochs = 30", "", "n_images 0 and epochs 0"),
        ("batch_size = 1024", "batch_size = 1024\nmicro_batch = 0", "micro_batch 0"),
        ("mixup = 0.8", "share = 0", "share 0: expected a number above 0, at most 1"),
        ("mixup = 0.8", "share = 1.2", "share 1.2"),
        ("mixup = 0.8", "n_distinct = 50", "n_distinct 50: it is for digits"),
        ("mixup = 0.8", "mixup = -1", "mixup -1"),
        ("erasing = 0.25", "erasing = 25", "erasing 25"),
        ("erasing = 0.25", "n_validation = 1.5", "n_validation 1.5"),
        ('source = "data/imagenet/train"', 'source = "digits"', "digits needs n_distinct"),
        ("[1e-4, 1e-6]", "[1e-4, 1e-6, 0]", "learning_rate .*expected two numbers"),
        ("[1e-4, 1e-6]", '["fast", "slow"]', "learning_rate .*'fast'"),
        ("[1e-4, 1e-6]", "[1e-4, -1e-6]", "learning_rate"),
        ("clip_norm = 5.0", "clip_norm = 0", "clip_norm 0"),
        ("clip_norm = 5.0", "clip_norm = 5.0\nbetas = [0.9]", r"betas \[0.9\]"),
        ("clip_norm = 5.0", "clip_norm = 5.0\nbetas = [0.9, 1.1]", r"betas \[0.9, 1.1\].* from 0 to 1"),
        ("clip_norm = 5.0", "clip_norm = 5.0\n[relaxation]\ntau1 = 0", "tau1 0"),
        ('weights = "pretrained"', "", "the recipe lacks weights"),
        ("seed = 1", "seed = 1\nembedding_weight = 3", "no key 'embedding_weight': did you mean 'embedding_weights'"),
        ("arguments = {}", "arguments = {}\nlayer_decay = 0.5", r"\[model\] has no key 'layer_decay'"),
        ("mixup = 0.8", "mix_up = 0.8", r"\[data\] has no key 'mix_up': did you mean 'mixup'"),
        ("clip_norm = 5.0", "clip_norm = 5.0\nlerning_rate = 1", "'lerning_rate': did you mean 'learning_rate'"),
        ("clip_norm = 5.0", "clip_norm = 5.0\n[relaxation]\ntau3 = 0", r"\[relaxation\] has no key 'tau3'"),
        ("mixup = 0.8", "min_crop = 0", "min_crop 0: expected a number above 0, at most 1"),
    ],
)
def test_bad_recipe_of_dtem_is_refused_with_file_and_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = MODULAR.read_text()
    settings = text[text.index("\nkind") :]
    assert settings.count(old) == 1
    file = tmp_path / "mine.toml"
    file.write_text(settings.replace(old, new))
    with pytest.raises(ValueError, match=rf"mine\.toml.*{message}"):
        read_recipe(file)


@pytest.mark.parametrize("file", ALL, ids=lambda file: file.stem)
def test_recipe_can_be_read_and_its_model_and_augmentation_built(file: Path) -> None:
    recipe = read_recipe(file)
    with torch.device("meta"):
        vit = load_vit(recipe.architecture, **recipe.arguments)
    if isinstance(recipe, FinetuneRecipe):
        augmentation(recipe_rule(recipe), min_crop=recipe.data.min_crop, flip=recipe.data.flip)
    if isinstance(recipe, DtemRecipe):
        model = MergingVisionTransformer(vit, recipe.r, exhausted="reduce")
        assert model.schedule[0] == recipe.r
        assert model.vit.num_classes == (10 if recipe.data.source == "digits" else 1000)
        if recipe.data.source != "digits":
            augmentation(input_rule(vit), randaugment=recipe.data.randaugment, erasing=recipe.data.erasing)


@pytest.mark.parametrize("file", [file for file in ALL if "imagenet" in file.read_text()], ids=lambda file: file.stem)
def test_published_recipe_has_the_published_settings_and_states_what_to_expect(file: Path) -> None:
    recipe = read_recipe(file)
    assert isinstance(recipe, DtemRecipe)
    assert recipe.embedding is not None
    assert (recipe.r, recipe.epochs, recipe.batch_size) == (16, 30, 1024)
    assert (recipe.embedding.learning_rate, recipe.embedding.weight_decay) == ((1e-4, 1e-6), 1e-4)
    assert (recipe.embedding.clip_norm, recipe.embedding.warmup_images) == (5.0, 0)
    assert (recipe.data.mixup, recipe.data.cutmix, recipe.data.randaugment) == (0.8, 1.0, "rand-m9-mstd0.5-inc1")
    assert recipe.counted_in_images(1_281_167).n_steps == 37_534
    head = file.read_text().split("\nkind")[0]
    for word in ("Paper: arXiv 2412.10569", f"recipes/{file.name}", "Hardware:", "Hours:", "Accuracy to expect"):
        assert word in head
