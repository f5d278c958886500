"""The service: loads graphs from the model store and answers requests. Knows nothing of training."""

__version__ = "0.1.0"
