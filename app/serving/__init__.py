"""Serving: from image files to results, with a bound on every queue."""
