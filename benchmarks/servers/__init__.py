"""Model stores for the servers under measurement."""
