"""The OpenAPI document of apps whose endpoints parse their bodies themselves, strictly, instead of leaving that to FastAPI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_REF = "#/components/schemas/{model}"


def describe_bodies(app: FastAPI, bodies: Mapping[str, type[BaseModel]], guarded: bool) -> None:
    """Make `app.openapi` describe the bodies of POST endpoints, and whether a key is required.

    Args:
        bodies: path to schema.
    """

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, bodies, guarded)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _document(app: FastAPI, bodies: Mapping[str, type[BaseModel]], guarded: bool) -> dict[str, Any]:
    found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    components = found.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    _, definitions = models_json_schema([(body, "validation") for body in bodies.values()], ref_template=_REF)
    schemas.update(definitions["$defs"])
    for path, body in bodies.items():
        content = {"application/json": {"schema": {"$ref": _REF.format(model=body.__name__)}}}
        found["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
    if guarded:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
    return found
