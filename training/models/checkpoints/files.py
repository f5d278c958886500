"""Files of checkpoints: what is read, and what is refused with how to convert it.

A format is recognised by its first bytes; names decide only where bytes do not.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import pickle
import pickletools
import shlex
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from training.models.weights import WeightsMismatch

PREFERRED = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model.pth",
    "model.pth",
)
"""Names of weights in a folder of Hugging Face or timm, best first."""
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
_NOT_WEIGHTS = {"training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth"}
_FOREIGN = {
    "flax_model.msgpack": "from_flax",
    "tf_model.h5": "from_tf",
}
_ACCEPTED = "expected safetensors or a PyTorch state dict (.safetensors, .pth, .pt, .bin, .ckpt, or a folder of these)"
_numpy_scalar = np.float64(0).__reduce__()[0]
_SAFE: list[Any] = [
    argparse.Namespace,
    pathlib.PosixPath,
    pathlib.PurePosixPath,
    np.dtype,
    np.dtypes.Float64DType,
    np.dtypes.Float32DType,
    np.dtypes.Int64DType,
    type(np.float64(0)),
    _numpy_scalar,
    (_numpy_scalar, "numpy.core.multiarray.scalar"),  # its name before NumPy 2
]
"""Classes beside tensors that training scripts save, and that run no code when they are read."""


class UnreadableCheckpoint(WeightsMismatch):
    """The checkpoint cannot be read; the message says what it looks like and how to convert it."""


def read_checkpoint(path: Path) -> tuple[dict[str, Any], Path]:
    """Return the nested content of a checkpoint, and the file that it comes from.

    path: a file, an index of shards, or a folder with one of them.
    Raises: FileNotFoundError; UnreadableCheckpoint.
    """
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}: expected a file or a folder")
    file = _file_of(path) if path.is_dir() else path
    if file.name.endswith(".index.json"):
        return _read_shards(file), file
    return _read_file(file), file


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON object, empty where there is no file. Raises: UnreadableCheckpoint"""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as err:
        raise UnreadableCheckpoint(f"{path} is not JSON: {err}") from err
    if not isinstance(content, dict):
        raise UnreadableCheckpoint(f"{path}: expected a JSON object, not {type(content).__name__}")
    return content


def _file_of(folder: Path) -> Path:
    for name, option in (("recipe.json", "--run"), ("manifest.json", "--published")):
        if (folder / name).is_file():
            raise UnreadableCheckpoint(f"{folder} is a folder of this project ({name}): give it as {option}")
    for name in PREFERRED:
        if (folder / name).is_file():
            return folder / name
    found = sorted(
        path
        for path in folder.iterdir()
        if (path.suffix in _SUFFIXES or path.name.endswith(".index.json")) and path.name not in _NOT_WEIGHTS
    )
    if len(found) == 1:
        return found[0]
    if found:
        raise UnreadableCheckpoint(
            f"{folder} has several weights files: {', '.join(path.name for path in found[:5])}; give one of them"
        )
    for name, argument in _FOREIGN.items():
        if (folder / name).is_file():
            raise UnreadableCheckpoint(
                f"{folder} has no PyTorch weights, only {name}: {_from_foreign(folder, argument)}"
            )
    if any(folder.glob("*.distcp")):
        out = shlex.quote(f"{folder}.pth")
        raise UnreadableCheckpoint(
            f"{folder} is a distributed checkpoint of PyTorch; convert it: "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {shlex.quote(str(folder))} {out}"
        )
    raise UnreadableCheckpoint(f"{folder} has no weights: {_ACCEPTED}")


def _read_shards(index: Path) -> dict[str, Any]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UnreadableCheckpoint(f"{index} has no weight_map: it is not an index of shards")
    content: dict[str, Any] = {}
    for name in sorted(set(map(str, weight_map.values()))):
        shard = index.parent / name
        if Path(name).name != name or not shard.is_file():
            raise UnreadableCheckpoint(f"{index} names the shard {name}, and {index.parent} has no such file")
        content |= _read_file(shard)
    if missing := sorted(set(weight_map) - set(content)):
        raise UnreadableCheckpoint(f"{index} names {len(missing)} tensors that its shards lack, such as {missing[0]}")
    return content


