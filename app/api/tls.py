"""TLS: reads certificate and key before loading begins, so that a bad one fails fast."""

import ssl
from pathlib import Path

from app.errors import SettingsError
from app.settings import Settings

# The last one: the key has another algorithm than the certificate.
MISMATCHES = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")


def open_tls(settings: Settings) -> ssl.SSLContext | None:
    """Read certificate and key. Returns None if TLS is not configured.

    Raises: SettingsError for a missing or unusable file, or a key that does not match the certificate.
    """
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    _require_pem("DTEM_TLS_CERTIFICATE", settings.tls_certificate, b"CERTIFICATE-----")
    _require_pem("DTEM_TLS_KEY", settings.tls_key, b"PRIVATE KEY-----")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    where = f"DTEM_TLS_CERTIFICATE={settings.tls_certificate} DTEM_TLS_KEY={settings.tls_key}"

    def refuse_passphrase() -> str:
        # Without this, OpenSSL prompts on the terminal and waits forever.
        raise SettingsError(f"DTEM_TLS_KEY={settings.tls_key}: the key must not have a passphrase")

    try:
        context.load_cert_chain(settings.tls_certificate, settings.tls_key, refuse_passphrase)
    except ssl.SSLError as error:
        reason = "the key does not match the certificate" if error.reason in MISMATCHES else f"cannot be used: {error}"
        raise SettingsError(f"{where}: {reason}") from error
    return context


def _require_pem(name: str, path: Path, mark: bytes) -> None:
    """Check a file. OpenSSL's own errors do not say which of the two is meant."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{name}={path}: {error.strerror or error}") from error
    if mark not in data:
        raise SettingsError(f"{name}={path}: not a PEM file with a {mark.decode().strip('-').lower()}")
