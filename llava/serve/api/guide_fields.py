"""Constraints on an answer's text (guided decoding), as fields of a body: OpenAI's `response_format`, and vLLM's and SGLang's fields."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from llava.serve.api.body_models import StrictModel
from llava.serve.api.compat_fields import STRUCTURED_OUTPUTS_FIELDS, with_compat_fields
from llava.serve.http.errors import FieldError, field_path
from llava.serve.protocol import Guide, GuideKind, Limits

JsonSchema = dict[str, Any]
FormatType = Literal["text", "json_object", "json_schema"]
Choices = Annotated[list[str], Field(min_length=1, max_length=4096)]
ANY_OBJECT: JsonSchema = {"type": "object"}
MAX_DEPTH = 100
"""Maximum nesting of objects and lists in a schema."""


class NamedSchema(StrictModel):
    """A JSON schema as in OpenAI's API. It is enforced, `strict` or not."""

    name: str = Field(max_length=256)
    schema_: JsonSchema = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(StrictModel):
    """Plain text, any JSON object, or JSON that follows a schema."""

    type: FormatType
    json_schema: NamedSchema | None = None


@with_compat_fields(STRUCTURED_OUTPUTS_FIELDS)
class StructuredOutputs(StrictModel):
    """vLLM's field; exactly one of these."""

    json_: str | JsonSchema | None = Field(None, alias="json", description="A JSON schema.")
    json_object: bool | None = Field(None, description="Any JSON object.")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = Field(None, description="Lark's notation, or GBNF.")


class GuideFields(StrictModel):
    """Constraints on the answer; at most one. vLLM's older names and SGLang's mean the same as `structured_outputs`."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | JsonSchema | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    regex: str | None = None
    ebnf: str | None = None


_OTHER_NAMES = {
    "guided_json": GuideKind.JSON,
    "guided_regex": GuideKind.REGEX,
    "guided_choice": GuideKind.CHOICE,
    "guided_grammar": GuideKind.GRAMMAR,
    "regex": GuideKind.REGEX,
    "ebnf": GuideKind.GRAMMAR,
}


def read_guide(fields: GuideFields, limits: Limits, other: Guide | None = None) -> Guide | None:
    """The constraint on the answer, if any; the engine checks whether it supports it.

    Args:
        other: from a field of the API's own.

    Raises:
        FieldError: two of the fields at once, or one that is too long or not a JSON schema.
    """
    found = [] if other is None else [other]
    found += [*_of_response_format(fields.response_format, limits), *_of_structured_outputs(fields.structured_outputs, limits)]
    others = {name: getattr(fields, name) for name in _OTHER_NAMES}
    found += [guide_of(_OTHER_NAMES[name], value, name, limits) for name, value in others.items() if value is not None]
    if len(found) > 1:
        raise FieldError(f"{found[0].param} and {found[1].param} both constrain the answer; give one.", found[1].param)
    return found[0] if found else None


def _of_response_format(constraint: ResponseFormat | None, limits: Limits) -> list[Guide]:
    if constraint is None:
        return []
    schema = None if constraint.json_schema is None else constraint.json_schema.schema_
    found = guide_of_format(constraint.type, schema, ("response_format", "json_schema", "schema"), limits)
    return [] if found is None else [found]


def guide_of_format(format_type: FormatType, schema: JsonSchema | None, names: Sequence[str], limits: Limits) -> Guide | None:
    """OpenAI's formats, which its two APIs spell differently.

    Args:
        names: of the format's field, of what a schema adds to it, and of the schema's own field, if that is another.

    Raises:
        FieldError: a schema is missing, superfluous or too long.
    """
    param = field_path(names[:2])
    if format_type == "json_schema" and schema is None:
        raise FieldError(f"{param!r}: this field is missing.", param)
    if format_type != "json_schema" and schema is not None:
        raise FieldError(f"There is a schema, but the type is {format_type!r}; make it 'json_schema', or leave the schema out.", param)
    if schema is not None:
        return guide_of(GuideKind.JSON, schema, field_path(names), limits)
    return guide_of(GuideKind.JSON, ANY_OBJECT, names[0], limits) if format_type == "json_object" else None


def _of_structured_outputs(constraint: StructuredOutputs | None, limits: Limits) -> list[Guide]:
    if constraint is None:
        return []
    asked = {
        GuideKind.JSON: constraint.json_,
        GuideKind.REGEX: constraint.regex,
        GuideKind.CHOICE: constraint.choice,
        GuideKind.GRAMMAR: constraint.grammar,
    }
    found = [guide_of(kind, value, f"structured_outputs.{kind.value}", limits) for kind, value in asked.items() if value is not None]
    return found + ([guide_of(GuideKind.JSON, ANY_OBJECT, "structured_outputs.json_object", limits)] if constraint.json_object else [])


def guide_of(kind: GuideKind, value: str | JsonSchema | Sequence[str], param: str, limits: Limits) -> Guide:
    """One constraint as a guide.

    Args:
        value: a schema as an object or as text, choices, or the text of anything else. param: the field.

    Raises:
        FieldError: it is too long, nested too deeply, or not JSON.
    """
    text = value if isinstance(value, str) else _written(value, param)
    if len(text) > limits.max_guide_characters:
        raise FieldError(f"{param} has {len(text)} characters, expected at most {limits.max_guide_characters}.", param)
    if kind is GuideKind.JSON and isinstance(value, str):
        text = _written(_schema_of(value, param), param)
    return Guide(kind, text, param)


def _written(value: JsonSchema | Sequence[str], param: str) -> str:
    """Its JSON, of a depth that any thread can parse, however much of its stack is used up."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        insides = (outer.values() if isinstance(outer, dict) else outer for outer in level if isinstance(outer, dict | list))
        level = [each for inside in insides for each in inside]
    if level:
        raise FieldError(f"{param} is nested more than {MAX_DEPTH} levels deep; make it flatter.", param)
    return json.dumps(value)


def _schema_of(text: str, param: str) -> JsonSchema:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FieldError(f"{param} is a text, but not JSON; send the schema itself.", param) from error
    if not isinstance(schema, dict):
        raise FieldError(f"{param} is JSON, but not an object; send a JSON schema.", param)
    return schema
