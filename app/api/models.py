"""`GET /models`: the variants of each model, with cost, accuracy and measured latency."""

from fastapi import APIRouter, Depends

from app.api.parameters import accept_parameters
from app.api.schemas import (
    DefaultDocument,
    GmacsSpread,
    IgnoredFolder,
    LatencyMs,
    MeasuredAccuracy,
    MeasuredScore,
    ModelDocument,
    ModelName,
    ModelsDocument,
    RefusedVersion,
    RunMs,
    VariantDocument,
    describe_problems,
)
from app.serving.service import Service
from app.store.catalogue import LatencyLog, ServedModel, ServedVariant
from app.store.costs import batch_buckets
from app.store.manifest import Accuracy, Score, VariantKey


def make_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get(
        "/models",
        summary="List models and their variants",
        responses=describe_problems(401, 422, 503),
        dependencies=[Depends(accept_parameters())],
    )
    async def list_models() -> ModelsDocument:
        catalogue = service.require_ready()
        default = catalogue.find(None, None).manifest
        models = [_describe_model(model, service) for model in catalogue.all_models()]
        return ModelsDocument(
            default=ModelName(name=default.name, version=default.version),
            models=models,
            refused=[
                RefusedVersion(name=name, version=str(number), reason=refusal.summary)
                for (name, number), refusal in sorted(catalogue.refused.items())
            ],
            ignored=[IgnoredFolder(folder=name, reason=catalogue.ignored[name]) for name in sorted(catalogue.ignored)],
        )

    @router.get(
        "/models/{name}",
        summary="Get a model and its variants",
        responses=describe_problems(401, 404, 422, 503),
        dependencies=[Depends(accept_parameters("version"))],
    )
    async def show_model(name: str, version: str | None = None) -> ModelDocument:
        return _describe_model(service.require_ready().find(name, version), service)

    return router


def _describe_model(model: ServedModel, service: Service) -> ModelDocument:
    manifest = model.manifest
    return ModelDocument(
        name=manifest.name,
        version=manifest.version,
        architecture=manifest.architecture.timm_name,
        labels=list(manifest.labels),
        activation=manifest.output.activation,
        input=manifest.input.model_dump(exclude_none=True),
        dataset=manifest.training.dataset,
        licence=manifest.training.licence,
        credits=list(manifest.training.credits),
        git_commit=manifest.git_commit,
        created=manifest.created,
        device=service.settings.device,
        default=DefaultDocument(policy=manifest.default.policy, r=manifest.default.r),
        variants=[_describe_variant(model.variants[key], service) for key in sorted(model.variants, key=_order)],
    )


def _order(key: VariantKey) -> tuple[str, int]:
    return key.policy, -1 if key.r is None else key.r


def _describe_variant(variant: ServedVariant, service: Service) -> VariantDocument:
    spec = variant.spec
    runs = {n: service.engine.expected_seconds(variant, n) for n in batch_buckets(service.settings.max_batch_images)}
    return VariantDocument(
        id=spec.id,
        policy=spec.policy,
        r=spec.r,
        format=spec.format,
        precision=spec.precision,
        gmacs=spec.gmacs,
        gmacs_spread=None if spec.gmacs_spread is None else GmacsSpread(**spec.gmacs_spread.model_dump()),
        tokens=list(spec.tokens),
        schedule=list(spec.schedule),
        data_dependent=spec.data_dependent,
        promise=spec.promise,
        accuracy=_describe_accuracy(spec.accuracy),
        latency_ms=_describe_latency(variant.latency),
        run_ms=[RunMs(batch_size=n, expected=round(seconds * 1e3, 3)) for n, seconds in runs.items()],
    )


def _describe_accuracy(accuracy: Accuracy | Score | None) -> MeasuredAccuracy | MeasuredScore | None:
    if accuracy is None:
        return None
    document = MeasuredAccuracy if isinstance(accuracy, Accuracy) else MeasuredScore
    return document(**accuracy.model_dump())


def _describe_latency(latency: LatencyLog) -> LatencyMs | None:
    summary = latency.summary_ms()
    return None if summary is None else LatencyMs(last=round(summary[0], 3), median=round(summary[1], 3), n=summary[2])
