"""A Postman collection (v2.1) of the OpenAPI schema: one folder a tag, one request an operation, with its example and its answers."""

import json
from typing import Any

_FORMAT = "https://schema.getpostman.com/json/collection/v2.1.0/collection.json"
# What a request is signed with, by the schema's names; an operation's first choice counts.
_AUTH: dict[str, dict[str, Any]] = {
    "jwtAuth": {"type": "bearer", "bearer": [{"key": "token", "value": "{{access_token}}"}]},
    "apiKey": {
        "type": "apikey",
        "apikey": [
            {"key": "key", "value": "Authorization"},
            {"key": "value", "value": "Api-Key {{api_key}}"},
            {"key": "in", "value": "header"},
        ],
    },
}
_VARIABLES = {"base_url": "http://127.0.0.1:8000", "access_token": "", "api_key": ""}


def collection(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the collection; the same schema gives the same one."""
    folders: dict[str, list[dict[str, Any]]] = {tag["name"]: [] for tag in schema["tags"]}
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            folders[operation["tags"][0]].append(_item(schema, path, method, operation))
    descriptions = {tag["name"]: tag["description"] for tag in schema["tags"]}
    return {
        "info": {"name": schema["info"]["title"], "description": schema["info"]["description"], "schema": _FORMAT},
        "item": [{"name": name, "description": descriptions[name], "item": items} for name, items in folders.items()],
        "variable": [{"key": name, "value": value} for name, value in _VARIABLES.items()],
    }


def _item(schema: dict[str, Any], path: str, method: str, operation: dict[str, Any]) -> dict[str, Any]:
    answers = [
        {
            "name": name,
            "code": int(status),
            "header": [{"key": "Content-Type", "value": media_type}],
            "body": json.dumps(_resolved(schema, example)["value"], indent=2, ensure_ascii=False),
        }
        for status, answer in sorted(operation["responses"].items())
        for media_type, content in answer.get("content", {}).items()
        for name, example in content.get("examples", {}).items()
    ]
    return {"name": operation["summary"], "request": _request(schema, path, method, operation), "response": answers}


def _request(schema: dict[str, Any], path: str, method: str, operation: dict[str, Any]) -> dict[str, Any]:
    given: dict[str, list[dict[str, Any]]] = {"path": [], "query": [], "header": []}
    for parameter in operation.get("parameters", []):
        shown = {"key": parameter["name"], "value": "", "description": parameter.get("description", "")}
        given[parameter["in"]].append(shown if parameter["in"] == "path" else {**shown, "disabled": True})
    address = {
        "raw": "{{base_url}}" + path.replace("{", ":").replace("}", ""),
        "host": ["{{base_url}}"],
        "path": [part.replace("{", ":").replace("}", "") for part in path.strip("/").split("/")],
        "query": given["query"],
        "variable": given["path"],
    }
    request = {"method": method.upper(), "description": operation.get("description", ""), "header": given["header"], "url": address}
    request["auth"] = next((_AUTH[name] for choice in operation.get("security", []) for name in choice), {"type": "noauth"})
    if content := operation.get("requestBody", {}).get("content"):
        media_type, body = next(iter(content.items()))
        request["header"] = [{"key": "Content-Type", "value": media_type}, *given["header"]]
        request["body"] = {"mode": "raw", "raw": _example(schema, body), "options": {"raw": {"language": "json"}}}
    return request


def _example(schema: dict[str, Any], body: dict[str, Any]) -> str:
    """Return the first example of a body, or else one that its schema makes."""
    examples = [example["value"] for example in body.get("examples", {}).values()]
    value = examples[0] if examples else _made_of(schema, body["schema"])
    return value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)


def _made_of(schema: dict[str, Any], shape: dict[str, Any]) -> Any:
    """Return a value of this shape: required fields only, filled with what the shape itself suggests."""
    shape = _resolved(schema, shape)
    for word in ("allOf", "oneOf", "anyOf"):
        if word in shape and "properties" not in shape:
            return _made_of(schema, shape[word][0])
    for word in ("example", "default"):
        if word in shape:
            return shape[word]
    if "enum" in shape:
        return shape["enum"][0]
    kind = shape["type"][0] if isinstance(shape.get("type"), list) else shape.get("type")
    if kind == "object":
        return {name: _made_of(schema, shape["properties"][name]) for name in shape.get("required", [])}
    if kind == "array":
        return [_made_of(schema, shape["items"])] * shape.get("minItems", 1)
    return {"integer": shape.get("minimum", 1), "number": 0.5, "boolean": True}.get(str(kind), "…")


def _resolved(schema: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """Return the part, or what it refers to."""
    if "$ref" not in part:
        return part
    _, kind, name = part["$ref"].rsplit("/", 2)
    found: dict[str, Any] = schema["components"][kind][name]
    return found
