"""A model store built in milliseconds: linear graphs in both formats, whose logits numpy can check.

The graph of rate r is `mean over pixels -> (3,) -> matrix`, plus a bias that differs by rate. The graph of policy atm
has the bias of rate `ATM_BIAS`, and merges more tokens in brighter images.
"""

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

SIDE = 8
LABELS = ["red", "green", "blue"]
RATES = {"none": [0], "tome": [0, 8, 16]}
WEIGHT = np.array([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 4.0]], np.float32)
WEIGHTS_FILE = "weights.safetensors"
DEPTH, N_TOKENS = 2, 65
ATM_BIAS = 4
PROMISE = "batch-invariant"


def expected_logits(pixels: NDArray[np.uint8], r: int) -> NDArray[np.float32]:
    """Shapes: (B, H, W, 3) -> (B, 3)."""
    means = pixels.astype(np.float32).mean(axis=(1, 2)) / np.float32(255)
    return np.asarray(means @ WEIGHT + bias_of(r), np.float32)


def expected_costs(pixels: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the tokens and GMACs of policy atm. Shapes: (B, H, W, 3) -> (B, DEPTH + 1), (B,)."""
    merged = (pixels.astype(np.float32).mean(axis=(1, 2, 3)) / np.float32(255) * np.float32(30)).astype(np.int64)
    tokens = N_TOKENS - merged[:, None] * np.arange(DEPTH + 1)
    return tokens, tokens.sum(axis=1).astype(np.float32) / np.float32(N_TOKENS * (DEPTH + 1))


def bias_of(r: int) -> NDArray[np.float32]:
    return np.asarray(np.arange(3) * (r / 100), np.float32)


def write_store(root: Path, name: str = "tiny", version: str = "1", formats: tuple[str, ...] = ("onnx",)) -> Path:
    """Write <root>/<name>/<version> and return that folder."""
    folder = root / name / version
    folder.mkdir(parents=True)
    (folder / WEIGHTS_FILE).write_bytes(WEIGHT.tobytes())
    rates = sorted({r for policy in RATES.values() for r in policy})
    for r in rates:
        if "onnx" in formats:
            (folder / f"tome-r{r}.onnx").write_bytes(make_graph(r).SerializeToString())
        if "torchscript" in formats:
            importlib.import_module("tests.app.tiny_torchscript").write_graph(folder / f"tome-r{r}.pt", r)
    if "onnx" in formats:
        (folder / "atm.onnx").write_bytes(make_adaptive_graph().SerializeToString())
    if "torchscript" in formats:
        importlib.import_module("tests.app.tiny_torchscript").write_adaptive_graph(folder / "atm.pt")
    write_golden(folder)
    write_manifest(folder, make_manifest(folder, formats))
    return folder


def make_graph(r: int) -> onnx.ModelProto:
    """Make the ONNX graph of a rate; its matrix is in the weights file."""
    weight = numpy_helper.from_array(WEIGHT, "weight")
    external = {"location": WEIGHTS_FILE, "offset": "0", "length": str(WEIGHT.nbytes)}
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in external.items():
        weight.external_data.add(key=key, value=value)
    bias = numpy_helper.from_array(bias_of(r), "bias")
    axes = numpy_helper.from_array(np.array([1, 2], np.int64), "axes")
    scale = numpy_helper.from_array(np.array(255, np.float32), "scale")
    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats", "axes"], ["means"], keepdims=0),
        helper.make_node("Div", ["means", "scale"], ["scaled"]),
        helper.make_node("MatMul", ["scaled", "weight"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["logits"]),
    ]
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", SIDE, SIDE, 3])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])
    graph = helper.make_graph(nodes, "tiny", [pixels], [logits], [weight, bias, axes, scale])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def make_adaptive_graph() -> onnx.ModelProto:
    """Make the graph of policy atm: that of a rate, with token counts and GMACs as further outputs."""
    model = make_graph(ATM_BIAS)
    constants: dict[str, NDArray[Any]] = {
        "most": np.array(30, np.float32),
        "channels": np.array([1], np.int64),
        "steps": np.arange(DEPTH + 1),
        "all": np.array(N_TOKENS),
        "unmerged": np.array(N_TOKENS * (DEPTH + 1), np.float32),
    }
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    model.graph.node.extend(
        [
            helper.make_node("ReduceMean", ["scaled", "channels"], ["brightness"]),
            helper.make_node("Mul", ["brightness", "most"], ["share"]),
            helper.make_node("Cast", ["share"], ["merged"], to=TensorProto.INT64),
            helper.make_node("Mul", ["merged", "steps"], ["gone"]),
            helper.make_node("Sub", ["all", "gone"], ["tokens"]),
            helper.make_node("ReduceSum", ["tokens", "channels"], ["total"], keepdims=0),
            helper.make_node("Cast", ["total"], ["floating"], to=TensorProto.FLOAT),
            helper.make_node("Div", ["floating", "unmerged"], ["gmacs"]),
        ]
    )
    tokens = helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", DEPTH + 1])
    gmacs = helper.make_tensor_value_info("gmacs", TensorProto.FLOAT, ["batch"])
    model.graph.output.extend([tokens, gmacs])
    return model


def write_golden(folder: Path, error: float = 0.0) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, SIDE, SIDE, 3), np.uint8)
    pairs = [(policy, r) for policy, rates in RATES.items() for r in rates]
    logits: dict[str, Any] = {f"logits/{policy}-r{r}": expected_logits(pixels, r) + error for policy, r in pairs}
    tokens, gmacs = expected_costs(pixels)
    logits["logits/atm"] = expected_logits(pixels, ATM_BIAS) + error
    arrays = {**{k: v.astype(np.float32) for k, v in logits.items()}, "tokens/atm": tokens, "gmacs/atm": gmacs}
    np.savez(folder / "golden.npz", pixels=pixels, **arrays)


def make_manifest(folder: Path, formats: tuple[str, ...] = ("onnx",)) -> dict[str, Any]:
    """Describe the files of a folder."""
    variants = [
        make_variant(policy, r, graph_format) for graph_format in formats for policy in RATES for r in RATES[policy]
    ]
    variants += [make_adaptive_variant(graph_format) for graph_format in formats]
    return {
        "schema_version": 1,
        "name": folder.parent.name,
        "version": folder.name,
        "architecture": {
            "timm_name": "vit_tiny_patch16_224",
            "timm_arguments": {"img_size": SIDE, "patch_size": 1},
            "depth": DEPTH,
            "width": 3,
            "n_tokens": N_TOKENS,
            "n_protected": 1,
        },
        "labels": LABELS,
        "training": {"dataset": "none", "recipe": "none", "licence": "MIT", "credits": ["nobody"]},
        "git_commit": "0" * 40,
        "created": "2026-11-20T12:00:00Z",
        "input": make_input(),
        "output": {"name": "logits", "dtype": "float32", "tokens": "tokens", "gmacs": "gmacs"},
        "files": {path.name: digest(path) for path in sorted(folder.iterdir()) if path.name != "manifest.json"},
        "variants": variants,
        "golden": {"file": "golden.npz", "atol": 0.001},
        "default": {"policy": "tome", "r": 8},
    }


def make_input(side: int = SIDE) -> dict[str, Any]:
    return {
        "name": "pixels",
        "layout": "NHWC",
        "dtype": "uint8",
        "height": side,
        "width": side,
        "resize_shorter_side": side,
        "crop": "center",
        "interpolation": "bicubic",
        "jpeg_draft_scale": 2,
        "alpha_background": [255, 255, 255],
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }


def make_variant(policy: str, r: int, graph_format: str) -> dict[str, Any]:
    is_onnx = graph_format == "onnx"
    return {
        "id": f"{policy}-r{r}-float32-{graph_format}",
        "policy": policy,
        "r": r,
        "precision": "float32",
        "format": graph_format,
        "file": f"tome-r{r}.{'onnx' if is_onnx else 'pt'}",
        "requires": [WEIGHTS_FILE] if is_onnx else [],
        "opset": 18 if is_onnx else None,
        "schedule": [r] * DEPTH,
        "tokens": [N_TOKENS - i * r for i in range(DEPTH + 1)],
        "gmacs": 1.0 - r / 50,
        "data_dependent": False,
        "accuracy": make_accuracy() if policy == "tome" else None,
    }


def make_adaptive_variant(graph_format: str) -> dict[str, Any]:
    return {
        **make_variant("atm", ATM_BIAS, graph_format),
        "id": f"atm-float32-{graph_format}",
        "r": None,
        "file": f"atm.{'onnx' if graph_format == 'onnx' else 'pt'}",
        "gmacs": 0.7,
        "gmacs_spread": {"p5": 0.5, "p95": 0.9},
        "data_dependent": True,
        "promise": PROMISE,
    }


def make_accuracy() -> dict[str, Any]:
    interval = [0.966, 0.973]
    return {
        "top1": 0.97,
        "dataset": "tiny",
        "split": "test",
        "n_images": 10000,
        "ci95": interval,
        "date": "2026-11-20",
    }


def digest(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return manifest
