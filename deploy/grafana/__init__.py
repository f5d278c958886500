"""Grafana: the dashboard as code, and its provisioning. `python -m deploy.grafana` writes both generated files.

A new panel is one entry in `traffic.py` or `state.py`.
"""

import warnings

# The SDK warns about its classic dashboard model when the models are imported before the builders. Grafana's file
# provisioning reads the classic model, so the builders are imported here, first.
with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
    import grafana_foundation_sdk.builders.dashboard
    import grafana_foundation_sdk.builders.heatmap  # noqa: F401
