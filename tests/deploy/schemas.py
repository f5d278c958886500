"""Schemas: Kubernetes' published schemas, and one for the Prometheus Operator's ServiceMonitor."""

import jsonschema
import kubernetes_validate

from tests.deploy.manifests import Object

# The first version whose preStop hooks support `sleep`.
OLDEST = "1.30"
LATEST = kubernetes_validate.latest_version()
TEXT = {"type": "string"}
SECONDS = {"type": "string", "pattern": "^[0-9]+s$"}
# The fields in use, from the Prometheus Operator's API reference (monitoring.coreos.com/v1). Others are refused.
SERVICE_MONITOR = {
    "type": "object",
    "required": ["selector", "endpoints"],
    "additionalProperties": False,
    "properties": {
        "selector": {"type": "object", "required": ["matchLabels"]},
        "jobLabel": TEXT,
        "endpoints": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["port"],
                "additionalProperties": False,
                "properties": {
                    "port": TEXT,
                    "path": TEXT,
                    "interval": SECONDS,
                    "scrapeTimeout": SECONDS,
                    "authorization": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {"credentials": {"type": "object", "required": ["name", "key"]}},
                    },
                },
            },
        },
    },
}


def validate(item: Object, version: str) -> None:
    """Validate as the API server does, and refuse unknown fields.

    Raises: jsonschema.ValidationError.
    """
    if item["kind"] == "ServiceMonitor":
        assert item["apiVersion"] == "monitoring.coreos.com/v1"
        jsonschema.validate(item["spec"], SERVICE_MONITOR)
    else:
        kubernetes_validate.validate(item, version, strict=True)
