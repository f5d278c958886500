# ruff: noqa: N818 (the names state the problem, without the suffix `Error`)
"""Errors: the exceptions of the service, and the HTTP status and code of each. `app.api.problems` renders them."""

from typing import Any, Self

# Limit on client text repeated in a response or a log line.
MAX_ECHO_CHARACTERS = 100


class StartupError(Exception):
    """The service cannot start. The message is one line for the operator."""


class SettingsError(StartupError):
    """A setting is unknown, invalid or contradicts another one."""


class StoreError(StartupError):
    """A file of the model store is missing, corrupt or unsupported."""

    def __init__(self, file: object, reason: str) -> None:
        super().__init__(f"{file}: {reason}")
        self.file = str(file)
        self.reason = reason


class TemporaryStoreError(StoreError):
    """The reason can pass without a change of the file: a permission, the network, memory."""


class NotEnoughMemory(TemporaryStoreError):
    """The version would exceed the memory limit of the container or the machine."""


class BackendError(Exception):
    """The engine failed. Exceptions of its library are translated to this one."""


class ServiceError(Exception):
    """A request failed. `detail` and `members` are returned to the client."""

    def __init__(
        self, detail: str, *, retry_after_seconds: int | None = None, allow: str | None = None, **members: Any
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.members = members
        headers = {"Retry-After": retry_after_seconds, "Allow": allow}
        self.headers = {name: str(value) for name, value in headers.items() if value is not None}

    def about(self, subject: str) -> Self:
        """Return a copy whose detail begins with the subject. Several requests may share this error."""
        copy = type(self).__new__(type(self))
        vars(copy).update(vars(self))
        copy.detail = f"{subject}: {self.detail}"
        return copy


class MalformedRequest(ServiceError):
    """The framework rejected the request."""


class TargetTooLong(ServiceError):
    """The request target exceeds the byte limit."""


class HeadersTooLarge(ServiceError):
    """The headers or the trailers exceed the limit on bytes or fields."""


class UnsupportedTransferCoding(ServiceError):
    """The Transfer-Encoding has another coding than chunked."""


class RequestTimeout(ServiceError):
    """The head or the body of the request arrived too slowly."""


class UploadEvicted(ServiceError):
    """The body arrived too slowly while the bodies in flight took all the bytes that they may."""


class Unauthorized(ServiceError):
    """The API key is missing or unknown (RFC 6750)."""

    def __init__(self, detail: str, challenge: str) -> None:
        super().__init__(detail)
        self.headers["WWW-Authenticate"] = challenge


class UnknownPath(ServiceError):
    """No route has this path."""


class MethodNotAllowed(ServiceError):
    """The path exists, but not for this method."""


class MalformedBody(ServiceError):
    """The body is empty, or not the form or the encoding that its headers declare."""


class MalformedTensor(ServiceError):
    """The JSON or the tensors of an inference request do not match the protocol or the model."""


class UnsupportedEncoding(ServiceError):
    """The Content-Encoding is not supported."""

    def __init__(self, detail: str, accepted: list[str]) -> None:
        super().__init__(detail, accepted=accepted)
        self.headers["Accept-Encoding"] = ", ".join(accepted)


class MalformedImage(ServiceError):
    """The image has a supported format, but is truncated or corrupt."""


class UnknownModel(ServiceError):
    """No model has this name."""


class UnknownVersion(ServiceError):
    """The model does not have this version."""


class BodyTooLarge(ServiceError):
    """The body exceeds the byte limit."""


class TooManyPixels(ServiceError):
    """The image exceeds the pixel limit, according to its header."""


class TooManyFiles(ServiceError):
    """The request has more images than the limit."""


class NotAnImage(ServiceError):
    """The image format or pixel type is not supported."""


class UnknownParameter(ServiceError):
    """The parameter does not exist."""


class DuplicateParameter(ServiceError):
    """The query parameter is given more than once."""


class InvalidParameter(ServiceError):
    """The value of a parameter is invalid."""


class ConflictingParameters(ServiceError):
    """The parameters are mutually exclusive."""


class BudgetNotMet(ServiceError):
    """No variant is within the requested cost or accuracy."""


class RateNotExported(ServiceError):
    """The policy has no graph for this reduction rate."""


class UnknownPolicy(ServiceError):
    """The model has no graph for this policy."""


class UnknownPart(ServiceError):
    """A form part is not named `file`."""


class MissingFile(ServiceError):
    """The form has no `file` part."""


class QueueFull(ServiceError):
    """Too many images or body bytes are in flight or queued."""


class DeadlineUnmeetable(ServiceError):
    """At the present load, even the cheapest variant would miss the deadline."""


class DeadlinePassed(ServiceError):
    """The deadline has passed, or is too near for any batch to finish in time."""


class ClientGone(ServiceError):
    """The client has disconnected; the response is not sent."""


class InferenceFailed(ServiceError):
    """The engine failed. The text is fixed; the cause is in the log."""

    def __init__(self) -> None:
        super().__init__("Inference failed. See the service log for the cause.")


class InternalError(ServiceError):
    """An unexpected exception. The text is fixed; the cause is in the log."""

    def __init__(self) -> None:
        super().__init__("Internal error. See the service log for the cause.")


class NotReady(ServiceError):
    """The models are still loading."""


class EngineStalled(ServiceError):
    """A worker thread of the engine has died or hangs. The service needs a restart."""


class ShuttingDown(ServiceError):
    """The service is draining."""


# Counted as a refusal, but never answered: the client has not sent a request.
TOO_MANY_CONNECTIONS = "too_many_connections"

PROBLEMS: dict[type[ServiceError], tuple[int, str]] = {
    MalformedRequest: (400, "malformed_request"),
    TargetTooLong: (414, "target_too_long"),
    HeadersTooLarge: (431, "headers_too_large"),
    UnsupportedTransferCoding: (501, "unsupported_transfer_coding"),
    RequestTimeout: (408, "request_timeout"),
    UploadEvicted: (408, "upload_evicted"),
    Unauthorized: (401, "unauthorized"),
    UnknownPath: (404, "unknown_path"),
    MethodNotAllowed: (405, "method_not_allowed"),
    MalformedBody: (400, "malformed_body"),
    MalformedTensor: (400, "malformed_tensor"),
    MalformedImage: (400, "malformed_image"),
    UnknownModel: (404, "unknown_model"),
    UnknownVersion: (404, "unknown_version"),
    BodyTooLarge: (413, "body_too_large"),
    TooManyPixels: (413, "too_many_pixels"),
    TooManyFiles: (413, "too_many_files"),
    NotAnImage: (415, "not_an_image"),
    UnsupportedEncoding: (415, "unsupported_encoding"),
    UnknownParameter: (422, "unknown_parameter"),
    DuplicateParameter: (422, "duplicate_parameter"),
    InvalidParameter: (422, "invalid_parameter"),
    ConflictingParameters: (422, "conflicting_parameters"),
    BudgetNotMet: (422, "budget_not_met"),
    RateNotExported: (422, "rate_not_exported"),
    UnknownPolicy: (422, "unknown_policy"),
    UnknownPart: (422, "unknown_part"),
    MissingFile: (422, "missing_file"),
    QueueFull: (429, "queue_full"),
    DeadlineUnmeetable: (429, "deadline_unmeetable"),
    ClientGone: (499, "client_gone"),
    InferenceFailed: (500, "inference_failed"),
    InternalError: (500, "internal_error"),
    NotReady: (503, "not_ready"),
    EngineStalled: (503, "engine_stalled"),
    ShuttingDown: (503, "shutting_down"),
    DeadlinePassed: (504, "deadline_passed"),
}


def status_and_code(error: ServiceError) -> tuple[int, str]:
    return PROBLEMS[type(error)]


def echo(text: str) -> str:
    """Truncate client text for a response or a log line."""
    return text if len(text) <= MAX_ECHO_CHARACTERS else text[:MAX_ECHO_CHARACTERS] + "…"
