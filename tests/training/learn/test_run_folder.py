import json
import multiprocessing
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.learn.tiny_run import logged, tiny_recipe, tiny_training, write_run
from training.learn.dtem import DtemTraining
from training.learn.picture import _means, draw_learning
from training.learn.progress import StepProgress
from training.learn.recipe import DtemRecipe
from training.learn.run_folder import RunLog, opened_folder, replaced


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> DtemRecipe:
    return tiny_recipe(write_run(tmp_path_factory.mktemp("recipe"), n_images="n_images = 48", validation=""))


@contextmanager
def room_for(n_bytes: int) -> Iterator[None]:
    """Let no file grow beyond n_bytes, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_log_drops_what_came_after_the_checkpoint_and_half_a_line(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    for n_seen in (8, 16, 24):
        log.write(n_seen, {"loss": 1.0})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"n_seen": 8, "ti')
    log = RunLog(tmp_path, 16)
    log.write(24, {"loss": 2.0})
    log.close()
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(entry["n_seen"], entry["loss"]) for entry in entries] == [(8, 1.0), (16, 1.0), (24, 2.0)]


def test_file_is_replaced_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(TypeError), replaced(path) as new:
        new.write_bytes("no bytes")  # type: ignore[arg-type]
    assert path.read_text() == "before"
    with replaced(path) as new:
        new.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"


def test_full_folder_is_refused_before_the_first_step(recipe: DtemRecipe, tmp_path: Path) -> None:
    with room_for(500_000), pytest.raises(OSError, match=r"run cannot hold a checkpoint of 1\.\d MB: File too large"):
        tiny_training(recipe, tmp_path / "run").run()
    assert not contents(tmp_path / "run")


def test_folder_that_is_a_file_is_refused(recipe: DtemRecipe, tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(OSError, match="run cannot hold a checkpoint"):
        tiny_training(recipe, tmp_path / "run").run()


@pytest.mark.parametrize(("n_bytes", "file"), [(3_000, r"state\.pt"), (80_000, r"weights\.safetensors")])
def test_disk_that_becomes_full_leaves_the_last_checkpoint(
    recipe: DtemRecipe, tmp_path: Path, n_bytes: int, file: str
) -> None:
    whole, ended = tiny_training(recipe, tmp_path / "whole"), tiny_training(recipe, tmp_path / "ended")
    whole.run(checkpoint_every=2)
    ended.run(checkpoint_every=2, until=5)
    before = contents(tmp_path / "ended")
    # Without it, the frozen ViT is written too.
    (tmp_path / "ended" / "state.pt").rename(tmp_path / "state.pt")
    with room_for(n_bytes), pytest.raises(OSError, match=rf"{file} cannot be written, and the last .*File too large"):
        ended.save()
    (tmp_path / "state.pt").rename(tmp_path / "ended" / "state.pt")
    assert contents(tmp_path / "ended") == before
    assert tiny_training(recipe, tmp_path / "ended").run(checkpoint_every=2)
    assert logged(tmp_path / "ended") == logged(tmp_path / "whole")


def test_run_killed_while_it_saved_resumes(recipe: DtemRecipe, tmp_path: Path) -> None:
    """Some files are of the next checkpoint, others are half written."""
    whole, killed = tiny_training(recipe, tmp_path / "whole"), tiny_training(recipe, tmp_path / "killed")
    whole.run(checkpoint_every=2)
    killed.run(checkpoint_every=2, until=5)
    (tmp_path / "killed" / "embedding.safetensors").write_bytes(
        (tmp_path / "whole" / "embedding.safetensors").read_bytes()
    )
    (tmp_path / "killed" / "state.pt.tmp").write_bytes(b"half")
    assert tiny_training(recipe, tmp_path / "killed").run(checkpoint_every=2)
    assert contents(tmp_path / "killed").keys() == contents(tmp_path / "whole").keys()
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")
    found, expected = (contents(tmp_path / name)["embedding.safetensors"] for name in ("killed", "whole"))
    assert found == expected


def test_damaged_state_is_named(recipe: DtemRecipe, tmp_path: Path) -> None:
    tiny_training(recipe, tmp_path).run(until=2, checkpoint_every=2)
    state = (tmp_path / "state.pt").read_bytes()
    for damaged in (b"", state[:1000], b"<html>"):
        (tmp_path / "state.pt").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"state\.pt is damaged"):
            tiny_training(recipe, tmp_path).run()


def test_files_of_a_run_have_the_mode_of_the_umask(recipe: DtemRecipe, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        tiny_training(recipe, tmp_path / "run").run()
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "run").rglob("*") if file.is_file()}
    assert modes == dict.fromkeys(modes, 0o640)
    assert {"weights.safetensors", "embedding.safetensors", "state.pt", "metrics.jsonl"} <= modes.keys()


def test_folder_in_use_is_refused_until_its_run_ends_or_is_killed(tmp_path: Path) -> None:
    (opened, opening), (ended, ending) = os.pipe(), os.pipe()

    def train() -> None:
        with opened_folder(tmp_path, 1):
            # As a data worker, which outlives a killed run for a moment.
            if os.fork() == 0:
                os.read(ended, 1)
                os._exit(0)
            os.write(opening, b".")
            os.read(ended, 1)

    run = multiprocessing.get_context("fork").Process(target=train)
    run.start()
    os.read(opened, 1)
    with pytest.raises(OSError, match="in use by another run"), opened_folder(tmp_path, 1):
        pass
    run.kill()
    run.join()
    with opened_folder(tmp_path, 1):
        pass
    os.write(ending, b".")
    for descriptor in (opened, opening, ended, ending):
        os.close(descriptor)


def test_folder_explains_itself(recipe: DtemRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_training(recipe, tmp_path).run(checkpoint_every=2, until=3)
    with monkeypatch.context() as patch:
        patch.setattr(DtemTraining, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tiny_training(recipe, tmp_path).run(checkpoint_every=2)
    tiny_training(recipe, tmp_path).run(checkpoint_every=2)
    sessions = json.loads((tmp_path / "run.json").read_text())["sessions"]
    assert [session["from_n_seen"] for session in sessions] == [0, 16, 16]
    assert [session["outcome"] for session in sessions] == ["ended", "KeyboardInterrupt:", "ended"]
    assert sessions[-1]["to_n_seen"] == 48
    for session in sessions:
        assert session["start"] <= session["end"]
        assert session["versions"]["torch"] == torch.__version__
        assert session["versions"]["timm"]
        assert "pytest" in session["command"]
        assert session["device"] == "cpu"
        assert session["host_cpu"]
    with Image.open(tmp_path / "learning.png") as picture:
        assert picture.size == (800, 400)
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 2


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_picture_of_many_steps_shows_means(tmp_path: Path) -> None:
    lines = [json.dumps({"n_seen": n, "vit_loss": 1 / n}) for n in range(1, 5001)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    draw_learning(tmp_path / "metrics.jsonl", tmp_path / "learning.png")
    n_seen, loss = _means(np.array([[n, 1 / n] for n in range(1, 5001)]))
    assert len(n_seen) == len(loss) == 200
    assert n_seen[0] == np.mean(range(1, 26))


def test_progress_off_a_terminal_is_a_line_per_checkpoint(
    recipe: DtemRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_training(recipe, tmp_path).run(checkpoint_every=4)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": loss ")[0] for line in lines] == ["image 32 of 48", "image 48 of 48"]


def test_progress_on_a_terminal_has_at_most_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with StepProgress(1_281_167 * 30, 0) as progress:
        progress.advance(1024, "loss 6.9077")
    shown = capsys.readouterr().err.replace("\n", "").split("\r")
    assert max(map(len, shown)) == 80
    assert "loss 6.9077" in shown[-1]
