import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from dtem.options import FILE, as_arguments, checkpoint_options, example, rates_option
from dtem.training import describe
from training.cli.options import ModelOptions
from training.export.plan import Plan, check_plan, next_version

EXAMPLES = example(
    "dtem prepare mine.pth --data val --name mine",
    "dtem prepare mine.pth --data val --name mine --train train    (also learns what to merge)",
)

UNMERGED = "unmerged"


@click.command("prepare", epilog=EXAMPLES)
@checkpoint_options
@click.option("--name", required=True, help="name of the model, in the store and in requests")
@click.option("--train", type=FILE, help="images like those of --data, to learn DTEM's embedding from")
@click.option("--n-learn", type=click.IntRange(min=64), default=8192, help="images to learn from, repeats included")
@click.option("--max-accuracy-drop", type=float, default=1.0, help="of the adaptive policy, in points")
@click.option("--n-trials", type=click.IntRange(min=1), default=60, help="thresholds of the adaptive policy to try")
@click.option("--adaptive/--no-adaptive", default=True, help="whether to calibrate an adaptive policy")
@rates_option()
@click.option("--store", type=FILE, default=Path("model_store"))
@click.option("--device", default="cpu", help="a PyTorch device, e.g. cuda")
@click.option("--out", type=FILE, help="folder of the work; default: runs/<name>")
def command(model: ModelOptions, name: str, store: Path, out: Path | None, **options: Any) -> int:
    """From a checkpoint to a published model, in one command.

    Says what the checkpoint holds, learns what to merge (with --train), calibrates an adaptive policy, exports,
    and ends with a table and a picture. Each step is a command of its own, which is printed before it runs. The same
    command goes on where it stopped, and what is published already is not made again.
    """
    folder = out or Path("runs") / name
    try:
        model.require_data()
        _require_paths([path for path in (model.data, options["train"]) if path not in (None, "digits")])
        published = _claim_version(folder, store, name, {**options, "model": as_arguments(model)})
    except (ValueError, OSError) as error:
        raise click.UsageError(describe(error)) from error
    for step in _steps(model, folder, published, options):
        if step[0] == "export" and published.is_dir():
            continue
        click.echo(f"\n$ dtem {shlex.join(step)}")
        status = _run(step)
        if status:
            return status
    return 0


def _steps(model: ModelOptions, folder: Path, published: Path, options: dict[str, Any]) -> list[list[str]]:
    unmerged, learned, adaptive = folder / UNMERGED, folder / "dtem", folder / "adaptive"
    train, device = options["train"], ["--device", options["device"]]
    learning = ["--train", str(train), "--n-learn", str(options["n_learn"])] if train else []
    steps = [["inspect", *as_arguments(model), "--out", str(unmerged), *learning, *device]]
    if train:
        steps += [["learn", "--recipe", str(unmerged / "dtem.toml"), "--out", str(learned)]]
    chosen = ["--run", str(learned if train else unmerged), "--data", str(model.data)]
    export = ["export", *chosen, "--name", published.parent.name, "--version", published.name]
    export += ["--store", str(published.parents[1]), "--rates", ",".join(map(str, options["rates"])), *device]
    if options["adaptive"]:
        metric = ["--metric", "embedding" if train else "features", "--n-trials", str(options["n_trials"])]
        bound = ["--max-accuracy-drop", str(options["max_accuracy_drop"])]
        steps += [["calibrate", *chosen, *metric, *bound, "--out", str(adaptive), *device]]
        export += ["--calibrations", f"{adaptive}.json"]
    return [*steps, export, ["summary", str(published), "--out", str(folder / "summary")]]


def _require_paths(folders: Sequence[Any]) -> None:
    """Raises: ValueError naming a folder that does not exist"""
    for folder in folders:
        if not Path(folder).is_dir():
            raise ValueError(f"{folder} is no folder; expected one with a subfolder of images per class")


def _claim_version(folder: Path, store: Path, name: str, options: dict[str, Any]) -> Path:
    """Return the folder of the version to publish, the same one whenever the same command runs.

    Raises: ValueError where the work folder is of another command; as `Plan` and `check_plan`.
    """
    file = folder / "prepare.json"
    wanted = json.loads(json.dumps({"name": name, **options}, default=str))
    # Until the first step is done, another command may take the folder.
    if file.is_file() and (folder / UNMERGED).is_dir():
        found = json.loads(file.read_text())
        if found["options"] != wanted:
            differing = [key for key in {**found["options"], **wanted} if found["options"].get(key) != wanted.get(key)]
            raise ValueError(f"{folder} is of a command with other {', '.join(differing)}: choose another --out")
        return store / name / str(found["version"])
    version = next_version(store, name)
    check_plan(Plan(name=name, version=version, rates=options["rates"]), store)
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"version": version, "options": wanted}, indent=2) + "\n")
    return store / name / version


def _run(step: list[str]) -> int:
    # The table of commands includes this one.
    from dtem.main import main  # noqa: PLC0415

    return main(step)
