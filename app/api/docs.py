"""`GET /docs`: Swagger UI. Its scripts are loaded from a CDN, so the browser needs internet access."""

import base64
import hashlib
import re

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse

DOCS_PATH = "/docs"
SWAGGER_UI = "https://cdn.jsdelivr.net/npm/swagger-ui-dist@5/"
INLINE_SCRIPT = re.compile("<script>(.*?)</script>", re.DOTALL)


def make_router(title: str) -> APIRouter:
    router = APIRouter()
    page = get_swagger_ui_html(
        # Relative, so that it also works behind the path prefix of a proxy.
        openapi_url="openapi.json",
        title=title,
        swagger_js_url=f"{SWAGGER_UI}swagger-ui-bundle.js",
        swagger_css_url=f"{SWAGGER_UI}swagger-ui.css",
        swagger_favicon_url="data:,",
    )
    page.headers["Content-Security-Policy"] = content_policy(bytes(page.body).decode())

    @router.get(DOCS_PATH, include_in_schema=False)
    async def show_docs() -> HTMLResponse:
        return page

    return router


def content_policy(page: str) -> str:
    """Make a policy that allows the resources of the page, and its inline scripts by their digests."""
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()) for script in INLINE_SCRIPT.findall(page)]
    scripts = " ".join(f"'sha256-{digest.decode()}'" for digest in digests)
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {SWAGGER_UI} {scripts}",
            f"style-src {SWAGGER_UI} 'unsafe-inline'",
            "img-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )
