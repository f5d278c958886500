"""Metadata: describes server and models, for the protocol and as Triton's model configuration."""

from app.api.v2.messages import (
    InputConfig,
    ModelConfig,
    ModelMetadata,
    OutputConfig,
    Reshape,
    ServerMetadata,
    TensorMetadata,
    VersionNumbers,
    VersionPolicy,
)
from app.api.v2.outputs import list_outputs
from app.api.v2.tensors import CHANNELS, IMAGE, IMAGE_DATATYPE, PIXELS_DATATYPE
from app.backends import ENGINES
from app.store.catalogue import Catalogue
from app.store.manifest import Manifest

ANY_NUMBER = -1
EXTENSIONS = ["binary_tensor_data", "classification", "model_configuration", "parameters", "statistics"]
# One value per image. Triton does not allow empty `dims`.
PER_IMAGE = Reshape(shape=[])


def describe_server(version: str) -> ServerMetadata:
    return ServerMetadata(name="dtem-serve", version=version, extensions=EXTENSIONS)


def describe_model(manifest: Manifest, versions: list[str], engine: str) -> ModelMetadata:
    return ModelMetadata(
        name=manifest.name,
        versions=versions,
        platform=ENGINES[engine].platform,
        inputs=_list_inputs(manifest),
        outputs=_list_outputs(manifest),
    )


def list_versions(catalogue: Catalogue, name: str) -> list[str]:
    return [str(version) for version in sorted(catalogue.models[name])]


def _list_inputs(manifest: Manifest) -> list[TensorMetadata]:
    rule = manifest.input
    pixels = [ANY_NUMBER, rule.height, rule.width, CHANNELS]
    return [
        TensorMetadata(name=rule.name, datatype=PIXELS_DATATYPE, shape=pixels),
        TensorMetadata(name=IMAGE, datatype=IMAGE_DATATYPE, shape=[ANY_NUMBER]),
    ]


def _list_outputs(manifest: Manifest) -> list[TensorMetadata]:
    return [
        TensorMetadata(name=output.name, datatype=output.datatype, shape=[ANY_NUMBER, *output.shape])
        for output in list_outputs(manifest)
    ]


def configure_model(manifest: Manifest, engine: str, max_images: int) -> ModelConfig:
    return ModelConfig(
        name=manifest.name,
        platform=ENGINES[engine].platform,
        backend=ENGINES[engine].triton_backend,
        version_policy=VersionPolicy(specific=VersionNumbers(versions=[int(manifest.version)])),
        max_batch_size=max_images,
        input=[_configure_input(tensor) for tensor in _list_inputs(manifest)],
        output=[_configure_output(tensor) for tensor in _list_outputs(manifest)],
    )


def _configure_input(tensor: TensorMetadata) -> InputConfig:
    return InputConfig(
        name=tensor.name,
        data_type=_config_type(tensor),
        format="FORMAT_NHWC" if tensor.datatype == PIXELS_DATATYPE else "FORMAT_NONE",
        dims=tensor.shape[1:] or [1],
        reshape=_reshape(tensor),
        optional=True,
    )


def _configure_output(tensor: TensorMetadata) -> OutputConfig:
    return OutputConfig(
        name=tensor.name,
        data_type=_config_type(tensor),
        dims=tensor.shape[1:] or [1],
        reshape=_reshape(tensor),
    )


def _reshape(tensor: TensorMetadata) -> Reshape | None:
    return None if tensor.shape[1:] else PER_IMAGE


def _config_type(tensor: TensorMetadata) -> str:
    return "TYPE_STRING" if tensor.datatype == "BYTES" else f"TYPE_{tensor.datatype}"
