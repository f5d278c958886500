"""Headers: what a browser must not do with an answer. There is no CORS: no page of another origin may read one."""

from starlette.types import Message

HSTS_SECONDS = 31_536_000
FIXED_HEADERS = [
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
]
CONTENT_POLICY = b"content-security-policy"
NOTHING = (CONTENT_POLICY, b"default-src 'none'; frame-ancestors 'none'")
NO_STORE = (b"cache-control", b"no-store")


def server_headers(*, is_tls: bool) -> list[tuple[str, str]]:
    """List what the server adds to every answer, its own refusals included."""
    hsts = ("Strict-Transport-Security", f"max-age={HSTS_SECONDS}")
    return [*FIXED_HEADERS, hsts] if is_tls else FIXED_HEADERS


def with_headers(start: Message, request_id: str) -> Message:
    """Add what the application says in every answer; a page that needs more than nothing has its own policy."""
    headers = [*start["headers"], NO_STORE, (b"x-request-id", request_id.encode("ascii"))]
    if not any(name == CONTENT_POLICY for name, _ in headers):
        headers.append(NOTHING)
    return {**start, "headers": headers}
