"""Uploads: reads a request body that is an image, or a multipart form of images."""

from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from app.errors import MalformedBody, MissingFile, TooManyFiles, UnknownPart, echo

FILE_PART = "file"


@dataclass
class Upload:
    """One file. The filename is client text: it is returned in the response, and not used otherwise."""

    filename: str | None = None
    chunks: list[bytes] = field(default_factory=list)

    @property
    def data(self) -> bytes:
        return b"".join(self.chunks)


def form_boundary(content_type: str | None) -> bytes | None:
    """Return the boundary of a multipart form, or None if the body is not a form.

    Raises: MalformedBody for a form without a boundary.
    """
    media_type, options = parse_options_header(content_type)
    if media_type != b"multipart/form-data":
        return None
    if not options.get(b"boundary"):
        raise MalformedBody("Content-Type multipart/form-data has no boundary.")
    return options[b"boundary"]


async def read_image(request: Request) -> Upload:
    """Read a body that is an image, regardless of its Content-Type."""
    upload = Upload(chunks=[chunk async for chunk in request.stream() if chunk])
    if not upload.chunks:
        raise MalformedBody("Empty request body; send an image, or a form with `file` parts.")
    return upload


async def read_form(request: Request, boundary: bytes, max_files: int) -> list[Upload]:
    """Read the `file` parts of a multipart form.

    Raises: MalformedBody, MissingFile, TooManyFiles, UnknownPart.
    """
    form = _Form(max_files)
    try:
        parser = MultipartParser(boundary, form.callbacks)  # type: ignore[arg-type]
        async for chunk in request.stream():
            parser.write(chunk)
        parser.finalize()
    except FormParserError as error:
        raise MalformedBody(f"Malformed multipart form: {echo(str(error))}") from error
    if not form.is_complete:
        raise MalformedBody("Truncated multipart form: the closing boundary is missing.")
    if not form.uploads:
        raise MissingFile("The form has no part named `file`.", field=FILE_PART)
    return form.uploads


class _Form:
    """The callbacks of the parser, and what they collect."""

    def __init__(self, max_files: int) -> None:
        self.uploads: list[Upload] = []
        self.is_complete = False
        self._max_files = max_files
        self._header = (bytearray(), bytearray())
        self._disposition: bytes | None = None
        names = ("part_begin", "header_field", "header_value", "header_end", "headers_finished", "part_data", "end")
        self.callbacks = {f"on_{name}": getattr(self, f"_{name}") for name in names}

    def _part_begin(self) -> None:
        self._disposition = None

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header[0].extend(data[start:end])

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1].extend(data[start:end])

    def _header_end(self) -> None:
        if self._header[0].lower() == b"content-disposition":
            self._disposition = bytes(self._header[1])
        self._header = (bytearray(), bytearray())

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if name != FILE_PART:
            detail = f"Unknown form part {echo(name)!r}; parts must be named {FILE_PART!r}."
            raise UnknownPart(detail, field=echo(name), accepted=[FILE_PART])
        if len(self.uploads) == self._max_files:
            detail = f"The form has more than {self._max_files} files."
            raise TooManyFiles(detail, max_files=self._max_files)
        filename = options.get(b"filename")
        self.uploads.append(Upload(None if filename is None else filename.decode("utf-8", "replace")))

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self.uploads[-1].chunks.append(data[start:end])

    def _end(self) -> None:
        self.is_complete = True
