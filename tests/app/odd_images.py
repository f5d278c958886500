"""Unusual images: rare modes, orientations, and hostile bytes."""

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

ORIENTATION = 0x0112


def encode(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def encode_frames(image_format: str, **options: Any) -> bytes:
    first, *others = [make_photo(seed=seed) for seed in (1, 2, 3)]
    return encode(first, image_format, save_all=True, append_images=others, **options)


def make_photo(width: int = 61, height: int = 43, seed: int = 0) -> Image.Image:
    """Make a smooth RGB image with four different corners."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def make_png(width: int, height: int, depth: int, colour_type: int, rows: bytes, *chunks: bytes) -> bytes:
    """Make a PNG from raw rows of filter bytes and samples."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    body = b"".join([png_chunk(b"IHDR", header), *chunks, png_chunk(b"IDAT", zlib.compress(rows))])
    return b"\x89PNG\r\n\x1a\n" + body + png_chunk(b"IEND", b"")


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def exif_bytes(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif.tobytes()


def ordinary_images() -> dict[str, bytes]:
    """Return images of every supported kind, by a name that describes them."""
    photo = make_photo()
    alpha = Image.fromarray(np.linspace(0, 255, 61 * 43).reshape(43, 61).astype(np.uint8))
    translucent = photo.copy()
    translucent.putalpha(alpha)
    grey16 = Image.fromarray(np.linspace(0, 65535, 61 * 43).reshape(43, 61).astype(np.uint16))
    palette = photo.quantize(16)
    images = {f"{mode}.png": encode(photo.convert(mode), "PNG") for mode in ("1", "L", "P", "RGB")}
    images |= {"la.png": encode(translucent.convert("LA"), "PNG"), "rgba.png": encode(translucent, "PNG")}
    images |= {"grey16.png": encode(grey16, "PNG"), "grey16.tiff": encode(grey16, "TIFF")}
    images |= {"palette-int-alpha.png": encode(palette, "PNG", transparency=3)}
    images |= {"palette-bytes-alpha.png": encode(palette, "PNG", transparency=bytes(range(0, 256, 16)))}
    images |= {"colour-key.png": encode(photo, "PNG", transparency=photo.getpixel((0, 0)))}
    images |= {"rgb16.png": make_png(2, 2, 16, 2, (b"\0" + struct.pack(">6H", 65535, 300, 0, 1, 2, 40000)) * 2)}
    images |= {f"{mode}.jpg": encode(photo.convert(mode), "JPEG", quality=90) for mode in ("L", "RGB", "CMYK")}
    images |= {"progressive.jpg": encode(make_photo(700, 500), "JPEG", progressive=True)}
    images |= {"large.jpg": encode(make_photo(1601, 1203), "JPEG", quality=80)}
    images |= {"lossy.webp": encode(photo, "WEBP"), "lossless.webp": encode(translucent, "WEBP", lossless=True)}
    images |= {"animated.webp": encode_frames("WEBP")}
    images |= {"animated.gif": encode_frames("GIF")}
    images |= {"animated.png": encode_frames("PNG")}
    images |= {"transparent.gif": encode(palette, "GIF", transparency=3), "plain.bmp": encode(photo, "BMP")}
    images |= {"frames.mpo": encode_frames("MPO")}
    images |= {"pages.tiff": encode_frames("TIFF")}
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        images |= {f"{compression}.tiff": encode(photo, "TIFF", compression=compression)}
    images |= {f"{mode}.tiff": encode(photo.convert(mode), "TIFF") for mode in ("LAB", "CMYK", "YCbCr", "1", "LA")}
    images |= {"one-pixel.png": encode(photo.crop((0, 0, 1, 1)), "PNG"), "tall.png": encode(make_photo(3, 90), "PNG")}
    images |= {"wide.jpg": encode(make_photo(900, 20), "JPEG")}
    for orientation in range(1, 9):
        for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
            turned = encode(photo, kind, exif=exif_bytes(orientation))
            images |= {f"orientation-{orientation}.{kind.lower()}": turned}
    return images


def refused_images() -> dict[str, tuple[bytes, int]]:
    """Return images that are refused, each with its status."""
    photo = make_photo()
    jpeg, png = encode(photo, "JPEG"), encode(photo, "PNG")
    progressive = encode(photo, "JPEG", progressive=True)
    last_scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    text_bomb = png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(3_000_000)))
    cases = {
        "text": (b"hello, world", 415),
        "html": (b"<!doctype html><html></html>", 415),
        "json": (b'{"image": "x"}', 415),
        "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj", 415),
        "zip": (b"PK\x03\x04" + bytes(40), 415),
        "gzip": (zlib.compress(png), 415),
        "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 415),
        "mp4": (b"\0\0\0\x18ftypmp42" + bytes(40), 415),
        "ico": (encode(photo, "ICO"), 415),
        "ppm": (encode(photo, "PPM"), 415),
        "zeros": (bytes(1000), 415),
        "one-byte": (b"\xff", 415),
        "base64": (b"/9j/4AAQSkZJRgABAQAAAQABAAD", 415),
        "random": (np.random.default_rng(0).bytes(5000), 415),
        "float.tiff": (encode(Image.new("F", (9, 9), 0.5), "TIFF"), 415),
        "int32.tiff": (encode(Image.new("I", (9, 9), 70000), "TIFF"), 415),
        "magic-only.jpg": (jpeg[:4], 400),
        "magic-only.png": (png[:8], 400),
        "scans.jpg": (progressive[:-2] + last_scan * 300 + progressive[-2:], 400),
        "half.jpg": (jpeg[: len(jpeg) // 2], 400),
        "half.png": (png[: len(png) // 2], 400),
        "no-width.png": (make_png(0, 5, 8, 2, b""), 400),
        "no-data.png": (make_png(8, 8, 8, 2, b""), 400),
        "bad-checksum.png": (png[:40] + bytes([png[40] ^ 255]) + png[41:], 400),
        "text-bomb.png": (make_png(8, 8, 8, 2, (b"\0" + bytes(24)) * 8, text_bomb), 400),
        "bomb.png": (make_png(20_000, 20_000, 8, 2, b""), 413),
        "bomb-of-real-data.png": (make_png(20_000, 20_000, 1, 0, bytes(2501 * 20_000)), 413),
        "bomb-1bit.png": (make_png(60_000, 60_000, 1, 0, b""), 413),
        "bomb.gif": (b"GIF89a" + struct.pack("<HH", 65535, 65535) + encode(photo, "GIF")[10:], 413),
        "bomb.bmp": (b"BM" + bytes(12) + struct.pack("<IiiHHIIiiII", 40, 40_000, 40_000, 1, 24, *(0,) * 6), 413),
        "bomb.webp": (webp_header(16383, 16383), 413),
        "strip.png": (encode(Image.new("RGB", (1, 60_000)), "PNG"), 413),
    }
    return cases


def webp_header(width: int, height: int) -> bytes:
    """Make the header of an extended WebP file with a large canvas."""
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x10\0\0\0" + canvas
    return b"RIFF" + struct.pack("<I", len(body)) + body


def truncated_images() -> Iterator[tuple[str, bytes]]:
    """Yield images of several formats, truncated at several places."""
    encoders: dict[str, Callable[[], bytes]] = {
        "jpg": lambda: encode(make_photo(), "JPEG"),
        "png": lambda: encode(make_photo(), "PNG"),
        "webp": lambda: encode(make_photo(), "WEBP"),
        "gif": lambda: encode(make_photo(), "GIF"),
        "bmp": lambda: encode(make_photo(), "BMP"),
        "tiff": lambda: encode(make_photo(), "TIFF", compression="tiff_lzw"),
    }
    for name, make in encoders.items():
        data = make()
        for percent in (1, 3, 7, 15, 30, 45, 60, 75, 90, 97):
            yield f"cut-at-{percent}-percent.{name}", data[: max(1, len(data) * percent // 100)]
