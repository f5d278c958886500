"""The error of a measurement that would mislead."""


class MeasurementError(Exception):
    """No valid measurement was possible. The message is for the person who runs the benchmark."""
