from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch import Tensor

from tests.training.learn.tiny_run import VIT, logged, tiny_recipe, tiny_training, write_run, write_vit
from training.learn.dtem import DtemTraining
from training.learn.image_training import learning_rate
from training.learn.images import image_batches
from training.learn.losses import LOSSES
from training.learn.recipe import AdamW, Data, DtemRecipe
from training.models.embedding import EmbeddingMismatch, load_embedding
from training.models.vit import load_vit

# Of three blocks the last merges after the last attention that the class token takes part in: no
# loss reaches it.
LEARNT = {f"blocks.{block}.{part}" for block in (0, 1) for part in ("weight", "bias")}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def modular(tmp_path_factory: pytest.TempPathFactory) -> DtemRecipe:
    return tiny_recipe(write_run(tmp_path_factory.mktemp("modular")))


@pytest.fixture(scope="module")
def end_to_end(tmp_path_factory: pytest.TempPathFactory) -> DtemRecipe:
    file = write_run(tmp_path_factory.mktemp("end-to-end"), mode='mode = "end-to-end"', n_images="n_images = 192")
    file.write_text(file.read_text() + VIT)
    return tiny_recipe(file)


def copied(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(module: torch.nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}


def watch_gradients(run: DtemTraining, seen: list[tuple[str, bool, bool]]) -> None:
    """Note before each optimiser's step whose it is, and whether ViT and embedding hold gradients."""
    for name, optimiser in run.optimisers.items():

        def note(*_: Any, name: str = name) -> None:
            holds = [any(p.grad is not None for p in part.parameters()) for part in (run.vit, run.embedding)]
            seen.append((name, holds[0], holds[1]))

        optimiser.register_step_pre_hook(note)


def test_modular_steps_reach_the_embedding_only(modular: DtemRecipe, tmp_path: Path) -> None:
    run = tiny_training(modular, tmp_path)
    vit, embedding, seen = copied(run.vit), copied(run.embedding), list[tuple[str, bool, bool]]()
    watch_gradients(run, seen)
    run.run(until=4)
    assert seen == [("embedding", False, True)] * 4
    assert not changed(run.vit, vit)
    assert changed(run.embedding, embedding) >= LEARNT


def test_end_to_end_steps_alternate_nine_to_one(end_to_end: DtemRecipe, tmp_path: Path) -> None:
    run = tiny_training(end_to_end, tmp_path)
    seen: list[tuple[str, bool, bool]] = []
    watch_gradients(run, seen)
    embedding = copied(run.embedding)
    run.run(until=9)
    vit = copied(run.vit)
    assert not changed(run.embedding, embedding)
    run = tiny_training(end_to_end, tmp_path / "again")
    watch_gradients(run, seen)
    run.run(until=9)
    assert not changed(run.vit, vit)
    images, labels = next(image_batches(run.images, seed=5, first_step=9, n_steps=10, batch_size=8))
    run.step(images, labels)
    assert not changed(run.vit, vit)
    assert changed(run.embedding, embedding) >= LEARNT
    run.step(images, labels)
    assert changed(run.vit, vit)
    assert seen == [("vit", True, False)] * 18 + [("embedding", False, True), ("vit", True, False)]


def test_steps_of_the_vit_really_remove_tokens(end_to_end: DtemRecipe, tmp_path: Path) -> None:
    run = tiny_training(end_to_end, tmp_path)
    widths: list[int] = []
    for block in run.vit.blocks:
        block.mlp.register_forward_pre_hook(lambda _, inputs: widths.append(int(inputs[0].shape[1])))
    images, labels = next(image_batches(run.images, seed=5, first_step=0, n_steps=1, batch_size=8))
    run.step(images, labels)
    assert widths == [14, 11, 8]
    run.n_steps_taken, widths[:] = 9, []
    run.step(images, labels)
    assert widths == [17, 17, 17]


@pytest.mark.parametrize("n_workers", [0, 1])
def test_run_stopped_anywhere_resumes_bit_identically(end_to_end: DtemRecipe, tmp_path: Path, n_workers: int) -> None:
    whole = tiny_training(end_to_end, tmp_path / "whole")
    assert whole.run(checkpoint_every=7)
    assert not tiny_training(end_to_end, tmp_path / "halved").run(checkpoint_every=7, until=17)  # saved at 14
    resumed = tiny_training(end_to_end, tmp_path / "halved", n_workers=n_workers)
    assert resumed.run(checkpoint_every=7)
    assert not changed(resumed.vit, copied(whole.vit))
    assert not changed(resumed.embedding, copied(whole.embedding))
    assert logged(tmp_path / "halved") == logged(tmp_path / "whole")
    for name in ("weights.safetensors", "recipe.json"):
        assert (tmp_path / "halved" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_files_of_a_run_are_what_others_load(end_to_end: DtemRecipe, tmp_path: Path) -> None:
    run = tiny_training(end_to_end, tmp_path)
    run.run()
    vit = load_vit(end_to_end.architecture, weights=tmp_path / "weights.safetensors", **end_to_end.arguments)
    embedding = load_embedding(tmp_path / "embedding.safetensors")
    assert not changed(vit, copied(run.vit))
    assert not changed(embedding, copied(run.embedding))
    assert (embedding.config.r, embedding.config.recipe) == (3, "recipe.toml")
    assert not list(tmp_path.glob("*.tmp"))


def test_run_of_another_recipe_is_refused_naming_the_difference(modular: DtemRecipe, tmp_path: Path) -> None:
    tiny_training(modular, tmp_path).save()
    before = (tmp_path / "state.pt").read_bytes()
    other = tiny_training(replace(modular, seed=6, r=2), tmp_path)
    with pytest.raises(ValueError, match=r"another recipe, which differs in seed, r: give another folder"):
        other.run()
    assert (tmp_path / "state.pt").read_bytes() == before


def test_checkpoint_that_fails_half_way_leaves_the_one_before(
    modular: DtemRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_training(modular, tmp_path)
    run.run(until=2, checkpoint_every=2)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}

    def failing_save(_: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", failing_save)
    with pytest.raises(OSError, match=r"state\.pt cannot be written, and the last checkpoint stays: no space left"):
        run.save()
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before
    resumed = tiny_training(modular, tmp_path)
    resumed.resume()
    assert resumed.n_steps_taken == 2


def test_stop_ends_the_run_after_its_step_with_a_checkpoint(modular: DtemRecipe, tmp_path: Path) -> None:
    class StopAtStep:
        def __init__(self, step: int) -> None:
            self.step = step

        def is_set(self) -> bool:
            return run.n_steps_taken >= self.step

    run = tiny_training(modular, tmp_path)
    assert not run.run(stop=StopAtStep(3))  # type: ignore[arg-type]
    resumed = tiny_training(modular, tmp_path)
    resumed.resume()
    assert resumed.n_steps_taken == 3
    assert not changed(resumed.embedding, copied(run.embedding))


def test_validation_is_logged_with_each_checkpoint(modular: DtemRecipe, tmp_path: Path) -> None:
    run = tiny_training(replace(modular, n_images=40), tmp_path)
    run.run(checkpoint_every=2)
    entries = {
        int(entry["n_seen"]): entry["validation_top1"] for entry in logged(tmp_path) if "validation_top1" in entry
    }
    assert list(entries) == [16, 32, 40]
    assert run.validation is not None
    (pixels, labels), *_ = run.validation.batches
    right = run.hard.eval()((pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5).argmax(1) == labels
    assert entries[40] == pytest.approx(float(right.float().mean()), abs=0.13)  # bfloat16 may turn one of eight


def test_tensorboard_has_the_steps_of_a_resumed_run_once(modular: DtemRecipe, tmp_path: Path) -> None:
    recipe = replace(modular, n_images=64)
    tiny_training(recipe, tmp_path).run(checkpoint_every=3, until=5)
    tiny_training(recipe, tmp_path).run(checkpoint_every=3)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    losses = [(event.step, event.value) for event in board.Scalars("embedding/loss")]
    expected = [(entry["n_seen"], entry["embedding_loss"]) for entry in logged(tmp_path) if "embedding_loss" in entry]
    assert [step for step, _ in losses] == list(range(8, 72, 8))
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in expected])
    assert board.Scalars("validation/top1")


def test_micro_batches_take_the_same_steps(modular: DtemRecipe, tmp_path: Path) -> None:
    modular = replace(modular, n_images=32, precision="float32")
    whole = tiny_training(modular, tmp_path / "whole")
    parts = tiny_training(replace(modular, micro_batch=3), tmp_path / "parts")
    whole.run()
    parts.run()
    for one, other in zip(logged(tmp_path / "whole"), logged(tmp_path / "parts"), strict=True):
        assert other == pytest.approx(one, rel=1e-4)
    for name, tensor in whole.embedding.state_dict().items():
        assert torch.allclose(parts.embedding.state_dict()[name], tensor, atol=1e-4), name


def test_epochs_are_counted_in_images_of_the_folder(modular: DtemRecipe, tmp_path: Path) -> None:
    run = tiny_training(replace(modular, n_images=0, epochs=3), tmp_path)
    assert (run.recipe.n_images, run.recipe.epochs, run.recipe.n_steps) == (120, 0, 15)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"arguments": {"img_size": 64, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}},
            "5 classes.* 4",
        ),
        ({"r": 9}, "r 9: the first block can remove 8 of 17"),
        ({"n_images": 7}, "n_images 7: .*batch_size of 8"),
    ],
)
def test_recipe_that_does_not_fit_is_refused(
    modular: DtemRecipe, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    arguments = changes.get("arguments", modular.arguments)
    weights = str(write_vit(tmp_path / "vit.safetensors", num_classes=arguments["num_classes"]))
    with pytest.raises(ValueError, match=message):
        tiny_training(replace(modular, weights=weights, **changes), tmp_path)


def test_digits_run_and_measure_themselves_on_their_validation_split(tmp_path: Path) -> None:
    arguments = {"img_size": 112, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
    weights = write_vit(tmp_path / "vit.safetensors", **arguments)
    recipe = DtemRecipe(
        file="digits.toml",
        mode="modular",
        seed=1,
        r=8,
        architecture="vit_tiny_patch16_224",
        arguments=arguments,
        weights=str(weights),
        n_images=16,
        batch_size=8,
        data=Data(n_distinct=12, n_validation=10),
        embedding=AdamW((1e-3, 1e-5), 1e-4, 5.0),
    )
    run = tiny_training(recipe, tmp_path / "run")
    assert run.run()
    assert [set(entry) - {"n_seen"} for entry in logged(tmp_path / "run")][-1] == {"validation_top1"}
    assert load_file(tmp_path / "run" / "weights.safetensors").keys() == load_file(weights).keys()


def test_learning_rate_warms_up_and_falls_as_half_a_cosine(modular: DtemRecipe) -> None:
    rates = [learning_rate(n_seen, modular, AdamW((1e-3, 1e-5), 0, 1)) for n_seen in (0, 80, 160, 240, 320)]
    expected = [1e-3, 1e-3 - 0.1464466 * 9.9e-4, 5.05e-4, 1e-5 + 0.1464466 * 9.9e-4, 1e-5]
    assert rates == pytest.approx(expected)
    warm = AdamW((1e-3, 1e-3), 0, 1, warmup_images=32)
    assert [learning_rate(n_seen, modular, warm) for n_seen in (0, 8, 24, 32)] == pytest.approx(
        [2.5e-4, 5e-4, 1e-3, 1e-3]
    )


def test_embedding_begins_with_the_weights_of_another(modular: DtemRecipe, tmp_path: Path) -> None:
    given = tiny_training(replace(modular, n_images=8), tmp_path / "given")
    given.run()
    file = tmp_path / "given" / "embedding.safetensors"
    found = tiny_training(replace(modular, embedding_weights=str(file)), tmp_path / "run").embedding
    for name, tensor in given.embedding.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_embedding_of_another_width_is_refused_to_begin_with(modular: DtemRecipe, tmp_path: Path) -> None:
    tiny_training(replace(modular, n_images=8), tmp_path / "given").run()
    file = tmp_path / "given" / "embedding.safetensors"
    with pytest.raises(EmbeddingMismatch, match=r"embedding_weights .* d' 8, the recipe's .* d' 4"):
        tiny_training(replace(modular, embedding_weights=str(file), dim=4), tmp_path / "run")


@pytest.mark.parametrize("bad", ["loss", "gradient norm"])
def test_figure_that_is_not_finite_ends_the_run_before_its_step(
    modular: DtemRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    run = tiny_training(modular, tmp_path)
    run.run(checkpoint_every=2, until=3)
    state, embedding = (tmp_path / "state.pt").read_bytes(), copied(run.embedding)

    class InfiniteGradient(torch.autograd.Function):
        @staticmethod
        def forward(_: Any, loss: Tensor) -> Tensor:
            return loss * float("nan") if bad == "loss" else loss.clone()

        @staticmethod
        def backward(_: Any, gradient: Tensor) -> Tensor:
            return gradient * float("inf")

    def diverging(logits: Tensor, targets: Tensor, **_: Any) -> Tensor:
        loss: Tensor = InfiniteGradient.apply(torch.nn.functional.cross_entropy(logits, targets))
        return loss

    monkeypatch.setitem(LOSSES, "cross-entropy", diverging)
    with pytest.raises(ValueError, match=rf"step 4: the {bad} is (nan|inf)"):
        run.step(*next(image_batches(run.images, seed=5, first_step=3, n_steps=4, batch_size=8)))
    assert not changed(run.embedding, embedding)
    with pytest.raises(ValueError, match=rf"step 3: the {bad} is (nan|inf)"):
        tiny_training(modular, tmp_path).run(checkpoint_every=1)
    assert (tmp_path / "state.pt").read_bytes() == state
