"""Image bombs: small files that take much time or memory."""

import struct
import zlib
from collections.abc import Callable, Sequence

from PIL import Image

from tests.app.odd_images import encode, make_photo, make_png, png_chunk

GREY = (9, 99, 200)
SHORT, LONG = 3, 4


def lossless_webp(width: int, height: int) -> bytes:
    """Make a WebP of some hundred bytes whose decoding takes 16 bytes per pixel."""
    return encode(Image.new("RGBA", (width, height), GREY), "WEBP", lossless=True, method=0, quality=0)


def repeat_last_scan(data: bytes, n_times: int) -> bytes:
    start = data.rindex(b"\xff\xda")
    return data[:-2] + data[start:-2] * n_times + data[-2:]


def scans_jpeg(width: int, height: int, n_more: int) -> bytes:
    """Make a progressive JPEG with ten scans and more, each of them a pass over all pixels."""
    return repeat_last_scan(encode(Image.new("RGB", (width, height), GREY), "JPEG", progressive=True), n_more)


def separate_scans_jpeg(n_times: int) -> bytes:
    """Make a JPEG that is not progressive, with a scan for each component."""
    return repeat_last_scan(encode(make_photo(), "JPEG", qtables="web_high", restart_marker_rows=0), n_times)


def gif_before_image(inserted: bytes) -> bytes:
    data = encode(make_photo(), "GIF")
    start = 13 + (3 << (data[10] & 7) + 1)
    return data[:start] + inserted + data[start:]


def frames_webp(n_frames: int) -> bytes:
    """Make an animation of frames of one pixel."""
    pixel = encode(Image.new("RGB", (1, 1)), "WEBP", lossless=True)[12:]
    canvas = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + bytes([60, 0, 0, 42, 0, 0])
    frame = b"ANMF" + struct.pack("<I", 16 + len(pixel)) + bytes(12) + b"\1\0\0\0" + pixel
    body = b"WEBP" + canvas + b"ANIM" + struct.pack("<I", 6) + bytes(6) + frame * n_frames
    return b"RIFF" + struct.pack("<I", len(body)) + body


def runs_bmp(width: int, height: int, runs: bytes) -> bytes:
    """Make a run-length encoded BMP, which Pillow decodes in Python."""
    start = 14 + 40 + 1024
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 0, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", start + len(runs), 0, 0, start) + head + bytes(1024) + runs


def make_tiff(tags: dict[int, tuple[int, Sequence[int]]], data: bytes) -> bytes:
    """Make a TIFF of a directory, the values that do not fit into it, and data at offset 8."""
    directory_at = 8 + len(data)
    values_at = directory_at + 2 + 12 * len(tags) + 4
    entries = values = b""
    for tag, (kind, numbers) in sorted(tags.items()):
        packed = struct.pack(f"<{len(numbers)}{'H' if kind == SHORT else 'I'}", *numbers)
        place = packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack("<I", values_at + len(values))
        entries += struct.pack("<HHI", tag, kind, len(numbers)) + place
        values += b"" if len(packed) <= 4 else packed
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", directory_at) + data + directory + values


def strips_tiff(width: int, n_strips: int, data: bytes, strip_bytes: int, compression: int = 1) -> bytes:
    """Make a TIFF in which all strips, of one row each, are the same bytes of the file."""
    return make_tiff(
        {
            256: (LONG, [width]),
            257: (LONG, [n_strips]),
            258: (SHORT, [8]),
            259: (SHORT, [compression]),
            262: (SHORT, [1]),
            273: (LONG, [8] * n_strips),
            277: (SHORT, [1]),
            278: (LONG, [1]),
            279: (LONG, [strip_bytes] * n_strips),
        },
        data,
    )


def fax_tiff(width: int, height: int, n_bytes: int = 2000, compression: int = 2) -> bytes:
    """Make a TIFF about whose rows libtiff complains, one by one."""
    return make_tiff(
        {
            256: (LONG, [width]),
            257: (LONG, [height]),
            258: (SHORT, [1]),
            259: (SHORT, [compression]),
            262: (SHORT, [0]),
            273: (LONG, [8]),
            277: (SHORT, [1]),
            278: (LONG, [height]),
            279: (LONG, [n_bytes]),
        },
        b"\0\xff" * (n_bytes // 2),
    )


def tile_tiff(side: int) -> bytes:
    """Make a TIFF of 100 x 100 pixels in one large tile."""
    tile = zlib.compress(bytes(side * side), 1)
    return make_tiff(
        {
            256: (LONG, [100]),
            257: (LONG, [100]),
            258: (SHORT, [8]),
            259: (SHORT, [8]),
            262: (SHORT, [1]),
            277: (SHORT, [1]),
            322: (LONG, [side]),
            323: (LONG, [side]),
            324: (LONG, [8]),
            325: (LONG, [len(tile)]),
        },
        tile,
    )


def png_with(*chunks: bytes) -> bytes:
    return make_png(8, 8, 8, 2, (b"\0" + bytes(24)) * 8, *chunks)


# Each with what the message of its refusal contains.
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "scans.jpg": (lambda: scans_jpeg(64, 64, 30), "32 scans"),
    "markers.jpg": (lambda: b"\xff\xd8" + b"\xff\xfe\0\2" * 2000 + encode(make_photo(), "JPEG")[2:], "1000 markers"),
    "padding.jpg": (lambda: b"\xff\xd8" + b"\xff" * 2000 + encode(make_photo(), "JPEG")[2:], "1000 markers"),
    "junk.jpg": (lambda: b"\xff\xd8\xff\xd0" + bytes(2000) + encode(make_photo(), "JPEG")[2:], "1000 bytes"),
    "only-junk.jpg": (lambda: b"\xff\xd8\xff\xd0" + bytes(100_000), "1000 bytes"),
    "chunks.png": (lambda: png_with(png_chunk(b"tIME", b"") * 6000), "chunks"),
    "data-chunks.png": (lambda: png_with(png_chunk(b"IDAT", b"") * 6000), "chunks"),
    "profiles.png": (
        lambda: png_with(*[png_chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(10)))] * 40),
        "32 compressed",
    ),
    "frames.webp": (lambda: frames_webp(10_000), "chunks"),
    "comment.gif": (lambda: gif_before_image(b"!\xfe" + b"\1a" * 30_000 + b"\0"), "20000 blocks"),
    "extensions.gif": (lambda: gif_before_image(b"!\xfe\0" * 30_000), "20000 blocks"),
    "junk.gif": (lambda: gif_before_image(bytes(30_000)), "20000 blocks"),
    "runs.bmp": (lambda: runs_bmp(1000, 3000, b"\1\7" * 1_100_000), "run-length"),
    "strips.tiff": (lambda: strips_tiff(8, 70_000, bytes(8), 8), "70000 values in tag 273"),
    "overlap.tiff": (
        lambda: strips_tiff(9, 60_000, zlib.compress(bytes(9)) + bytes(90_000), 90_000, 8),
        "strips or tiles",
    ),
    "tags.tiff": (lambda: make_tiff(dict.fromkeys(range(256, 2000), (SHORT, [1])), b""), "1744 tags"),
}
