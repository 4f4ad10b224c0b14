"""Answers are held to what they have to be, token by token; what cannot be followed is refused, and a hostile grammar costs little."""

from __future__ import annotations

import json
import random
import re
import time
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from llava.inference import MICRO_MODEL
from llava.serve.engine.guides import KEPT, Guides, allowed, grammar_error, to_grammar
from llava.serve.protocol import ErrorKind, Guide, GuideKind, ServeError
from llava.tokenizer import load_tokenizer

SIZE, END = 641, 2
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(MICRO_MODEL)


@pytest.fixture(scope="module")
def guides(tokenizer: Any) -> Guides:
    return Guides(tokenizer, SIZE, [END])


def make_guide(kind: str, text: Any) -> Guide:
    return Guide(GuideKind(kind), text if isinstance(text, str) else json.dumps(text), "field")


def answer(guides: Guides, tokenizer: Any, guide: Guide, seed: int, longest: int = 400) -> str | None:
    """What somebody writes who takes any token that may come next; `None` where it does not end."""
    dice, own, ids = random.Random(seed), guides.begin(guide, "mine"), []
    while len(ids) < longest:
        choices = allowed([own], SIZE, CPU)[0].nonzero()[:, 0].tolist()
        token = END if END in choices and dice.random() < 0.5 else dice.choice(choices)
        own.take(token)
        if token == END:
            break
        ids.append(token)
        if own.finished:
            break
    else:
        return None
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


SIGN = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "sky blue"]}, "number": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["colour", "number"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(5))
def test_any_walk_through_a_schema_is_json_that_follows_it(guides, tokenizer, seed):
    text = answer(guides, tokenizer, make_guide("json", SIGN), seed)
    assert text is not None
    value = json.loads(text)
    assert value.keys() == {"colour", "number"} and value["colour"] in ("red", "sky blue") and value["number"] in range(100)


@pytest.mark.parametrize(
    ("kind", "text", "pattern"),
    [
        ("regex", "[0-9]{3}-[a-f]+", "[0-9]{3}-[a-f]+"),
        ("regex", "^[0-9]{3}$", "[0-9]{3}"),
        ("regex", "a/b|c", "a/b|c"),
        ("choice", ["yes", "no", "a.b (c)\\/\n", "é中"], None),
        ("grammar", 'start: "x" start | "y"', "x*y"),
        ("grammar", 'root ::= "x" root | "y"', "x*y"),
    ],
)
def test_any_walk_ends_in_what_was_asked_for(guides, tokenizer, kind, text, pattern):
    found = {answer(guides, tokenizer, make_guide(kind, text), seed) for seed in range(6)} - {None}
    assert found
    for each in found:
        assert each in [choice.strip() for choice in text] if pattern is None else re.fullmatch(pattern, each)


def test_an_answer_may_begin_with_the_space_that_most_tokens_have(guides, tokenizer):
    first = allowed([guides.begin(make_guide("choice", ["the", "cat"]), "mine")], SIZE, CPU)[0].nonzero()[:, 0].tolist()
    assert {tokenizer.convert_ids_to_tokens(token) for token in first} >= {"▁the", "t", "▁"}


def test_rows_are_looked_at_together_and_each_as_alone(guides):
    wanted = [make_guide("regex", "[a-c]x"), make_guide("choice", ["yes"]), make_guide("json", SIGN), make_guide("regex", "[a-c]x")]
    started = [guides.begin(each, "mine") for each in wanted]
    started[3].take(next(iter(allowed([started[3]], SIZE, CPU)[0].nonzero()[:, 0].tolist())))
    together = allowed(started, SIZE, CPU)
    assert together.shape == (4, SIZE)
    for row, own in enumerate(started):
        assert torch.equal(together[row], allowed([own], SIZE, CPU)[0])
    assert torch.equal(together[0], allowed([guides.begin(wanted[0], "mine")], SIZE, CPU)[0])  # others' steps are not its own


def test_vocabularies_wider_than_the_tokenizer_have_no_more_tokens(tokenizer):
    wide = allowed([Guides(tokenizer, 700, [END]).begin(make_guide("regex", ".*"), "mine")], 700, CPU)
    assert wide.shape == (1, 700) and not wide[0, SIZE:].any() and wide[0, END]


def test_a_grammar_is_built_once_and_few_are_kept(tokenizer, monkeypatch):
    built: list[Guide] = []
    own, original = Guides(tokenizer, SIZE, [END]), Guides._built
    monkeypatch.setattr(Guides, "_built", staticmethod(lambda guide, tokens: built.append(guide) or original(guide, tokens)))
    monkeypatch.setattr("llava.serve.engine.guides.grammar_error", lambda grammar: "")
    for _ in range(3):
        own.begin(make_guide("regex", "a"), "mine")
    for number in range(KEPT):
        own.begin(make_guide("regex", f"b{number}"), "mine")
    own.begin(make_guide("regex", f"b{KEPT - 1}"), "mine")
    assert len(built) == 1 + KEPT and len(own._known) == KEPT
    own.begin(make_guide("regex", "a"), "mine")
    assert len(built) == 2 + KEPT