def _read_file(path: Path) -> dict[str, Any]:
    head = _first_bytes(path, 512)
    if reason := _plain_reason(path, head):
        raise UnreadableCheckpoint(f"{path} {reason}")
    if head[8:9] == b"{":
        return _read_safetensors(path, head)
    if head.startswith(b"PK\x03\x04"):
        _check_zip(path)
        return _read_torch(path)
    if head.startswith(b"\x80"):
        return _read_torch(path)
    raise UnreadableCheckpoint(f"{path} is of an unknown format (first bytes {head[:8].hex(' ')}): {_ACCEPTED}")


def _plain_reason(path: Path, head: bytes) -> str | None:
    """Return why a file cannot be read, as far as its first bytes and its name tell."""
    start = head.lstrip().lower()
    is_onnx = path.suffix == ".onnx" or (head[:1] == b"\x08" and head[2:3] == b"\x12" and path.suffix not in _SUFFIXES)
    is_archive = head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ")) or head[257:262] == b"ustar"
    reasons = (
        (not head, "is empty (0 bytes): copy or download it again"),
        (
            head.startswith(b"version https://git-lfs"),
            f"is a git-lfs pointer, not the weights: run git lfs pull in {path.parent}",
        ),
        (
            start.startswith((b"<!doctype html", b"<html", b"<?xml")),
            "is an HTML page, such as a login or an error page: download the file itself",
        ),
        (start.startswith((b"{", b"[")), "is JSON text, not weights: give the weights file or its folder"),
        (is_archive, f"is a compressed or tar archive: unpack it first (tar xf {shlex.quote(str(path))})"),
        (head.startswith(b"\x89HDF"), f"is a Keras or HDF5 file: {_from_foreign(path.parent, 'from_tf')}"),
        (path.suffix == ".msgpack", f"is a Flax file: {_from_foreign(path.parent, 'from_flax')}"),
        (head.startswith(b"\x93NUMPY"), f"is one NumPy array: {_ACCEPTED}"),
        (head.startswith(b"GGUF"), f"is a GGUF file of llama.cpp: {_ACCEPTED}"),
        (
            head[4:8] == b"TFL3" or path.suffix == ".pb",
            f"is a TensorFlow graph, without the names of the weights: {_ACCEPTED}",
        ),
        (
            is_onnx,
            "is an ONNX graph, whose weights have lost their names: give the checkpoint that it was exported from",
        ),
    )
    return next((reason for is_so, reason in reasons if is_so), None)


def _from_foreign(folder: Path, argument: str) -> str:
    source, target = str(folder), f"{folder}-pytorch"
    command = (
        f"from transformers import ViTForImageClassification as V; "
        f"V.from_pretrained({source!r}, {argument}=True).save_pretrained({target!r})"
    )
    return f'convert it in an environment with transformers<5: python -c "{command}"'


