"""Keys: API keys. If any are set, every path except health and documentation requires one."""

import hashlib
import hmac
import re
from pathlib import Path

from starlette.types import Scope

from app.errors import SettingsError, Unauthorized
from app.settings import Settings

# Visible ASCII without the comma: valid in a header and in a comma-separated list.
WELL_FORMED = re.compile(r"[!-+\--~]+")
# Probes of orchestrators send no key.
OPEN_PREFIXES = ("/health/", "/v2/health/", "/docs/")
OPEN_PATHS = ("/docs", "/openapi.json")
REALM = 'Bearer realm="dtem-serve"'


class Keys:
    """Stores only digests. They have equal length, so comparing them reveals nothing about a key by its timing."""

    def __init__(self, keys: list[str]) -> None:
        self._digests = [_digest(key.encode("ascii")) for key in keys]

    def __repr__(self) -> str:
        return f"<Keys n={len(self._digests)}>"

    @property
    def are_required(self) -> bool:
        return bool(self._digests)

    def require(self, scope: Scope) -> None:
        """Check the key of a request, before its body is read.

        Raises: Unauthorized.
        """
        if not self.are_required or is_open(scope["path"]):
            return
        given = list_keys(scope)
        if not given:
            raise Unauthorized("Missing API key: send `Authorization: Bearer <key>` or `X-API-Key: <key>`.", REALM)
        digests = [_digest(key) for key in given]
        matches = [hmac.compare_digest(digest, known) for digest in digests for known in self._digests]
        if not any(matches):
            raise Unauthorized("Unknown API key.", f'{REALM}, error="invalid_token"')


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_PREFIXES)


def list_keys(scope: Scope) -> list[bytes]:
    """List the keys in the headers of a request."""
    keys: list[bytes] = []
    for name, value in scope["headers"]:
        if name == b"x-api-key":
            keys.append(value.strip())
        elif name == b"authorization":
            scheme, _, credentials = value.partition(b" ")
            if scheme.lower() == b"bearer":
                keys.append(credentials.strip())
    return keys


def read_keys(settings: Settings) -> Keys:
    """Read the API keys from the settings.

    Raises: SettingsError for a file without keys or a malformed key. The message never contains a key.
    """
    if settings.api_key_file is not None:
        lines = _read_lines(settings.api_key_file)
        return Keys(_require_well_formed(lines, f"DTEM_API_KEY_FILE={settings.api_key_file}"))
    if settings.api_keys is not None:
        return Keys(_require_well_formed(settings.api_keys.get_secret_value().split(","), "DTEM_API_KEYS"))
    return Keys([])


def _read_lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="ascii").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise SettingsError(f"DTEM_API_KEY_FILE={path}: not ASCII text") from error
    except OSError as error:
        raise SettingsError(f"DTEM_API_KEY_FILE={path}: {error.strerror or error}") from error


def _require_well_formed(texts: list[str], where: str) -> list[str]:
    keys = [text.strip() for text in texts]
    if not keys:
        raise SettingsError(f"{where}: contains no key")
    for place, key in enumerate(keys, 1):
        if not WELL_FORMED.fullmatch(key):
            reason = "is empty" if not key else "must be visible ASCII without spaces or commas"
            raise SettingsError(f"{where}: key {place} of {len(keys)} {reason}")
    return keys
