"""Observability: one record per request, read by the metrics, the log and the traces."""
