# ruff: noqa: N818 (the names say what went wrong, without the suffix `Error`)
"""Errors: what can go wrong, and the table of their HTTP statuses and codes. `app.api.problems` renders them."""

from typing import Any, Self

# Of a client's own words in an answer.
MAX_ECHO_CHARACTERS = 100


class StartupError(Exception):
    """The service cannot start; the message is one line for the operator."""


class SettingsError(StartupError):
    """The environment asks for something that does not exist or contradicts itself."""


class StoreError(StartupError):
    """A file of the model store cannot be trusted or used."""

    def __init__(self, file: object, reason: str) -> None:
        super().__init__(f"{file}: {reason}")
        self.file = str(file)
        self.reason = reason


class BackendError(Exception):
    """The engine under a variant failed; foreign exceptions are translated to this one."""


class ServiceError(Exception):
    """A request that gets no result: `detail` and `members` are for the caller to read."""

    def __init__(
        self, detail: str, *, retry_after_seconds: int | None = None, allow: str | None = None, **members: Any
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.members = members
        headers = {"Retry-After": retry_after_seconds, "Allow": allow}
        self.headers = {name: str(value) for name, value in headers.items() if value is not None}

    def about(self, subject: str) -> Self:
        """Return this error with its subject before it; the error itself may be the answer to others too."""
        named = type(self).__new__(type(self))
        vars(named).update(vars(self))
        named.detail = f"{subject}: {self.detail}"
        return named


class MalformedRequest(ServiceError):
    """The request breaks the protocol."""


class Unauthorized(ServiceError):
    """The request has no key that we know (RFC 6750)."""

    def __init__(self, detail: str, challenge: str) -> None:
        super().__init__(detail)
        self.headers["WWW-Authenticate"] = challenge


class UnknownPath(ServiceError):
    """There is nothing at this path."""


class MethodNotAllowed(ServiceError):
    """The path is there, but not for this method."""


class MalformedBody(ServiceError):
    """The body is empty, or is not the multipart form it says it is."""


class MalformedTensor(ServiceError):
    """An inference request whose JSON or tensors are not what the protocol and the model say."""


class UnsupportedEncoding(ServiceError):
    """A Content-Encoding that is not read here."""

    def __init__(self, detail: str, accepted: list[str]) -> None:
        super().__init__(detail, accepted=accepted)
        self.headers["Accept-Encoding"] = ", ".join(accepted)


class MalformedImage(ServiceError):
    """The bytes begin like an image that we read, and then break off or contradict themselves."""


class UnknownModel(ServiceError):
    """There is no such model."""


class UnknownVersion(ServiceError):
    """The model has no such version."""


class BodyTooLarge(ServiceError):
    """More bytes than the service accepts."""


class TooManyPixels(ServiceError):
    """More pixels than the service decodes, by the image's header."""


class TooManyFiles(ServiceError):
    """More parts in one form than the service accepts."""


class NotAnImage(ServiceError):
    """Not one of the image formats that we read, or pixels without a defined range."""


class UnknownParameter(ServiceError):
    """A query parameter that does not exist here."""


class DuplicateParameter(ServiceError):
    """A query parameter that is there more than once."""


class InvalidParameter(ServiceError):
    """A query parameter whose value cannot be used."""


class ConflictingParameters(ServiceError):
    """Query parameters that exclude each other."""


class BudgetNotMet(ServiceError):
    """No variant is as cheap, or as accurate, as was asked for."""


class RateNotExported(ServiceError):
    """A reduction rate for which the policy has no graph."""


class UnknownPolicy(ServiceError):
    """A policy for which the model has no graph."""


class UnknownPart(ServiceError):
    """A form part that is not named `file`."""


class MissingFile(ServiceError):
    """A form without a `file` part."""


class QueueFull(ServiceError):
    """As many images inside as the service admits."""


class DeadlineUnmeetable(ServiceError):
    """At the present load, not even the cheapest variant would answer in time."""


class DeadlinePassed(ServiceError):
    """The deadline is past, or so near that no run would end before it."""


class ClientGone(ServiceError):
    """The caller has left; nobody reads this answer."""


class InferenceFailed(ServiceError):
    """The model could not be run. The text is fixed; the reason is in the log."""

    def __init__(self) -> None:
        super().__init__("The model could not be run. The reason is in the log of the service.")


class InternalError(ServiceError):
    """A mistake of ours. The text is fixed; the reason is in the log."""

    def __init__(self) -> None:
        super().__init__("Something went wrong here. The reason is in the log of the service.")


class NotReady(ServiceError):
    """The models are still being loaded and verified."""


class EngineStalled(ServiceError):
    """The thread that runs the models has ended, or its present run lasts too long: a restart is due."""


class ShuttingDown(ServiceError):
    """The service is draining and takes no new work."""


PROBLEMS: dict[type[ServiceError], tuple[int, str]] = {
    MalformedRequest: (400, "malformed_request"),
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
    """Shorten a caller's own words for an answer or a log line."""
    return text if len(text) <= MAX_ECHO_CHARACTERS else text[:MAX_ECHO_CHARACTERS] + "…"
