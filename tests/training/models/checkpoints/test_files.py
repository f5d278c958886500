"""Files that are read, and files that are refused with how to convert them."""

import argparse
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from training.models.checkpoints.files import UnreadableCheckpoint, read_checkpoint

TENSORS = {"patch_embed.proj.weight": torch.ones(4, 3, 2, 2), "head.weight": torch.arange(8.0).view(2, 4)}


def assert_read(path: Path) -> None:
    content, _ = read_checkpoint(path)
    found = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    assert {name: tensor.tolist() for name, tensor in found.items()} == {n: t.tolist() for n, t in TENSORS.items()}


def write_shards(folder: Path, ending: str, save: Callable[[dict[str, Tensor], Path], None]) -> Path:
    names = [f"part-{index}{ending}" for index in range(len(TENSORS))]
    for file, (name, tensor) in zip(names, TENSORS.items(), strict=True):
        save({name: tensor}, folder / file)
    index = folder / f"weights{ending}.index.json"
    index.write_text(json.dumps({"weight_map": dict(zip(TENSORS, names, strict=True))}))
    return index


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.ckpt", "a.bin", "weights"])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_file_is_read_by_its_content_whatever_its_name(tmp_path: Path, name: str, kind: str) -> None:
    if kind == "safetensors":
        save_file(TENSORS, tmp_path / name)
    else:
        torch.save(TENSORS, tmp_path / name, _use_new_zipfile_serialization=kind == "zip")
    assert_read(tmp_path / name)


@pytest.mark.parametrize(("ending", "save"), [(".safetensors", save_file), (".bin", torch.save)])
def test_shards_are_joined_and_a_missing_one_is_named(
    tmp_path: Path, ending: str, save: Callable[[dict[str, Tensor], Path], None]
) -> None:
    index = write_shards(tmp_path, ending, save)
    assert_read(index)
    (tmp_path / f"part-1{ending}").unlink()
    with pytest.raises(UnreadableCheckpoint, match=f"names the shard part-1{ending}, and .* has no such file"):
        read_checkpoint(index)


def test_shard_without_its_tensor_is_refused(tmp_path: Path) -> None:
    index = write_shards(tmp_path, ".safetensors", save_file)
    save_file({"other": torch.ones(1)}, tmp_path / "part-1.safetensors")
    with pytest.raises(UnreadableCheckpoint, match=r"names 1 tensors that its shards lack, such as head\.weight"):
        read_checkpoint(index)


def test_folder_gives_its_weights_or_says_why_not(tmp_path: Path) -> None:
    with pytest.raises(UnreadableCheckpoint, match="has no weights: expected safetensors"):
        read_checkpoint(tmp_path)
    torch.save({}, tmp_path / "optimizer.pt")
    torch.save(TENSORS, tmp_path / "last.pth")
    assert_read(tmp_path)
    torch.save({}, tmp_path / "best.pth")
    with pytest.raises(UnreadableCheckpoint, match=r"several weights files: best\.pth, last\.pth; give one"):
        read_checkpoint(tmp_path)
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert_read(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UnreadableCheckpoint, match="give it as --published"):
        read_checkpoint(tmp_path)


def test_objects_of_training_scripts_are_read(tmp_path: Path) -> None:
    beside = {"args": argparse.Namespace(lr=0.1, out=tmp_path), "best": np.float64(0.9), "epoch": 3}
    torch.save({**TENSORS, **beside}, tmp_path / "a.pth")
    assert_read(tmp_path / "a.pth")


def test_numbers_of_older_numpy_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({**TENSORS, "best": np.float64(0.9)}, path, _use_new_zipfile_serialization=False)
    older = path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert older != path.read_bytes()
    path.write_bytes(older)
    assert_read(path)


