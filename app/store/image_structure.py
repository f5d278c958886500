"""Image structure: refuses files that cost more than their pixels, because of how they are built.

Some parts of a file cost time or memory whatever the size of the image: a million empty markers, a hundred passes over
all pixels, a list of two million strips. Encoders write few of them. A check reads the file once and decodes nothing.
"""

import re
import struct
from collections.abc import Callable, Iterator
from itertools import islice

from app.errors import MalformedImage

MAX_JPEG_MARKERS, MAX_JPEG_JUNK_BYTES = 1000, 1000
# Encoders write about ten. Each one is a pass over all pixels, and can take 69 bytes.
MAX_JPEG_SCANS = 32
# Chunks of PNG and WebP. Encoders write some thousands of bytes into each.
MAX_CHUNKS, MIN_CHUNK_BYTES = 4096, 256
MAX_PNG_TEXTS = 32
MAX_GIF_BLOCKS = 20_000
MAX_BMP_RUN_BYTES = 2_000_000
MAX_TIFF_TAGS = 1000
# Numbers in one tag, such as the offsets of the strips. Pillow makes a Python object of each.
MAX_TIFF_VALUES = 1 << 16

START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9
# Markers without a length: TEM, the restart markers, SOI and EOI.
STANDALONE_MARKERS = {0x01, *range(0xD0, 0xDA)}
# 0xFF, and what may follow it as padding or junk.
NOT_A_MARKER = {0x00, 0xFF, *range(0x02, 0xC0)}
# In entropy-coded data, 0xFF is followed by 0x00 or by a restart marker.
NEXT_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
# Each of these chunks may expand to a megabyte.
PNG_TEXTS = {b"iCCP", b"zTXt", b"iTXt"}
GIF_IMAGE, GIF_EXTENSION, GIF_TRAILER = b",!;"
# Run-length encoded, with 8 or 4 bits per pixel.
BMP_RUNS = {1, 2}
TIFF_ORDERS = {b"II": "<", b"MM": ">"}
BIG_TIFF = 43
# BYTE, ASCII, SBYTE and UNDEFINED, which stay bytes.
TIFF_BYTE_TYPES = {1, 2, 6, 7}
TIFF_INTEGERS = {3: "H", 4: "I", 16: "Q"}
COMPRESSION, STRIP_BYTES, TILE_BYTES = 259, 279, 325
UNCOMPRESSED = 1


def check_structure(data: bytes) -> None:
    """Check a file of any format. What ends early or has no known signature is left to the decoder.

    Raises: MalformedImage.
    """
    for signature, check in CHECKS.items():
        if data.startswith(signature):
            check(data)


def require_few_scans(data: bytes) -> int:
    """Return the number of scans of a JPEG.

    Raises: MalformedImage for too many.
    """
    n_scans = 0
    for marker in NEXT_MARKER.finditer(data, find_first_scan(data)):
        if marker[1][0] == END_OF_IMAGE:
            break
        n_scans += marker[1][0] == START_OF_SCAN
        if n_scans > MAX_JPEG_SCANS:
            raise MalformedImage(f"The JPEG has more than {MAX_JPEG_SCANS} scans.", max_scans=MAX_JPEG_SCANS)
    return n_scans


def find_first_scan(data: bytes) -> int:
    """Return the position of the first start-of-scan marker of a JPEG, or the end of the file."""
    return next((at for at, marker, _ in _list_markers(data) if marker == START_OF_SCAN), len(data))


