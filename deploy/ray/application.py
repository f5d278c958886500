"""Application: the number and size of the replicas, for `serve run deploy.ray.application:build` or a config file."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application

from app.settings import Settings, read_settings
from deploy.ray.replica import Replica

ROOT = Path(__file__).parents[2]
# Interval of the health checks, which are cheap.
HEALTH_SECONDS = 2


class Arguments(BaseModel):
    """An operator's choices. CPUs and GPUs are per replica."""

    model_config = ConfigDict(extra="forbid")

    settings: dict[str, str] = Field(default={}, description="environment of the replicas, DTEM_… and OTEL_…")
    num_cpus: int = Field(default=1, ge=1, description="CPUs per replica, and threads per inference")
    num_gpus: float = Field(default=0, ge=0, description="GPUs per replica; needs DTEM_DEVICE=cuda")
    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=4, ge=1)
    autoscaling: dict[str, Any] = Field(default={}, description="fields of Ray's AutoscalingConfig; they override ours")


def build(arguments: Arguments) -> Application:
    """Build the application. Ray's queue sizes follow from the service's settings.

    Raises: SettingsError.
    """
    environment = {
        "DTEM_MODEL_STORE": str(ROOT / "model_store"),
        "DTEM_N_THREADS": str(arguments.num_cpus),
        **arguments.settings,
    }
    settings = read_settings(environment)
    deployment = serve.deployment(
        name="Replica",
        ray_actor_options={
            "num_cpus": arguments.num_cpus,
            "num_gpus": arguments.num_gpus,
            "runtime_env": {"env_vars": environment},
        },
        autoscaling_config=plan_scaling(arguments, settings),
        max_ongoing_requests=2 * settings.max_in_flight_images,
        health_check_period_s=HEALTH_SECONDS,
        health_check_timeout_s=settings.stall_seconds,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        # The service logs requests itself.
        logging_config={"enable_access_log": False},
    )
    application: Application = deployment(serve.ingress()(Replica)).bind()
    return application


def plan_scaling(arguments: Arguments, settings: Settings) -> dict[str, Any]:
    """Scale when every worker thread of a replica has a full batch: further requests would queue."""
    return {
        "min_replicas": arguments.min_replicas,
        "max_replicas": arguments.max_replicas,
        "target_ongoing_requests": settings.max_concurrent_batches * settings.max_batch_images,
        **arguments.autoscaling,
    }
