import gzip
import zlib

import pytest

from app.api.v2.encoding import choose_encoding, compress, decompress, read_encoding
from app.errors import BodyTooLarge, MalformedBody, UnsupportedEncoding

TEXT = b"pixels " * 1000


@pytest.mark.parametrize(("encoding", "undo"), [("gzip", gzip.decompress), ("deflate", zlib.decompress)])
def test_compress_is_readable_by_the_standard_library(encoding: str, undo: object) -> None:
    packed = compress(TEXT, encoding)
    assert len(packed) < len(TEXT) / 10
    assert undo(packed) == TEXT  # type: ignore[operator]
    assert decompress(packed, encoding, len(TEXT)) == TEXT


def test_decompress_limits_the_decompressed_size() -> None:
    packed = gzip.compress(bytes(50_000_000))
    assert len(packed) < 100_000
    with pytest.raises(BodyTooLarge, match="Decompressed request body exceeds 1000 bytes"):
        decompress(packed, "gzip", 1000)
    with pytest.raises(BodyTooLarge):
        decompress(compress(TEXT, "deflate"), "deflate", len(TEXT) - 1)


@pytest.mark.parametrize(
    ("packed", "reason"),
    [
        (b"", "truncated gzip stream"),
        (TEXT, "is not valid gzip"),
        (gzip.compress(TEXT)[:-1], "truncated gzip stream"),
        (gzip.compress(TEXT)[:20], "truncated gzip stream"),
        (gzip.compress(TEXT) + b"more", "has 4 bytes after its gzip stream"),
        (zlib.compress(TEXT), "is not valid gzip"),
    ],
)
def test_decompress_refuses_broken_streams(packed: bytes, reason: str) -> None:
    with pytest.raises(MalformedBody, match=reason):
        decompress(packed, "gzip", 1_000_000)


def test_identity_leaves_the_body_unchanged() -> None:
    assert (read_encoding(None), read_encoding("Identity"), read_encoding(" GZIP ")) == ("identity", "identity", "gzip")
    assert decompress(TEXT, "identity", len(TEXT)) == TEXT


@pytest.mark.parametrize("header", ["br", "gzip, deflate", "zstd", "x" * 1000])
def test_other_encodings_are_refused_with_the_accepted_ones(header: str) -> None:
    with pytest.raises(UnsupportedEncoding) as caught:
        read_encoding(header)
    assert caught.value.headers["Accept-Encoding"] == "gzip, deflate, identity"
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        (None, "identity"),
        ("", "identity"),
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("br, deflate, gzip", "deflate"),
        ("GZIP;q=0.5", "gzip"),
        ("gzip;q=0, deflate;q=0.1", "deflate"),
        ("gzip; q=0.000", "identity"),
        ("br", "identity"),
        (";;,q=1", "identity"),
    ],
)
def test_choose_encoding_follows_accept_encoding(accept: str | None, chosen: str) -> None:
    assert choose_encoding(accept) == chosen