def _list_markers(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield position, code and end of each marker up to the first scan, padding and junk included."""
    end = 2
    while 0 <= (at := data.find(b"\xff", end)) < len(data) - 1:
        marker = data[at + 1]
        if marker in NOT_A_MARKER:
            # The second byte may begin a marker.
            end = at + 1
        elif marker in STANDALONE_MARKERS:
            end = at + 2
        else:
            end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        yield at, marker, end
        if marker == START_OF_SCAN:
            return


def _check_jpeg(data: bytes) -> None:
    n_markers = n_junk_bytes = 0
    end = 2
    for at, marker, next_end in _list_markers(data):
        n_markers, n_junk_bytes, end = n_markers + 1, n_junk_bytes + at - end, next_end
        _require_few_markers(n_markers, n_junk_bytes)
        if marker == START_OF_SCAN:
            return
    _require_few_markers(n_markers, n_junk_bytes + max(0, len(data) - end))


def _require_few_markers(n_markers: int, n_junk_bytes: int) -> None:
    if n_markers > MAX_JPEG_MARKERS:
        raise MalformedImage(f"The JPEG has more than {MAX_JPEG_MARKERS} markers.", max_markers=MAX_JPEG_MARKERS)
    if n_junk_bytes > MAX_JPEG_JUNK_BYTES:
        detail = f"The JPEG has more than {MAX_JPEG_JUNK_BYTES} bytes outside its markers, and no image before them."
        raise MalformedImage(detail, max_junk_bytes=MAX_JPEG_JUNK_BYTES)


def _check_png(data: bytes) -> None:
    n_texts, at = 0, 8
    for _ in range(_max_chunks(data)):
        if at + 8 > len(data):
            return
        length, kind = struct.unpack_from(">I4s", data, at)
        n_texts += kind in PNG_TEXTS
        if n_texts > MAX_PNG_TEXTS:
            detail = f"The PNG has more than {MAX_PNG_TEXTS} compressed texts and profiles."
            raise MalformedImage(detail, max_texts=MAX_PNG_TEXTS)
        at += 12 + length
    raise _too_many_chunks("PNG", data)


def _check_webp(data: bytes) -> None:
    at = 12
    for _ in range(_max_chunks(data)):
        if at + 8 > len(data):
            return
        (length,) = struct.unpack_from("<I", data, at + 4)
        at += 8 + length + length % 2
    raise _too_many_chunks("WebP", data)


def _max_chunks(data: bytes) -> int:
    return MAX_CHUNKS + len(data) // MIN_CHUNK_BYTES


def _too_many_chunks(name: str, data: bytes) -> MalformedImage:
    max_chunks = _max_chunks(data)
    return MalformedImage(f"The {name} has more than {max_chunks} chunks in {len(data)} bytes.", max_chunks=max_chunks)


def _check_gif(data: bytes) -> None:
    if sum(1 for _ in islice(_list_gif_blocks(data), MAX_GIF_BLOCKS + 1)) > MAX_GIF_BLOCKS:
        detail = f"The GIF has more than {MAX_GIF_BLOCKS} blocks before its first image."
        raise MalformedImage(detail, max_blocks=MAX_GIF_BLOCKS)


def _list_gif_blocks(data: bytes) -> Iterator[None]:
    """Yield once for each extension, each of its blocks, and each junk byte before the first image."""
    flags = data[10] if len(data) > 10 else 0
    at = 13 + (3 << (flags & 7) + 1 if flags & 128 else 0)
    while at < len(data) and data[at] not in (GIF_IMAGE, GIF_TRAILER):
        yield
        if data[at] != GIF_EXTENSION:
            at += 1
            continue
        at += 2
        while at < len(data) and data[at]:
            yield
            at += 1 + data[at]
        at += 1


def _check_bmp(data: bytes) -> None:
    """Check run-length encoding, which Pillow decodes in Python."""
    if len(data) > MAX_BMP_RUN_BYTES and struct.unpack_from("<I", data, 30)[0] in BMP_RUNS:
        detail = f"The run-length encoded BMP has more than {MAX_BMP_RUN_BYTES} bytes."
        raise MalformedImage(detail, max_bytes=MAX_BMP_RUN_BYTES)


def _check_tiff(data: bytes) -> None:
    """Check the first directory, the only one that is read."""
    compression, n_bytes = UNCOMPRESSED, 0
    for tag, kind, count, value in _list_tags(data):
        if kind not in TIFF_BYTE_TYPES and count > MAX_TIFF_VALUES:
            detail = f"The TIFF has {count} values in tag {tag}; the limit is {MAX_TIFF_VALUES}."
            raise MalformedImage(detail, tag=tag, max_values=MAX_TIFF_VALUES)
        if tag == COMPRESSION and value:
            compression = value[0]
        if tag in (STRIP_BYTES, TILE_BYTES):
            n_bytes += sum(value)
    if compression != UNCOMPRESSED and n_bytes > 2 * len(data) + MAX_TIFF_VALUES:
        raise MalformedImage(f"The TIFF has strips or tiles of {n_bytes} bytes in a file of {len(data)} bytes.")


def _list_tags(data: bytes) -> Iterator[tuple[int, int, int, tuple[int, ...]]]:
    """Yield tag, type, count and, of integers, the values. Nothing of a directory outside the file.

    Raises: MalformedImage for too many tags.
    """
    order = TIFF_ORDERS[data[:2]]
    is_big = len(data) > 4 and struct.unpack_from(order + "H", data, 2)[0] == BIG_TIFF
    pointer, n_tags_code, entry, start = ("Q", "Q", "HHQ", 8) if is_big else ("I", "H", "HHI", 4)
    try:
        (at,) = struct.unpack_from(order + pointer, data, start)
        (n_tags,) = struct.unpack_from(order + n_tags_code, data, at)
        at += struct.calcsize(order + n_tags_code)
        if n_tags > MAX_TIFF_TAGS:
            detail = f"The TIFF has {n_tags} tags; the limit is {MAX_TIFF_TAGS}."
            raise MalformedImage(detail, max_tags=MAX_TIFF_TAGS)
        for _ in range(n_tags):
            tag, kind, count = struct.unpack_from(order + entry, data, at)
            at += struct.calcsize(order + entry)
            yield tag, kind, count, _read_values(data, at, order, pointer, kind, count)
            at += struct.calcsize(pointer)
    except struct.error:
        return


def _read_values(data: bytes, at: int, order: str, pointer: str, kind: int, count: int) -> tuple[int, ...]:
    """Return the integers of a tag, inside its entry if they fit there; none if there are too many."""
    if kind not in TIFF_INTEGERS or count > MAX_TIFF_VALUES:
        return ()
    values = f"{order}{count}{TIFF_INTEGERS[kind]}"
    if struct.calcsize(values) > struct.calcsize(pointer):
        (at,) = struct.unpack_from(order + pointer, data, at)
    return struct.unpack_from(values, data, at)


CHECKS: dict[bytes, Callable[[bytes], None]] = {
    b"\xff\xd8\xff": _check_jpeg,
    b"\x89PNG\r\n\x1a\n": _check_png,
    b"RIFF": _check_webp,
    b"GIF8": _check_gif,
    b"BM": _check_bmp,
    b"II": _check_tiff,
    b"MM": _check_tiff,
}
