"""Grafana: the dashboard as code, and what its service is provisioned with.

The builder warns of its older models, when they are imported first: here. Ours, the classic one, is what Grafana's
provisioning from files reads.
"""

import warnings

with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
    import grafana_foundation_sdk.builders.dashboard
    import grafana_foundation_sdk.builders.heatmap  # noqa: F401