REFUSED = [
    ("regex", "(a", ""),
    ("regex", "(?=a)b", ""),
    ("regex", "(" * 5000 + "a" + ")" * 5000, ""),
    ("json", {"type": "array", "uniqueItems": True}, ": it uses uniqueItems"),
    ("json", {"type": "object", "propertyNames": {"pattern": "a"}}, ": it uses propertyNames"),
    ("json", {"type": "nonsense"}, ""),
    ("json", {"$ref": "http://127.0.0.1:9/schema.json"}, ""),
    ("json", {"type": "string", "format": "secret-words"}, ""),
    ("grammar", "no grammar at all (", ""),
    ("grammar", "start: " + "(" * 20_000 + '"a"' + ")" * 20_000, ""),
    ("grammar", 'root ::= "a', ""),
]


@pytest.mark.parametrize(("kind", "text", "why"), REFUSED)
def test_what_cannot_be_followed_is_refused_without_the_librarys_words(guides, kind, text, why):
    with pytest.raises(ServeError) as refused:
        guides.begin(make_guide(kind, text), "mine")
    assert (refused.value.kind, refused.value.param) == (ErrorKind.INVALID_REQUEST, "field")
    assert refused.value.detail == f"The constraint in field is not supported{why}; the documentation says what is."


def test_the_log_has_the_details_of_a_refusal_under_the_request_id(guides, caplog):
    caplog.set_level("INFO", "llava.serve.engine.guides")
    with pytest.raises(ServeError):
        guides.begin(make_guide("json", {"type": "nonsense"}), "mine-7")
    [line] = caplog.messages
    assert line.startswith("request mine-7: its guide in field is refused: ") and "nonsense" in line


def chain(rules: int) -> str:
    """A grammar of a line whose length doubles with each rule."""
    return "start: r0\n" + "\n".join(f"r{rule}: r{rule + 1} r{rule + 1}" for rule in range(rules)) + f'\nr{rules}: "a"'


HOSTILE = {
    "a chain of rules that breaks the stack": ("grammar", chain(1400)),
    "patterns together that take for ever": (
        "json",
        {"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{length}}}"} for length in range(20, 40)]},
    ),
    "a large choice of choices": ("json", {"allOf": [{"anyOf": [{"required": [f"a{i}{j}"]} for j in range(4)]} for i in range(12)]}),
    "multiples of a large prime": ("json", {"type": "integer", "multipleOf": 999_999_937, "minimum": 0, "maximum": 10**18}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_takes_neither_the_server_nor_its_time(guides, name):
    start = time.process_time()
    with pytest.raises(ServeError, match="is not supported"):
        guides.begin(make_guide(*HOSTILE[name]), "mine")
    assert time.process_time() - start < 2


@pytest.mark.parametrize(("kind", "text"), [("regex", "x(a{1000}){1000}"), ("regex", "(a{1000}){1000}"), ("json", {"$ref": "#"})])
def test_what_becomes_too_much_on_the_way_ends_its_own_answer_alone(guides, kind, text):
    """A repetition of repetitions, and a schema that nothing follows."""
    hostile, other = guides.begin(make_guide(kind, text), "mine"), guides.begin(make_guide("regex", "x+"), "mine")
    start = time.process_time()
    with pytest.raises(ServeError, match="The constraint in field became too complex; simplify it.") as refused:
        for _ in range(5):
            both = allowed([hostile, other], SIZE, CPU)
            other.take(int(both[1].nonzero()[-1]))
            hostile.take(int(both[0].nonzero()[-1]))
    assert (refused.value.kind, refused.value.param) == (ErrorKind.INVALID_REQUEST, "field")
    assert time.process_time() - start < 1
    other.take(END)


@pytest.mark.parametrize("ways", ['a a | "x" | a a a', 'a a a a a a a a | "x" |', 'b "x" b | "x"\nb: a | a a | '])
def test_an_ambiguous_grammar_ends_before_its_steps_hold_others_up(guides, ways):
    """Each step of the engine waits for all its rows. Ways to read what is written grow with its length, and the time with their cube."""
    hostile = guides.begin(make_guide("grammar", f"start: a\na: {ways}"), "mine")
    with pytest.raises(ServeError, match="became too complex"):
        for _ in range(100):
            hostile.take(int(allowed([hostile], SIZE, CPU)[0].nonzero()[-1]))


def test_large_but_honest_schemas_are_taken(guides):
    fields = {f"field_{number}": {"type": "string", "description": "what it is " * 3} for number in range(100)}
    objects = ({"type": "object", "properties": fields, "required": list(fields)}, {"type": "object", "properties": fields})
    for honest in (*objects, {"enum": [f"value {n}" for n in range(1500)]}):
        own = guides.begin(make_guide("json", honest), "mine")
        for _ in range(30):
            own.take(int(allowed([own], SIZE, CPU)[0].nonzero()[-1]))
            if own.finished:
                break


def test_a_check_says_nothing_of_what_can_be_built():
    assert grammar_error(to_grammar(make_guide("json", SIGN))) == "" != grammar_error("start: (")


def test_a_tokenizer_of_another_kind_cannot_be_guided():
    with pytest.raises(ServeError, match="does not support constrained answers; leave the field out"):
        Guides([], SIZE, [END]).begin(make_guide("regex", "a"), "mine")
