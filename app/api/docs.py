"""`GET /docs`: Swagger UI. Its files are part of the service, so the browser needs no other origin."""

from html import escape
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, HTMLResponse

FOLDER = Path(__file__).parent / "swagger_ui"
DOCS_PATH = "/docs"
MEDIA_TYPES = {
    "swagger-ui.css": "text/css",
    "swagger-ui-bundle.js": "text/javascript",
    "start.js": "text/javascript",
}
# Swagger UI's icons are data URLs in its style sheet.
CONTENT_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
# Relative addresses also work behind the path prefix of a proxy. Those that begin with docs/ are next to this page.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""


def make_router(title: str) -> APIRouter:
    router = APIRouter()
    page = HTMLResponse(PAGE.format(title=escape(title)), headers={"Content-Security-Policy": CONTENT_POLICY})

    @router.get(DOCS_PATH, include_in_schema=False)
    async def show_docs() -> HTMLResponse:
        return page

    for name in MEDIA_TYPES:
        _add_file(router, name)
    return router


def _add_file(router: APIRouter, name: str) -> None:
    @router.get(f"{DOCS_PATH}/{name}", include_in_schema=False)
    async def show_file() -> FileResponse:
        return FileResponse(FOLDER / name, media_type=MEDIA_TYPES[name])
