"""Datasets: the reference task, drawn on demand, and folders of image files."""
