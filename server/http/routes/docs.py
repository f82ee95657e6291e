"""GET /docs: the endpoints on one plain page, made from the schema. It loads nothing from anywhere."""

from __future__ import annotations

from html import escape
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, Response

router = APIRouter(include_in_schema=False)

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem}"
    "code{background:#8882;padding:.1em .3em}dt{margin-top:1rem}dd{margin:0 0 0 1rem}"
)
_METHODS = ("get", "post", "put", "patch", "delete")


@router.get("/docs")
async def docs(request: Request) -> Response:
    """Describe the endpoints for a person."""
    page = page_of(request.app.openapi())
    return HTMLResponse(
        page, headers={"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
    )


def page_of(schema: dict[str, Any]) -> str:
    """The page for a schema: each operation with its summary, and the fields of its body."""
    known = schema.get("components", {}).get("schemas", {})
    parts = []
    for path, operations in schema["paths"].items():
        for method in _METHODS:
            if (operation := operations.get(method)) is None:
                continue
            head = f"<dt><code>{method.upper()} {escape(path)}</code></dt>"
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            name = body.get("schema", {}).get("$ref", "").rpartition("/")[2]
            fields = ", ".join(
                f"<code>{escape(field)}</code>" for field in known.get(name, {}).get("properties", ())
            )
            about = escape(operation.get("summary", ""))
            parts.append(f"{head}<dd>{about}{f'<br>Fields: {fields}' if fields else ''}</dd>")
    title = escape(f"{schema['info']['title']} {schema['info']['version']}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head>'
        f"<body><h1>{title}</h1><p>{escape(schema['info'].get('description', ''))} The whole schema, with the type of each "
        f'field: <a href="openapi.json">openapi.json</a>.</p><dl>{"".join(parts)}</dl></body></html>'
    )
