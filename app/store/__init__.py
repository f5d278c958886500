"""Store: find, verify, load and watch model versions on disk, and select a variant for a request."""