def _read_safetensors(path: Path, head: bytes) -> dict[str, Any]:
    n_bytes, n_header = path.stat().st_size, int.from_bytes(head[:8], "little")
    try:
        if 8 + n_header <= n_bytes:
            header = json.loads(_first_bytes(path, 8 + n_header)[8:])
            entries = [entry for name, entry in header.items() if name != "__metadata__"]
            end = 8 + n_header + max((entry["data_offsets"][1] for entry in entries), default=0)
        else:
            end = 8 + n_header
        if end > n_bytes:
            raise UnreadableCheckpoint(
                f"{path} is cut short: header states {end:,} bytes, and it has {n_bytes:,}; copy or download it again"
            )
        return dict(load_file(path))
    except (SafetensorError, OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as err:
        raise UnreadableCheckpoint(f"{path} is not a valid safetensors file: {err}") from err


def _check_zip(path: Path) -> None:
    """Raises: UnreadableCheckpoint for archives that are not those of `torch.save`."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as err:
        raise UnreadableCheckpoint(
            f"{path} is cut short: it starts as a PyTorch file and has no end; copy or download it again"
        ) from err
    target = str(_beside(path, "-state.pth"))
    if any(name.endswith("/constants.pkl") for name in names):
        command = f"import torch; torch.save(torch.jit.load({str(path)!r}, 'cpu').state_dict(), {target!r})"
        raise UnreadableCheckpoint(f'{path} is a TorchScript archive; convert it: python -c "{command}"')
    if any(name.endswith(("archive_format", "archive_version", "serialized_exported_program.json")) for name in names):
        command = f"import torch; torch.save(torch.export.load({str(path)!r}).state_dict, {target!r})"
        raise UnreadableCheckpoint(f'{path} is an exported program of PyTorch; convert it: python -c "{command}"')
    if all(name.endswith(".npy") for name in names):
        command = (
            f"import timm, torch; m = timm.create_model('NAME', num_classes=N); m.load_pretrained({str(path)!r}); "
            f"torch.save(m.state_dict(), {target!r})"
        )
        raise UnreadableCheckpoint(
            f"{path} is a NumPy archive, as of JAX; convert it with timm's name and the number of classes: "
            f'python -c "{command}"'
        )
    if any(name.endswith(".weights.h5") for name in names):
        raise UnreadableCheckpoint(f"{path} is a Keras file: {_from_foreign(path.parent, 'from_tf')}")
    if not any(name.endswith("data.pkl") for name in names):
        raise UnreadableCheckpoint(f"{path} is a zip archive ({', '.join(names[:3])}): unpack it first")


def _read_torch(path: Path) -> dict[str, Any]:
    try:
        # An open file: for a path, torch.load trusts the suffix.
        with path.open("rb") as file, torch.serialization.safe_globals(_SAFE), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as err:
        raise UnreadableCheckpoint(_refused_pickle(path, err)) from err
    except (EOFError, OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as err:
        raise UnreadableCheckpoint(
            f"{path} is cut short or damaged ({_first_line(err)}); copy or download it again"
        ) from err
    if not isinstance(content, dict):
        raise UnreadableCheckpoint(f"{path} holds a {type(content).__name__}, not a state dict: {_ACCEPTED}")
    return content


def _refused_pickle(path: Path, err: Exception) -> str:
    unknown = list(_unsafe_globals(path))
    if not unknown:
        return f"{path} is not a PyTorch checkpoint: {_first_line(err)}"
    source, target = str(path), str(_beside(path, "-state.pth"))
    named = ", ".join(unknown[:3]) + (", …" if len(unknown) > 3 else "")
    load = f"import torch; c = torch.load({source!r}, map_location='cpu', weights_only=False)"
    if any(name.startswith("torch.nn.") for name in unknown):
        kind = "a whole pickled model"
        keep = "m = c['model'] if isinstance(c, dict) else c; " + f"torch.save(m.state_dict(), {target!r})"
    else:
        kind = "a checkpoint with Python objects beside its tensors"
        is_kept = "torch.is_tensor(v) or isinstance(v, dict) and v and all(map(torch.is_tensor, v.values()))"
        keep = f"torch.save({{k: v for k, v in c.items() if {is_kept}}}, {target!r})"
    return (
        f"{path} is {kind} ({named}), which runs code when it is read; if you trust it, convert it: "
        f'python -c "{load}; {keep}"'
    )


def _unsafe_globals(path: Path) -> Iterator[str]:
    known = {entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}" for entry in _SAFE}
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # noqa: BLE001 - of a damaged or an old file; the names only explain the refusal
        found = _legacy_globals(path)
    yield from (name for name in found if name not in known)


def _legacy_globals(path: Path) -> list[str]:
    """Return the classes that a pickle names, without reading it."""
    names: list[str] = []
    with path.open("rb") as reader:
        try:
            while True:
                for opcode, argument, _ in pickletools.genops(reader):
                    if opcode.name == "GLOBAL" and not str(argument).startswith(("torch._utils", "collections")):
                        names.append(str(argument).replace(" ", "."))
        except Exception:  # noqa: BLE001 - tensors follow the last pickle
            return names


def _first_bytes(path: Path, n: int) -> bytes:
    with path.open("rb") as file:
        return file.read(n)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.stem + ending)


def _first_line(err: Exception) -> str:
    return (str(err).strip().splitlines() or [type(err).__name__])[0][:120]
