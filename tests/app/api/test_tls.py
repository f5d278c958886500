import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from app.api.tls import open_tls
from app.errors import SettingsError
from app.settings import Settings
from tests.app.certificates import encrypt_key, make_certificate

Files = tuple[Path, Path]


def settings(files: Files) -> Settings:
    return Settings(tls_certificate=files[0], tls_key=files[1])


def truncated(file: Path) -> Path:
    short = file.with_suffix(".short")
    short.write_bytes(file.read_bytes()[:80])
    return short


def empty(folder: Path) -> Path:
    file = folder / "empty"
    file.touch()
    return file


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return make_certificate(tmp_path)


def test_open_tls_reads_certificate_and_key(files: Files) -> None:
    context = open_tls(settings(files))
    assert context is not None
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2


def test_open_tls_without_files_returns_none() -> None:
    assert open_tls(Settings()) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda files: (files[0].with_name("none"), files[1]), ["DTEM_TLS_CERTIFICATE=", "none", "No such file"]),
        (lambda files: (files[0], files[1].with_name("none")), ["DTEM_TLS_KEY=", "none", "No such file"]),
        (lambda files: (files[0].parent, files[1]), ["DTEM_TLS_CERTIFICATE=", "directory"]),
        (lambda files: (files[1], files[1]), ["DTEM_TLS_CERTIFICATE=", "not a PEM file with a certificate"]),
        (lambda files: (files[0], files[0]), ["DTEM_TLS_KEY=", "not a PEM file with a private key"]),
        (lambda files: (empty(files[0].parent), files[1]), ["DTEM_TLS_CERTIFICATE=", "not a PEM file"]),
        (lambda files: (truncated(files[0]), files[1]), ["DTEM_TLS_CERTIFICATE=", "cannot be used"]),
        (lambda files: (files[0], truncated(files[1])), ["DTEM_TLS_KEY=", "cannot be used"]),
        (lambda files: (files[0], encrypt_key(files[1])), ["DTEM_TLS_KEY=", "passphrase"]),
        (
            lambda files: (files[0], make_certificate(files[0].parent, "other")[1]),
            ["DTEM_TLS_KEY=", "does not match the certificate"],
        ),
        (
            lambda files: (files[0], make_certificate(files[0].parent, "o", "rsa")[1]),
            ["DTEM_TLS_KEY=", "does not match the certificate"],
        ),
    ],
)
def test_open_tls_refuses_bad_files_with_one_line(
    files: Files, change: Callable[[Files], Files], words: list[str]
) -> None:
    with pytest.raises(SettingsError) as caught:
        open_tls(settings(change(files)))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
