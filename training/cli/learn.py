"""Train by a recipe, in one process or several."""

from __future__ import annotations

import sys
from argparse import Namespace

from training.learn.backbone import BackboneTraining
from training.learn.prepare import prepared
from training.learn.processes import started_processes, stop_signals
from training.learn.recipe import Recipe, read_recipe


def run(options: Namespace) -> int:
    """Return 0, or 130 where the run was stopped after a checkpoint."""
    recipe = read_recipe(options.recipe)
    if isinstance(recipe, Recipe):
        BackboneTraining(recipe, options.out, n_workers=options.workers).run()
        return 0
    with started_processes() as processes:
        training = processes.agreed(
            lambda: prepared(recipe, options.out, processes=processes, n_workers=options.workers)
        )
        if processes.is_first:
            for note in training.notes:
                print(note, file=sys.stderr)
        with stop_signals() as stop:
            if training.run(checkpoint_every=options.checkpoint_every, stop=stop):
                return 0
        if processes.is_first:
            print(f"stopped after step {training.n_steps_taken}; run the same command to resume", file=sys.stderr)
        return 130
