"""What is asked of a server, and what our own `Assistant` answers to it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from llava.inference import Assistant
from llava.messages import Message, Options, RoutingRequest, normalise_turns
from llava.openai_chat import chat_messages, data_url, processor_kwargs
from tests.vllm.server import ROOT, VllmServer

QUESTIONS = ROOT / "playground" / "eval" / "test.jsonl"
LEVELS = (4, 8, 16, 32, 64)
POLICIES = (
    *(RoutingRequest(level) for level in LEVELS),
    RoutingRequest(),
    RoutingRequest((4, 64)),
    RoutingRequest((8, 16, 32)),
    RoutingRequest(max_visual_tokens=100),
    RoutingRequest(max_visual_tokens=250),
    RoutingRequest(bias=-0.7),
    RoutingRequest(bias=0.7),
    RoutingRequest((8, 32, 64), max_visual_tokens=250, bias=0.3),
)
"""Every form that a request's wish can have."""


@dataclass(frozen=True)
class Case:
    """A conversation with its images and its wish."""

    name: str
    turns: tuple[Message, ...]
    images: tuple[Image.Image, ...] = ()
    routing: RoutingRequest = field(default_factory=RoutingRequest)


@dataclass(frozen=True)
class Outcome:
    """What came out: compared as a whole. A test by answers alone would miss most wrong granularities."""

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int


def question_cases(limit: int | None = None) -> list[Case]:
    """All questions of the evaluation split, the policies dealt out in turn; or about `limit` of them, evenly spread."""
    rows = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    step = 1 if limit is None else max(1, len(rows) // limit)
    kept = rows[::step]
    images = {row["image"]: Image.open(QUESTIONS.parent / row["image"]).convert("RGB") for row in kept}
    return [
        Case(f"{row['question_id']}", (Message("user", f"<image>\n{row['text']}"),), (images[row["image"]],), policy)
        for row, policy in zip(kept, list(POLICIES) * len(kept), strict=False)
    ]


def special_cases() -> list[Case]:
    """What the questions do not have: text alone, several turns, two images, odd shapes, words that spell special tokens."""
    first, second = (Image.open(QUESTIONS.parent / f"images/{number:03}.png").convert("RGB") for number in (0, 1))
    wide, thin = first.resize((300, 40)), second.resize((33, 250))
    ask = "<image>\nWhat is the background colour?"
    turns = (Message("user", ask), Message("assistant", "beige"), Message("user", "What handwritten digit is there?"))
    cases = [
        Case("text", (Message("user", "Hello"),)),
        Case("text, several turns", (Message("user", "Hello"), Message("assistant", "Hi"), Message("user", "Who are you?"))),
        Case("a system turn", (Message("system", "Answer in a word."), Message("user", ask)), (first,), RoutingRequest(16)),
        Case("spelled tokens", (Message("user", "<image>\nIs </s> a shape?<s> <unk>  two spaces"),), (first,), RoutingRequest(8)),
        Case("one pixel", (Message("user", ask),), (first.resize((1, 1)),), RoutingRequest(64)),
    ]
    for policy in POLICIES:
        two = (Message("user", "<image>\n<image>\nWhat is the background colour?"),)
        cases += [
            Case(f"several turns, {policy}", turns, (first,), policy),
            Case(f"wide, {policy}", (Message("user", ask),), (wide,), policy),
            Case(f"thin, {policy}", (Message("user", ask),), (thin,), policy),
            Case(f"two images, {policy}", two, (first, wide), policy),
            Case(f"an image twice, {policy}", two, (second, second), policy),
            Case(f"an image in each turn, {policy}", (*turns[:2], Message("user", ask)), (second, thin), policy),
        ]
    return cases


def answers_of(assistant: Assistant, cases: Sequence[Case]) -> dict[str, Outcome]:
    """Our own answers, by the cases' names."""
    found = {}
    for case in cases:
        answer = assistant.answer(case.images, case.turns, Options(max_new_tokens=24, routing=case.routing))
        found[case.name] = Outcome(answer.text, tuple(answer.token_ids), answer.prompt_tokens)
    return found


def store(outcomes: dict[str, Outcome], path: Path) -> None:
    """Keep outcomes in a file."""
    path.write_text(json.dumps({name: [each.text, each.token_ids, each.prompt_tokens] for name, each in outcomes.items()}))


def read(path: Path) -> dict[str, Outcome]:
    """Outcomes that `store` kept."""
    return {name: Outcome(text, tuple(ids), length) for name, (text, ids, length) in json.loads(path.read_text()).items()}


def ask(server: VllmServer, case: Case, **fields: Any) -> Outcome:
    """A server's answer to a case."""
    turns = normalise_turns(case.turns, len(case.images))
    if wish := processor_kwargs(case.routing):
        fields["mm_processor_kwargs"] = wish
    response = server.chat(chat_messages(turns, [data_url(image) for image in case.images]), **fields)
    assert response.status_code == 200, f"{case.name}: {response.text[:500]}"
    answer = response.json()
    [choice] = answer["choices"]
    return Outcome(choice["message"]["content"].strip(), tuple(choice["token_ids"]), answer["usage"]["prompt_tokens"])


def outcomes_of(server: VllmServer, cases: Iterable[Case], clients: int = 8, seed: int = 0, **fields: Any) -> dict[str, Outcome]:
    """A server's answers by the cases' names; `clients` ask at once, in a shuffled order."""
    shuffled = list(cases)
    random.Random(seed).shuffle(shuffled)
    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(lambda case: ask(server, case, **fields), shuffled))
    return {case.name: outcome for case, outcome in zip(shuffled, found, strict=True)}


def differences(server: VllmServer, cases: Sequence[Case], expected: dict[str, Outcome], **options: Any) -> list[str]:
    """The cases whose outcome is not the expected one; options as in `outcomes_of`."""
    found = outcomes_of(server, cases, **options)
    wrong = [case for case in cases if found[case.name] != expected[case.name]]
    return [f"{case.name} ({case.routing}): {found[case.name]}, expected {expected[case.name]}" for case in wrong]
