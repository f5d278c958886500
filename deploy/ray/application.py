"""Application: how many replicas of which size, for `serve run deploy.ray.application:build` or a config file."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application

from app.settings import Settings, read_settings
from deploy.ray.replica import Replica

ROOT = Path(__file__).parents[2]
HEALTH_SECONDS = 2  # how soon a dead or hung replica is noticed; asking costs it nothing


class Arguments(BaseModel):
    """What an operator chooses. Units: CPUs and GPUs of one replica."""

    model_config = ConfigDict(extra="forbid")

    settings: dict[str, str] = Field(default={}, description="environment of the replicas: DTEM_…, OTEL_…")
    num_cpus: int = Field(default=1, ge=1, description="CPUs of a replica, and the threads of one inference in it")
    num_gpus: float = Field(default=0, ge=0, description="GPUs of a replica; needs DTEM_DEVICE=cuda")
    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=4, ge=1)
    autoscaling: dict[str, Any] = Field(default={}, description="more of Ray's AutoscalingConfig, or instead of ours")


def build(arguments: Arguments) -> Application:
    """Make the application; the numbers of its queues follow from the service's settings.

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
        logging_config={"enable_access_log": False},  # the service has its own
    )
    application: Application = deployment(serve.ingress()(Replica)).bind()
    return application


def plan_scaling(arguments: Arguments, settings: Settings) -> dict[str, Any]:
    """A replica is full when each of its lanes has a whole batch; what comes on top waits, and is worth another one."""
    return {
        "min_replicas": arguments.min_replicas,
        "max_replicas": arguments.max_replicas,
        "target_ongoing_requests": settings.max_concurrent_batches * settings.max_batch_images,
        **arguments.autoscaling,
    }
