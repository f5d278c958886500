"""Keys: who may call. Without keys everyone may; with them, everything but health and the documentation needs one."""

import hashlib
import hmac
import re
from pathlib import Path

from starlette.types import Scope

from app.errors import SettingsError, Unauthorized
from app.settings import Settings

WELL_FORMED = re.compile(r"[!-+\--~]+")  # visible ASCII without the comma: what fits into a header and into the list
OPEN_PREFIXES = ("/health/", "/v2/health/")  # orchestrators have no key
OPEN_PATHS = ("/docs", "/openapi.json")
REALM = 'Bearer realm="dtem-serve"'


class Keys:
    """Keeps digests: they are of one length, so a comparison tells nothing, and a dump of memory not much."""

    def __init__(self, keys: list[str]) -> None:
        self._digests = [_digest(key.encode("ascii")) for key in keys]

    def __repr__(self) -> str:
        return f"<Keys n={len(self._digests)}>"

    @property
    def are_needed(self) -> bool:
        return bool(self._digests)

    def require(self, scope: Scope) -> None:
        """Let a request through, or refuse it before its body is read.

        Raises: Unauthorized.
        """
        if not self.are_needed or is_open(scope["path"]):
            return
        offered = offered_keys(scope)
        if not offered:
            raise Unauthorized("Send a key as `Authorization: Bearer <key>` or `X-API-Key: <key>`.", REALM)
        digests = [_digest(key) for key in offered]
        matches = [hmac.compare_digest(digest, known) for digest in digests for known in self._digests]
        if not any(matches):
            raise Unauthorized("This key is not known here.", f'{REALM}, error="invalid_token"')


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_PREFIXES)


def offered_keys(scope: Scope) -> list[bytes]:
    """List the keys in a request's headers."""
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
    """Read the keys that callers may use.

    Raises: SettingsError for a file without keys, or a key that no header can carry; it never says the key.
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


def _require_well_formed(words: list[str], where: str) -> list[str]:
    keys = [word.strip() for word in words]
    if not keys:
        raise SettingsError(f"{where}: there is no key in it")
    for place, key in enumerate(keys, 1):
        if not WELL_FORMED.fullmatch(key):
            reason = "is empty" if not key else "has other characters than visible ASCII without commas"
            raise SettingsError(f"{where}: key {place} of {len(keys)} {reason}")
    return keys
