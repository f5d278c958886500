"""Evaluation: accuracy with its interval, compute and speed, for any policy at any rate."""
