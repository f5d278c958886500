"""The plan of an export from its options, refused before PyTorch is imported. Standard library only."""

from __future__ import annotations

from argparse import Namespace

from training.export.plan import Plan, check_plan, next_version


def plan_of(options: Namespace) -> Plan:
    return Plan(
        name=options.name,
        version=options.version or next_version(options.store, options.name),
        rates=options.rates,
        default_r=options.default_r,
        default_policy=options.default_policy,
        formats=tuple(options.formats.split(",")),
        precisions=tuple(options.precisions.split(",")),
        parity_tolerance=options.tolerance,
        device=options.device,
    )


def check(options: Namespace) -> None:
    """Raises: as `Plan` and `check_plan`"""
    check_plan(plan_of(options), options.store)
