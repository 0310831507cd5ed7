"""The page at `/`: static files, and what they need to know of the server."""

from __future__ import annotations

import pathlib
from typing import Any

from fastapi import APIRouter
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException

from megalith.serving.service import Service

FOLDER = pathlib.Path(__file__).parent / "static"
FILES = {path.name: path for path in FOLDER.iterdir()}
# Said here, because a machine's own table may call scripts plain text, which browsers refuse to run.
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {"Cache-Control": "no-cache"}  # a new server may bring a new page; security.py adds more


def router(service: Service) -> APIRouter:
    """The page, its files, and page/server.json. All answer without a token: the page is where one is typed in."""
    routes = APIRouter(include_in_schema=False)

    @routes.get("/")
    async def page() -> FileResponse:
        return await file("index.html")

    @routes.get("/page/server.json")
    async def server() -> dict[str, Any]:
        options = service.options
        top_p = options.top_p or 1.0  # as OpenAI's fields have it, in which 0 is not off
        defaults = {"temperature": options.temperature, "top_k": options.top_k, "top_p": top_p}
        return {"model": service.name, "defaults": defaults}

    @routes.get("/page/{name}")
    async def file(name: str) -> FileResponse:
        if name not in FILES:
            raise HTTPException(404, f"the page has no file {name!r}.")
        return FileResponse(FILES[name], media_type=MEDIA_TYPES[FILES[name].suffix], headers=HEADERS)

    return routes
