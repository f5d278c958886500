"""Metadata: what there is to infer with, in the words of the protocol and of Triton's model configuration."""

from app.api.inference_protocol.documents import (
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
from app.api.inference_protocol.outputs import GMACS, LABEL, PROBABILITIES, TOKENS
from app.api.inference_protocol.tensors import CHANNELS, IMAGE, IMAGE_DATATYPE, PIXELS_DATATYPE
from app.catalogue import Catalogue
from app.manifest import Manifest

ANY_NUMBER = -1
EXTENSIONS = ["binary_tensor_data", "classification", "model_configuration", "parameters", "statistics"]
PLATFORMS = {"onnx": ("onnxruntime_onnx", "onnxruntime"), "torchscript": ("pytorch_libtorch", "pytorch")}
PER_IMAGE = Reshape(shape=[])  # one value per image, which `dims` cannot say alone


def describe_server(version: str) -> ServerMetadata:
    return ServerMetadata(name="dtem-serve", version=version, extensions=EXTENSIONS)


def describe_model(manifest: Manifest, versions: list[str], graph_format: str) -> ModelMetadata:
    return ModelMetadata(
        name=manifest.name,
        versions=versions,
        platform=PLATFORMS[graph_format][0],
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
    n_classes, n_places = len(manifest.labels), manifest.architecture.depth + 1
    return [
        TensorMetadata(name=manifest.output.name, datatype="FP32", shape=[ANY_NUMBER, n_classes]),
        TensorMetadata(name=PROBABILITIES, datatype="FP32", shape=[ANY_NUMBER, n_classes]),
        TensorMetadata(name=LABEL, datatype="BYTES", shape=[ANY_NUMBER]),
        TensorMetadata(name=TOKENS, datatype="INT64", shape=[ANY_NUMBER, n_places]),
        TensorMetadata(name=GMACS, datatype="FP32", shape=[ANY_NUMBER]),
    ]


def configure_model(manifest: Manifest, graph_format: str, max_images: int) -> ModelConfig:
    platform, backend = PLATFORMS[graph_format]
    return ModelConfig(
        name=manifest.name,
        platform=platform,
        backend=backend,
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
