"""Wrong uses of `dtem`, each with what its one line says. `python -m tests.dtem.wrong_uses` times them as processes.

Every use runs in the folder that `make_workspace` makes.
"""

import shlex
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from training.models.vit import load_vit

# An input of 64 pixels in patches of 16: 17 tokens.
ARGUMENTS = '{"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}'
TINY = f"--architecture vit_tiny_patch16_224 --arguments '{ARGUMENTS}'"
ANY = TINY.replace(', "num_classes": 5', "")
MODEL = f"{TINY} --weights five.pth --data five"
EXPORT = "export --name tiny --store store"
RECIPE = """
kind = "dtem"
mode = "modular"
seed = 0
r = 2
n_images = 64
batch_size = 32
[model]
architecture = "vit_tiny_patch16_224"
arguments = { img_size = 64, embed_dim = 32, depth = 2, num_heads = 2, num_classes = 5 }
weights = "five.safetensors"
[data]
source = "SOURCE"
[embedding]
learning_rate = [1e-3, 1e-5]
weight_decay = 0.0
clip_norm = 1.0
"""

# Arguments, and a part of the line on standard error.
WRONG_USES: dict[str, tuple[str, str]] = {
    "unknown command": ("exprt", "No such command 'exprt'"),
    "unknown option": (f"{EXPORT} {MODEL} --ratse 0", "No such option '--ratse'"),
    "no name": (f"export {MODEL}", "Missing option '--name'"),
    "name in capitals": (f"export --name Pets --store store {MODEL}", "name 'Pets': expected lower-case letters"),
    "version that is no number": (f"{EXPORT} {MODEL} --version v1", "version 'v1': expected a whole number"),
    "version that exists": ("export --name taken --version 1 --store store " + MODEL, "versions are immutable"),
    "store that is a file": (f"export --name tiny --store five.pth {MODEL}", "is not a folder"),
    "rates that are no numbers": (f"{EXPORT} {MODEL} --rates 0,a", "expected rates such as 0,8,16"),
    "default rate that is not exported": (
        f"{EXPORT} {MODEL} --rates 0,4 --default-r 8",
        "default_r 8: expected",
    ),
    "rate too high for the model": (f"{EXPORT} {MODEL} --rates 0,9", "cannot remove r=9 of 17 tokens"),
    "unknown format": (f"{EXPORT} {MODEL} --formats tflite", "format tflite"),
    "unknown precision": (f"{EXPORT} {MODEL} --precisions int3", "precision int3"),
    "unknown policy": (f"{EXPORT} {MODEL} --rates 0,4 --default-policy magic", "default_policy magic: expected one of"),
    "negative tolerance": (f"{EXPORT} {MODEL} --tolerance -1", "parity_tolerance -1.0: expected a number above 0"),
    "no data": (f"{EXPORT} {TINY} --weights five.pth", "--data"),
    "data that does not exist": (f"{EXPORT} {TINY} --weights five.pth --data nowhere", "nowhere is no folder"),
    "data without images": (f"{EXPORT} {TINY} --weights five.pth --data empty", "has no subfolder with images"),
    "more classes than outputs": (
        f"{EXPORT} {TINY} --weights five.pth --data six",
        "6 classes, the model 5 outputs",
    ),
    "fewer classes than outputs": (
        f"{EXPORT} {TINY} --weights five.pth --data two",
        "2 classes, the model 5 outputs",
    ),
    "folder that no label names": (f"{EXPORT} {MODEL} --labels labels.txt", "folders that no label names: e"),
    "corrupt image": (f"{EXPORT} {TINY} --weights five.pth --data corrupt --rates 0,4", "corrupt/c/0.png"),
    "no such weights": (f"{EXPORT} {TINY} --weights nowhere.pth --data five", "nowhere.pth"),
    "pointer of Git LFS": (f"{EXPORT} {TINY} --weights lfs.safetensors --data five", "git lfs pull"),
    "page instead of weights": (f"{EXPORT} {TINY} --weights page.pth --data five", "HTML"),
    "truncated weights": (f"{EXPORT} {TINY} --weights cut.safetensors --data five", "cut.safetensors"),
    "TorchScript instead of weights": (f"{EXPORT} {TINY} --weights script.pt --data five", "TorchScript"),
    "pickled model": (f"{EXPORT} {TINY} --weights pickled.pth --data five", "pickled.pth"),
    "weights of another shape": (f"{EXPORT} {TINY} --weights wide.pth --data five", "wide.pth"),
    "misspelt architecture": (f"{EXPORT} --architecture vit_tinny --weights five.pth --data five", "vit_tin"),
    "architecture that cannot merge": (
        f"{EXPORT} --architecture swin_tiny_patch4_window7_224 --weights five.pth --data five",
        "cannot merge tokens",
    ),
    "mean of 0 to 255": (f"{EXPORT} {MODEL} --mean 123.7,116.3,103.5", "expected three numbers from 0 to 1"),
    "mean of two channels": (f"{EXPORT} {MODEL} --mean 0.5,0.5", "expected three numbers"),
    "crop share above 1": (f"{EXPORT} {MODEL} --crop-pct 2", "crop_pct 2.0: expected a number above 0 and at most 1"),
    "arguments that are no JSON": (f"{EXPORT} --weights five.pth --data five --arguments '{{'", "is no JSON"),
    "softmax over one output": (f"{EXPORT} {ANY} --weights one.pth --data two", "expected activation sigmoid"),
    "device that is not there": (f"evaluate {MODEL} --device cuda:99 --out out", "--device cuda:99: expected cpu"),
    "device of an export that is not there": (f"{EXPORT} {MODEL} --device cuda:99", "cuda:99: expected cpu"),
    "run that is none": ("evaluate --run five --data five --out out", "five/recipe.json: No such file"),
    "two models": (f"evaluate {MODEL} --published store/taken/1 --out out", "expected exactly one of"),
    "calibration on too few images": (f"calibrate {MODEL} --n-images 9 --n-unseen 9 --out out", "has 10 images"),
    "file to compare that is missing": ("compare nowhere.json --out out", "nowhere.json"),
    "summary of no version": ("summary five", "five/manifest.json"),
    "recipe that is missing": ("learn --recipe nowhere.toml --out run", "nowhere.toml: No such file"),
    "misspelt key of a recipe": ("learn --recipe misspelt.toml --out run", "did you mean 'learning_rate'"),
    "corrupt training image": ("learn --recipe corrupt.toml --out run --workers 1", "corrupt/c/0.png"),
    "port that is none": ("serve --port 70000", "70000 is not in the range"),
    "store to serve that is missing": ("serve --store nowhere", "nowhere"),
}


