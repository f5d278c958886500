import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from app.errors import SettingsError
from app.settings import Settings
from tests.integration.server import ROOT

with warnings.catch_warnings():
    # Ray triggers pydantic warnings on import.
    warnings.simplefilter("ignore")
    from ray.serve.schema import ServeDeploySchema

    from deploy.ray.application import Arguments, build
    from deploy.ray.replica import refuse_unsupported


def deployment(**arguments: Any) -> Any:
    return build(Arguments.model_validate(arguments))._bound_deployment


def test_deployment_is_sized_by_the_settings() -> None:
    settings = {
        "DTEM_MAX_CONCURRENT_BATCHES": "3",
        "DTEM_MAX_BATCH_IMAGES": "4",
        "DTEM_MAX_IN_FLIGHT_IMAGES": "100",
        "OTEL_SERVICE_NAME": "x",
    }
    made = deployment(num_cpus=5, min_replicas=2, max_replicas=7, settings=settings, autoscaling={"upscale_delay_s": 9})
    environment = made.ray_actor_options["runtime_env"]["env_vars"]
    assert made.ray_actor_options["num_cpus"] == 5
    assert environment["DTEM_N_THREADS"] == "5"
    assert Path(environment["DTEM_MODEL_STORE"]).is_absolute()
    assert environment.items() >= settings.items()
    assert made.max_ongoing_requests == 200
    scaling = made._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 7, 12)
    assert scaling.upscale_delay_s == 9


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"settings": {"DTEM_MAX_CONCURRENT_BATCH": "3"}}, SettingsError, "DTEM_MAX_CONCURRENT_BATCH: no such setting"),
        ({"settings": {"DTEM_DEVICE": "tpu"}}, SettingsError, "DTEM_DEVICE=tpu"),
        ({"settings": {"DTEM_MAX_QUEUE_IMAGES": "300"}}, SettingsError, "DTEM_MAX_QUEUE_IMAGES"),
        ({"num_cpus": 0}, ValidationError, "num_cpus"),
        ({"n_cpus": 2}, ValidationError, "n_cpus"),
    ],
)
def test_invalid_arguments_are_refused_before_anything_starts(
    arguments: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        deployment(**arguments)


def test_replica_refuses_tls_settings() -> None:
    with pytest.raises(SettingsError, match="DTEM_TLS_CERTIFICATE"):
        refuse_unsupported(Settings(tls_certificate=Path("a.crt"), tls_key=Path("a.key")))


def test_ray_reads_the_config_file() -> None:
    text = (ROOT / "deploy" / "ray" / "serve.yaml").read_text(encoding="utf-8")
    config = ServeDeploySchema.model_validate(yaml.safe_load(text))
    (application,) = config.applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    assert application.route_prefix == "/"
    Arguments.model_validate(application.args)
