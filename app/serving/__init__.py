"""Serving: from decoded requests to results, with bounds on everything that waits."""