def make_workspace(folder: Path) -> None:
    torch.manual_seed(0)
    for name, classes, n_images in (
        ("five", "abcde", 2),
        ("six", "abcdef", 1),
        ("two", "ab", 1),
        ("corrupt", "abcde", 2),
    ):
        for label in classes:
            for index in range(n_images):
                path = folder / name / label / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.effect_noise((80, 64), 60).convert("RGB").save(path)
    (folder / "corrupt/c/0.png").write_bytes(b"no image")
    for name in ("empty/a", "store/taken/1"):
        (folder / name).mkdir(parents=True)
    (folder / "labels.txt").write_text("a\nb\nc\nd\nx\n")
    vit = _vit(num_classes=5)
    torch.save({"model": vit.state_dict()}, folder / "five.pth")
    save_file(vit.state_dict(), folder / "five.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "five.safetensors").read_bytes()[:-1000])
    torch.save(_vit(num_classes=1).state_dict(), folder / "one.pth")
    torch.save(_vit(num_classes=5, embed_dim=48).state_dict(), folder / "wide.pth")
    torch.save(torch.nn.Linear(2, 2), folder / "pickled.pth")
    with warnings.catch_warnings():
        # TorchScript is deprecated, but such files exist.
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), folder / "script.pt")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "0" + "\nsize 22883440\n"
    (folder / "lfs.safetensors").write_text(pointer)
    (folder / "page.pth").write_text("<!DOCTYPE html><html><body>Sign in</body></html>")
    (folder / "misspelt.toml").write_text(RECIPE.replace("SOURCE", "five").replace("learning_rate", "lerning_rate"))
    (folder / "corrupt.toml").write_text(RECIPE.replace("SOURCE", "corrupt"))


def _vit(**arguments: Any) -> torch.nn.Module:
    return load_vit("vit_tiny_patch16_224", img_size=64, **{"embed_dim": 32, "depth": 2, "num_heads": 2, **arguments})


def main() -> None:
    print("| use | status | line | s |\n|---|---:|---|---:|")
    with tempfile.TemporaryDirectory() as name:
        make_workspace(Path(name))
        for use, (arguments, _) in WRONG_USES.items():
            start = time.perf_counter()
            command = [sys.executable, "-m", "dtem", *shlex.split(arguments)]
            done = subprocess.run(command, cwd=name, capture_output=True, text=True, check=False)
            seconds = time.perf_counter() - start
            line = done.stderr.strip().replace("\n", " ⏎ ").replace("|", "\\|")
            print(f"| {use} | {done.returncode} | {line} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
