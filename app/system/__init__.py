"""System: resource limits and memory of the process."""
