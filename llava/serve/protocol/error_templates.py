"""Messages about errors that only a worker can find in a request, since it alone has the model and its flags: templates with placeholders.

A controller does not trust its workers' messages, see `llava.serve.cluster.refusals`. It passes one on that matches a template, with a
number, the offending field or keywords of JSON Schema in each placeholder: nothing else can be said that way.
"""

from __future__ import annotations

import re
from functools import cache
from string import Formatter

AT_MOST = "{param} is {number}, expected at most {most}."
TOO_MANY_ANSWERS = "n is {number}, but this server generates at most {most} answers at once; request fewer."
NO_IMAGES = "This model takes no images."
TOO_LONG = "The text of the prompt is too long: it leaves no room for an answer within {positions} positions; shorten it."
TOO_LONG_WITH_IMAGES = (
    "With its images the prompt leaves no room for an answer within {positions} positions; shorten it or choose a coarser granularity."
)
NO_SUCH_TOKEN = "There is no token {number}; this model's tokenizer has {count}, counted from 0."
TOKEN_OUT_OF_VOCABULARY = "{param} has the token id {number}, but this model's vocabulary has {count}, counted from 0."
GUIDE_UNSUPPORTED = "The constraint in {param} is not supported; the documentation says what is."
GUIDE_UNSUPPORTED_KEYWORDS = "The constraint in {param} is not supported: it uses {keywords}; the documentation says what is."
GUIDE_TOO_COMPLEX = "The constraint in {param} became too complex; simplify it."
GUIDES_UNSUPPORTED = "This model does not support constrained answers; leave the field out."
BACKEND_LACKS_FIELD = "The server behind this model is not known to support {param}; leave it out."
BACKEND_LACKS_GRANULARITIES = (
    "The server behind this model has no granularities to choose from; leave out granularity, max_visual_tokens and granularity_bias."
)
BACKEND_LACKS_DETAIL = (
    "The server behind this model takes one granularity for all images of a request; give all of them the same detail, and none together "
    "with max_visual_tokens."
)
BACKEND_LACKS_TOKENS = "The server behind this model does not return tokens."
BACKEND_READS_OTHERWISE = (
    "The server behind this model would read this prompt in another way: it is of another conversation template, or has an image within a "
    "line of text; send messages with images as parts of their own to /v1/chat/completions."
)
UNKNOWN_TEMPLATE = (
    "The server behind this model takes messages, and this prompt matches no known template; send messages to "
    "/v1/chat/completions."
)
ERROR_TEMPLATES = (
    AT_MOST,
    TOO_MANY_ANSWERS,
    NO_IMAGES,
    TOO_LONG,
    TOO_LONG_WITH_IMAGES,
    NO_SUCH_TOKEN,
    TOKEN_OUT_OF_VOCABULARY,
    GUIDE_UNSUPPORTED,
    GUIDE_UNSUPPORTED_KEYWORDS,
    GUIDE_TOO_COMPLEX,
    GUIDES_UNSUPPORTED,
    BACKEND_LACKS_FIELD,
    BACKEND_LACKS_GRANULARITIES,
    BACKEND_LACKS_DETAIL,
    BACKEND_LACKS_TOKENS,
    BACKEND_READS_OTHERWISE,
    UNKNOWN_TEMPLATE,
)

UNSUPPORTED_KEYWORDS = frozenset(
    "additionalItems contains dependencies dependentRequired dependentSchemas else if maxContains maxProperties minContains minProperties "
    "not oneOf propertyNames then unevaluatedItems unevaluatedProperties uniqueItems".split()
)
"""Of JSON Schema; those that a message may name as unsupported."""
_KEYWORD = "|".join(sorted(UNSUPPORTED_KEYWORDS, key=len, reverse=True))
_PLACEHOLDERS = {"param": "(?P<param>.{1,200})", "keywords": f"(?:{_KEYWORD})(?:, (?:{_KEYWORD}))*"}
_NUMBER = r"-?\d{1,19}"


def matches_template(text: str, template: str, param: str | None) -> bool:
    """Whether a text is a template, filled in.

    Args:
        param: what the placeholder of that name has to hold; all but it and `keywords` hold a whole number.
    """
    found = _pattern(template).fullmatch(text)
    return found is not None and found.groupdict().get("param", param) == param


@cache
def _pattern(template: str) -> re.Pattern[str]:
    parts = Formatter().parse(template)
    return re.compile("".join(re.escape(text) + (_PLACEHOLDERS.get(name, _NUMBER) if name else "") for text, name, _, _ in parts), re.ASCII)
