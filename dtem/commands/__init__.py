"""Commands: one module each, with the options; what they do is in `training.cli` or in `app`."""
