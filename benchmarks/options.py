"""Types of command-line options that several benchmarks share."""

from __future__ import annotations

import argparse

OWN_SETTINGS = ("host", "port", "model_store")


def positive_integer(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 1")
    return value


def positive_number(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")
    return value


def positive_numbers(text: str) -> list[float]:
    """Parse `0.5,1,2`."""
    return [positive_number(part) for part in text.split(",")]


def integers(text: str) -> list[int]:
    """Parse `1,8`."""
    return [int(part) for part in text.split(",")]


def add_setting_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--setting",
        type=read_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the service, e.g. max_batch_images=16; may be repeated",
    )


def read_setting(text: str) -> tuple[str, str]:
    """Parse one setting.

    Raises: argparse.ArgumentTypeError for a malformed setting, or one that the benchmark sets.
    """
    name, equals, value = text.partition("=")
    name = name.strip().lower().removeprefix("dtem_")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=VALUE, e.g. max_batch_images=16")
    if name in OWN_SETTINGS:
        raise argparse.ArgumentTypeError(f"{name} is set by the benchmark, as are {', '.join(OWN_SETTINGS)}")
    return name, value.strip()
