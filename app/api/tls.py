"""TLS: the certificate is read before anything else is done, so that a wrong one stops the start with its reason."""

import ssl
from pathlib import Path

from app.errors import SettingsError
from app.settings import Settings

MISMATCHES = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")  # the last: of another algorithm


def open_tls(settings: Settings) -> ssl.SSLContext | None:
    """Read certificate and key; None where the service speaks plain HTTP.

    Raises: SettingsError for a file that is missing or cannot be used, or a key of another certificate.
    """
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    _require_pem("DTEM_TLS_CERTIFICATE", settings.tls_certificate, b"CERTIFICATE-----")
    _require_pem("DTEM_TLS_KEY", settings.tls_key, b"PRIVATE KEY-----")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    where = f"DTEM_TLS_CERTIFICATE={settings.tls_certificate} DTEM_TLS_KEY={settings.tls_key}"

    def refuse_passphrase() -> str:  # or OpenSSL would ask at the terminal, for ever
        raise SettingsError(f"DTEM_TLS_KEY={settings.tls_key}: the key needs a passphrase; store it without one")

    try:
        context.load_cert_chain(settings.tls_certificate, settings.tls_key, refuse_passphrase)
    except ssl.SSLError as error:
        reason = "the key is not the certificate's" if error.reason in MISMATCHES else f"cannot be used: {error}"
        raise SettingsError(f"{where}: {reason}") from error
    return context


def _require_pem(name: str, path: Path, mark: bytes) -> None:
    """Say which file it is; OpenSSL says of both the same."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{name}={path}: {error.strerror or error}") from error
    if mark not in data:
        raise SettingsError(f"{name}={path}: not a PEM file with a {mark.decode().strip('-').lower()}")
