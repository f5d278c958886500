"""Train by a recipe: `python -m training.cli.learn --recipe training/recipes/reference.toml --out runs/reference`."""

from __future__ import annotations

import argparse
from pathlib import Path

from training.learn.backbone import BackboneTraining
from training.learn.recipe import read_recipe


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, required=True, help="a TOML file, e.g. training/recipes/reference.toml")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; a run found there is resumed")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw images")
    options = parser.parse_args(arguments)
    BackboneTraining(read_recipe(options.recipe), options.out, n_workers=options.workers).run()


if __name__ == "__main__":
    main()