CONTENTS = {
    "is empty": b"",
    "is a git-lfs pointer, .* git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    "is an HTML page": b"\n<!DOCTYPE html><html><body>Sign in</body></html>",
    "is JSON text": b'{"error": "not found"}',
    "tar xf": b"\x1f\x8b\x08\x00rest",
    "transformers<5.*from_tf=True": b"\x89HDF\r\n\x1a\nrest",
    "one NumPy array": b"\x93NUMPY\x01\x00",
    "GGUF": b"GGUF\x03\x00\x00\x00",
    "ONNX graph": b"\x08\x08\x12\x07pytorch",
    r"unknown format \(first bytes 01 02 03": b"\x01\x02\x03\x04\x05\x06\x07\x08\x09",
    "header states 109 bytes, and it has 11": (101).to_bytes(8, "little") + b'{"a',
    "cut short: it starts as a PyTorch file": b"PK\x03\x04rest",
    "not a PyTorch checkpoint|cut short or damaged": b"\x80\x02}q\x00",
}


@pytest.mark.parametrize("reason", CONTENTS)
def test_file_that_is_no_checkpoint_says_what_it_looks_like(tmp_path: Path, reason: str) -> None:
    path = tmp_path / "weights"
    path.write_bytes(CONTENTS[reason])
    with pytest.raises(UnreadableCheckpoint, match=reason) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_truncated_file_is_refused_at_any_length(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    save_file(TENSORS, path) if kind == "safetensors" else torch.save(TENSORS, path)
    content = path.read_bytes()
    for length in range(1, len(content), max(1, len(content) // 40)):
        path.write_bytes(content[:length])
        with pytest.raises(UnreadableCheckpoint):
            read_checkpoint(path)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)


class Odd:
    """An object that `weights_only=True` refuses."""


def run_stated_command(message: str) -> None:
    """Run the Python of the command that a refusal states."""
    exec(message.split('python -c "')[1].rsplit('"', 1)[0], {})


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_whole_model_is_converted_by_the_stated_command(tmp_path: Path, is_wrapped: bool) -> None:
    path, model = tmp_path / "whole.pth", Model()
    torch.save({"model": model} if is_wrapped else model, path)
    with pytest.raises(UnreadableCheckpoint, match=r"a whole pickled model \(.*runs code when it is read") as error:
        read_checkpoint(path)
    run_stated_command(str(error.value))
    assert set(read_checkpoint(tmp_path / "whole-state.pth")[0]) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("is_zip", [True, False])
def test_checkpoint_with_odd_objects_is_converted_by_the_stated_command(tmp_path: Path, is_zip: bool) -> None:
    path = tmp_path / "odd.ckpt"
    torch.save(
        {"state_dict": TENSORS, "callbacks": {"a": Odd()}, "epoch": 1}, path, _use_new_zipfile_serialization=is_zip
    )
    with pytest.raises(UnreadableCheckpoint, match=r"Python objects beside its tensors \(.*Odd") as error:
        read_checkpoint(path)
    run_stated_command(str(error.value))
    assert set(read_checkpoint(tmp_path / "odd-state.pth")[0]["state_dict"]) == set(TENSORS)


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_converted_by_the_stated_command(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.script(nn.Linear(4, 2)), path)
    with pytest.raises(UnreadableCheckpoint, match="is a TorchScript archive; convert it") as error:
        read_checkpoint(path)
    run_stated_command(str(error.value))
    assert set(read_checkpoint(tmp_path / "script-state.pth")[0]) == {"weight", "bias"}


def test_archives_of_other_kinds_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "jax.npz", a=np.ones(2))
    with pytest.raises(UnreadableCheckpoint, match=r"NumPy archive, as of JAX; .*load_pretrained"):
        read_checkpoint(tmp_path / "jax.npz")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "weights are inside")
    with pytest.raises(UnreadableCheckpoint, match=r"a zip archive \(readme.txt\): unpack it"):
        read_checkpoint(tmp_path / "a.zip")


def test_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*nowhere\.pth"):
        read_checkpoint(tmp_path / "nowhere.pth")
