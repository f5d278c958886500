"""Commands: `python -m training.cli.<name>`."""
