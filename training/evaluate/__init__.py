"""Evaluation: accuracy with its interval, GMACs and speed, for any policy at any rate."""
