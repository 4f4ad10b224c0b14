"""From a finished prompt back to its turns.

Clients of LLaVA's protocol send prompts that they have written with a conversation template, while other servers take turns and write the
prompt themselves. The turns are found by the template's separators, and accepted only if writing them again gives the same prompt.
"""

from __future__ import annotations

import dataclasses

from llava.conversation import Conversation, SeparatorStyle, conv_templates
from llava.messages import Message

_ROLES = ("user", "assistant")


def read_prompt(prompt: str) -> tuple[Message, ...] | None:
    """The turns of a prompt that ends where the next answer begins: a system turn where there is a system text, then the others.

    Returns:
        `None` where no template of `conv_templates` writes this prompt.
    """
    for template in conv_templates.values():
        if template.sep_style is SeparatorStyle.PLAIN:
            continue
        empty = dataclasses.replace(template, messages=[], offset=0)
        read = _read_instructions(prompt, empty) if template.sep_style is SeparatorStyle.LLAMA_2 else _read_roles(prompt, empty)
        if read is not None and _write(empty, *read) == prompt:
            return _messages(*read)
    return None


def _read_roles(prompt: str, template: Conversation) -> tuple[str, list[str]] | None:
    """System text and turns where every turn starts with its role's name."""
    colon = "" if template.sep_style is SeparatorStyle.MPT else ":"
    space = " " if colon else ""
    marks = [role + colon for role in template.roles]
    after_answer = template.sep2 if template.sep_style is SeparatorStyle.TWO else template.sep
    separators = (template.sep, after_answer or "")
    head = template.system_head
    start = prompt.find(template.sep + marks[0], len(head))
    if start < 0 or not prompt.startswith(head):
        return None
    system, position = prompt[len(head) : start], start + len(template.sep)
    texts: list[str] = []
    while True:
        turn = len(texts) % 2
        begin = position + len(marks[turn])
        if turn == 1 and begin == len(prompt):
            return system, texts
        end = prompt.find(separators[turn] + marks[1 - turn], begin)
        if end < 0:
            return None
        texts.append(prompt[begin:end].removeprefix(space))
        position = end + len(separators[turn])


def _read_instructions(prompt: str, template: Conversation) -> tuple[str, list[str]] | None:
    """System text and turns where the questions stand between `[INST]` and `[/INST]`."""
    body = prompt.removeprefix("[INST] ")
    if body == prompt or not body.endswith(" [/INST]"):
        return None
    system = ""
    if body.startswith("<<SYS>>\n"):
        system, found, body = body.removeprefix("<<SYS>>\n").partition("\n<</SYS>>\n\n")
        if not found:
            return None
    exchanges = body.removesuffix(" [/INST]").split(f" {template.sep2}{template.sep}[INST] ")
    texts = [text for exchange in exchanges for text in exchange.split(" [/INST] ", 1)]
    return (system, texts) if len(texts) == 2 * len(exchanges) - 1 else None


def _write(template: Conversation, system: str, texts: list[str]) -> str | None:
    conversation = template.copy()
    conversation.set_system_message(system)
    for index, text in enumerate(texts):
        conversation.append_message(conversation.roles[index % 2], text)
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt() if all(texts) else None


def _messages(system: str, texts: list[str]) -> tuple[Message, ...]:
    turns = tuple(Message(_ROLES[index % 2], text) for index, text in enumerate(texts))
    return (Message("system", system), *turns) if system else turns
