"""Validating plain JSON values against a schema, with errors that name the field and quote no value."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from llava.serve.http.errors import FieldError, field_path

M = TypeVar("M", bound=BaseModel)


def validate(schema: type[M], value: Any) -> M:
    """Validate plain JSON values against a schema.

    Raises:
        FieldError: for the first error, by the name of its field; values are not quoted.
    """
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        first = max(found, key=lambda each: len(each["loc"]))  # of a union's branches, the one that fits furthest
        param = _field_path(first["loc"])
        others = [each for each in found if _field_path(each["loc"]) == param and len(each["loc"]) == len(first["loc"])]
        raise FieldError(f"{param or 'The body'!r}: {_what_is_wrong(first['loc'], others)}.", param or None) from error


def _what_is_wrong(loc: Sequence[int | str], found: Sequence[Mapping[str, Any]]) -> str:
    """A clause for the errors of one field: the field's own, else that of each kind of error, else pydantic's."""
    name = _INDEX.sub("[*]", _field_path(loc))
    if found[0]["type"] in ("union_tag_invalid", "union_tag_not_found"):  # pydantic's message quotes the value
        return f"expected an object whose type is {_PART_TYPES[name]}"
    if name in _FIELD_CLAUSES and found[0]["type"] not in ("extra_forbidden", "missing"):
        return _FIELD_CLAUSES[name]
    return ", or: ".join(dict.fromkeys(_KIND_CLAUSES.get(each["type"], each["msg"]) for each in found))


_GRANULARITY_CLAUSE = "expected 'auto', a whole number, or a list of 1 to 64 whole numbers"
_FORMAT_CLAUSE = "expected 'text', 'json_object' or 'json_schema'"
_SCHEMA_CLAUSE = "expected a JSON schema, as an object or as its text"
_FIELD_CLAUSES = {
    "granularity": _GRANULARITY_CLAUSE,
    "vis_token_granularity": _GRANULARITY_CLAUSE,
    "stop": "expected a text, or a short list of texts",
    "prompt": "expected a text, or a list of texts",
    "input": "expected a text, or a list of messages",
    "input[*].content": "expected a text, or a list of up to 1024 parts",
    "response_format.type": _FORMAT_CLAUSE,
    "text.format.type": _FORMAT_CLAUSE,
    "structured_outputs.json": _SCHEMA_CLAUSE,
    "guided_json": _SCHEMA_CLAUSE,
    "messages[*].content": "expected a text, or a list of up to 1024 parts",
}
"""For fields of which pydantic's message would list the branches of a union."""
_PART_TYPES = {
    "messages[*].content[*]": "'text' or 'image_url'",
    "input[*].content[*]": "'input_text', 'input_image' or 'output_text'",
}
_KIND_CLAUSES = {
    "extra_forbidden": "this field is unknown",
    "missing": "this field is missing",
    "model_type": "expected an object",  # pydantic's message names our classes
    "model_attributes_type": "expected an object",
    "dict_type": "expected an object",
    "list_type": "expected a list",
    "too_long": "the list is too long",  # the schema's limit is above the server's own, which is reported after parsing
}
"""By pydantic's error types."""


def _field_path(loc: Sequence[int | str]) -> str:
    """The names and indices in pydantic's path, without the branches of unions and the types of parts."""
    kinds = {index + 1 for index, part in enumerate(loc) if isinstance(part, int) and "content" in loc[:index]}
    return field_path([part for index, part in enumerate(loc) if index not in kinds and _is_field(part)])[:200]


def _is_field(part: int | str) -> bool:
    return isinstance(part, int) or not (part in _BRANCHES or "[" in part)


_INDEX = re.compile(r"\[\d+\]")
_BRANCHES = frozenset(("str", "int", "float", "bool", "none"))
