"""Describes bodies in /openapi.json that the gateway reads by itself."""

from __future__ import annotations

from typing import Any

import pydantic
from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

_REF = "#/components/schemas/{model}"


def json_body(model: type[pydantic.BaseModel]) -> dict[str, Any]:
    """The `openapi_extra` of a route whose body is a `model`; see describe_bodies."""
    schema = {"$ref": _REF.format(model=model.__name__)}
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


def describe_bodies(app: FastAPI, models: list[type[pydantic.BaseModel]]) -> None:
    """Adds the schemas of `models` to the document that the application shows."""
    build = app.openapi

    def openapi() -> dict[str, Any]:
        document = build()
        _, definitions = models_json_schema(
            [(model, "validation") for model in models], ref_template=_REF
        )
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(definitions["$defs"])
        return document

    app.openapi = openapi  # type: ignore[method-assign]
