"""The command as a user runs it: killed, interrupted, in two processes, refused."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.commands import dtem
from tests.training.learn.tiny_run import logged, tiny_recipe, tiny_training, write_run

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


pytestmark = pytest.mark.usefixtures("one_thread")


def arguments(recipe: Path, out: Path, n_workers: int = 0) -> list[str]:
    return ["--recipe", str(recipe), "--out", str(out), "--checkpoint-every", "10", "--workers", str(n_workers)]


def started(recipe: Path, out: Path, n_workers: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-W", "error", "-m", "dtem", "learn", *arguments(recipe, out, n_workers)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, env=ENVIRONMENT, start_new_session=True)


def wait_for_lines(process: "subprocess.Popen[bytes]", out: Path, n_lines: int) -> None:
    """Wait until n_lines are logged; each line of progress triggers a check."""
    assert process.stderr is not None
    while process.stderr.readline():
        log = out / "metrics.jsonl"
        if log.exists() and log.read_text().count("\n") >= n_lines:
            return
    pytest.fail(f"the run ended before it had logged {n_lines} lines")


def assert_same_run(one: Path, other: Path) -> None:
    assert logged(one) == logged(other)
    found, expected = load_file(one / "embedding.safetensors"), load_file(other / "embedding.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert (one / "weights.safetensors").read_bytes() == (other / "weights.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_ended_run_resumes_bit_identically(tmp_path: Path, number: signal.Signals, status: int) -> None:
    """As a terminal does, the signal goes to the processes that read images too."""
    recipe = write_run(tmp_path)
    assert dtem("learn", arguments(recipe, tmp_path / "whole")) == 0
    process = started(recipe, tmp_path / "ended", n_workers=1)
    wait_for_lines(process, tmp_path / "ended", 14)
    os.killpg(process.pid, number)
    process.communicate()
    assert process.returncode == status
    n_steps = torch.load(tmp_path / "ended" / "state.pt", weights_only=True)["n_steps_taken"]
    assert 10 <= n_steps < 40
    assert (n_steps % 10 == 0) or number != signal.SIGKILL
    assert dtem("learn", arguments(recipe, tmp_path / "ended", n_workers=1)) == 0
    assert_same_run(tmp_path / "ended", tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_and_resume_its_run(tmp_path: Path) -> None:
    recipe = write_run(tmp_path, mixup="", cutmix="", validation="", n_images='n_images = 64\nprecision = "float32"')
    tiny_training(tiny_recipe(recipe), tmp_path / "one").run()
    tiny_training(tiny_recipe(recipe), tmp_path / "two").run(until=3, checkpoint_every=2)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "dtem", "learn", *arguments(recipe, tmp_path / "two")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for one, two in zip(logged(tmp_path / "one"), logged(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-4), one["n_seen"]
    expected = load_file(tmp_path / "one" / "embedding.safetensors")
    found = load_file(tmp_path / "two" / "embedding.safetensors")
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("broken", ["train/bee/*.png", "val/bee/1.png"])
def test_image_that_cannot_be_read_ends_the_run_with_its_name(tmp_path: Path, broken: str, n_workers: int) -> None:
    recipe = write_run(tmp_path)
    for file in tmp_path.glob(broken):
        file.write_bytes(b"")
    process = started(recipe, tmp_path / "out", n_workers)
    _, errors = process.communicate(timeout=120)
    line = errors.decode().splitlines()[-1]
    assert process.returncode == 2
    assert re.fullmatch(r"dtem learn: .*bee/\d\.png.*", line)


@pytest.mark.slow
def test_image_that_cannot_be_read_ends_several_processes(tmp_path: Path) -> None:
    recipe = write_run(tmp_path)
    for file in tmp_path.glob("train/bee/*.png"):
        file.write_bytes(b"")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "dtem", "learn", *arguments(recipe, tmp_path / "out", 1)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode != 0
    assert len(re.findall(r"^dtem learn: training image .*/bee/\d\.png", done.stderr, re.M)) == 1
    assert "exitcode : 2" in re.sub(r"exitcode\s*:\s*", "exitcode : ", done.stderr)


def refused(capsys: pytest.CaptureFixture[str], recipe: Path, out: Path) -> str:
    assert dtem("learn", arguments(recipe, out)) == 2
    assert not (out / "state.pt").exists()
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"source": 'source = "nowhere/train"'}, "nowhere/train"),
        ({"weights": 'weights = "nowhere.safetensors"'}, "no weights file nowhere.safetensors"),
        ({"architecture": 'architecture = "vit_tinny"'}, "vit_tinny"),
        ({"randaugment": 'randaugment = "random"'}, "randaugment 'random'"),
        ({"r": "r = 12"}, "r 12: the first block can remove 8"),
        ({"mode": 'mode = "modal"'}, "mode 'modal'"),
    ],
)
def test_bad_run_is_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], replaced: dict[str, Any], message: str
) -> None:
    assert message in refused(capsys, write_run(tmp_path, **replaced), tmp_path / "out")


def test_folder_of_other_classes_than_the_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_run(tmp_path, validation="")
    (tmp_path / "train" / "dog").rename(tmp_path / "dog")
    assert "has 4 classes, the images 3" in refused(capsys, recipe, tmp_path / "out")
