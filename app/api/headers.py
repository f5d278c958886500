"""Headers: the security headers of every response. There is no CORS: other origins cannot read a response."""

from starlette.types import Message

HSTS_SECONDS = 31_536_000
FIXED_HEADERS = [
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
]
CONTENT_POLICY = b"content-security-policy"
DENY_ALL = (CONTENT_POLICY, b"default-src 'none'; frame-ancestors 'none'")
NO_STORE = (b"cache-control", b"no-store")


def server_headers(*, is_tls: bool) -> list[tuple[str, str]]:
    """List the headers that the server adds to every response, its own errors included."""
    hsts = ("Strict-Transport-Security", f"max-age={HSTS_SECONDS}")
    return [*FIXED_HEADERS, hsts] if is_tls else FIXED_HEADERS


def with_headers(start: Message, request_id: str) -> Message:
    """Add the headers of every response. A response that already has a content policy keeps it."""
    headers = [*start["headers"], NO_STORE, (b"x-request-id", request_id.encode("ascii"))]
    if not any(name == CONTENT_POLICY for name, _ in headers):
        headers.append(DENY_ALL)
    return {**start, "headers": headers}
