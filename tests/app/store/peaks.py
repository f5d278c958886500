"""Prints the estimated and the measured memory of decoding each kind of image, as JSON. Run as a module."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from app.bootstrap import prepare_process
from app.store.manifest import Input
from app.store.preprocessing import DecodeLimits, limit_pillow, open_image
from tests.app.image_bombs import fax_tiff, lossless_webp, runs_bmp, scans_jpeg, tile_tiff
from tests.app.odd_images import encode, exif_bytes, make_photo, ordinary_images
from tests.app.tiny_store import make_input

SIDE = 1500
WHOLE = {"strip_size": 1 << 30}
PROC = Path("/proc/self")


def make_images() -> dict[str, bytes]:
    photo, turned = make_photo(SIDE, SIDE), {"exif": exif_bytes(6)}
    translucent = photo.copy()
    translucent.putalpha(200)
    deep = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) << 8)
    images = {f"{mode}.png": encode_png(photo.convert(mode)) for mode in ("1", "L", "P", "RGB")}
    images |= {f"{mode}.png": encode_png(translucent.convert(mode)) for mode in ("LA", "RGBA")}
    images |= {"turned.png": encode_png(photo, **turned), "turned-rgba.png": encode_png(translucent, **turned)}
    images |= {"palette.png": encode_png(photo.convert("P"), transparency=3, **turned)}
    images |= {"colour-key.png": encode_png(photo, transparency=(1, 2, 3)), "deep.png": encode_png(deep)}
    images |= {"deep-key.png": encode_png(deep, transparency=300, **turned), "deep.tiff": encode(deep, "TIFF")}
    for mode in ("L", "RGB", "CMYK"):
        converted = photo.convert(mode)
        images |= {f"{mode}.jpg": encode(converted, "JPEG"), f"{mode}.tiff": encode(converted, "TIFF", **WHOLE)}
        images |= {f"progressive-{mode}.jpg": encode(converted, "JPEG", progressive=True, subsampling=0)}
    images |= {"scans.jpg": scans_jpeg(SIDE, SIDE, 5), "small.jpg": encode(make_photo(900, 700), "JPEG")}
    images |= {"plain.bmp": encode(photo, "BMP"), "runs.bmp": runs_bmp(SIDE, SIDE, b"\0\2\0\xff" * 8)}
    images |= {"plain.gif": encode(photo, "GIF"), "clear.gif": encode(photo.convert("P"), "GIF", transparency=3)}
    images |= {"lossless.webp": lossless_webp(SIDE, SIDE), "lossy.webp": encode(photo, "WEBP", method=0)}
    images |= {"turned.webp": encode(translucent, "WEBP", method=0, **turned)}
    for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "lzma", "zstd"):
        images |= {f"{name}.tiff": encode(photo, "TIFF", compression=name, **WHOLE)}
    for mode in ("YCbCr", "LAB", "1", "P"):
        images |= {f"{mode}.tiff": encode(photo.convert(mode), "TIFF", compression="tiff_lzw", **turned, **WHOLE)}
    images |= {"fax.tiff": fax_tiff(SIDE, SIDE), "tile.tiff": tile_tiff(5000)}
    images |= {
        "strip.png": encode(make_photo(40, 8000), "PNG"),
        "strip-turned.png": encode(make_photo(8000, 40), "PNG"),
    }
    return images


def encode_png(image: Image.Image, **options: Any) -> bytes:
    return encode(image, "PNG", compress_level=1, **options)


def measure(data: bytes, rule: Input) -> dict[str, Any]:
    rest_bytes = _read_status("VmRSS")
    # Resets the peak.
    (PROC / "clear_refs").write_text("5", encoding="ascii")
    opened = open_image(data, rule, DecodeLimits(50_000_000))
    opened.decode()
    return {"estimated": opened.cost.n_bytes, "measured": _read_status("VmHWM") - rest_bytes}


def _read_status(name: str) -> int:
    lines = (PROC / "status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def main() -> None:
    prepare_process()
    limit_pillow(50_000_000)
    rule = Input.model_validate_json(json.dumps(make_input(side=224)))
    images = make_images()
    # A library allocates permanent memory at its first use.
    for data in ordinary_images().values():
        measure(data, rule)
    print(json.dumps({name: measure(data, rule) for name, data in images.items()}))


if __name__ == "__main__":
    main()
