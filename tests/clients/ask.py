"""Asks a server with one stock client, as the client's own documentation does it: `python ask.py CLIENT BASE_URL MODEL IMAGE`.

Runs in the environment that `scripts/setup_clients.sh` makes, and imports nothing of this project. Prints one JSON object: what was
answered, by case. `words_first` and `image_first`: the order of the parts in the turn. `streamed`: words first, the pieces put together.
`history`: the image stands in an earlier turn. `structured`: a schema is asked for, the client has checked the answer against it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

NUMBER = "Which number does the sign show?"
COLOUR = "What is the background colour?"
KEY = "none-needed"


class Verdict(BaseModel):
    """Whether something is so."""

    verdict: Literal["yes", "no"]


def data_url(image: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()


def openai_turns(url: str) -> dict[str, list[dict[str, Any]]]:
    """The conversations of each case in OpenAI's form."""
    image, words = {"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": NUMBER}
    earlier = {"role": "user", "content": [{"type": "text", "text": COLOUR}, image]}
    return {
        "words_first": [{"role": "user", "content": [words, image]}],
        "image_first": [{"role": "user", "content": [image, words]}],
        "history": [earlier, {"role": "assistant", "content": "pink"}, {"role": "user", "content": NUMBER}],
    }


def with_openai(base_url: str, model: str, image: Path) -> dict[str, str]:
    from openai import OpenAI

    client = OpenAI(base_url=base_url, api_key=KEY, max_retries=0)
    turns = openai_turns(data_url(image))
    said = {}
    for case, messages in turns.items():
        said[case] = client.chat.completions.create(model=model, messages=messages, max_tokens=12).choices[0].message.content
    stream = client.chat.completions.create(model=model, messages=turns["words_first"], max_tokens=12, stream=True)
    said["streamed"] = "".join(part.choices[0].delta.content or "" for part in stream if part.choices)
    parsed = client.chat.completions.parse(model=model, messages=turns["words_first"], max_tokens=64, response_format=Verdict)
    said["structured"] = parsed.choices[0].message.parsed.verdict
    content = [{"type": "input_text", "text": NUMBER}, {"type": "input_image", "image_url": data_url(image)}]
    asked = {"model": model, "input": [{"role": "user", "content": content}], "max_output_tokens": 12, "store": False}
    said["responses"] = client.responses.create(**asked).output_text
    with client.responses.stream(**asked) as events:
        said["responses_streamed"] = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    return said


def with_langchain(base_url: str, model: str, image: Path) -> dict[str, str]:
    from langchain_core.messages import AIMessage, HumanMessage
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=base_url, api_key=KEY, model=model, max_tokens=12, max_retries=0)
    words = {"type": "text", "text": NUMBER}
    ours = {"type": "image", "base64": base64.b64encode(image.read_bytes()).decode(), "mime_type": "image/png"}
    colour = HumanMessage(content=[{"type": "text", "text": COLOUR}, ours])
    judge = ChatOpenAI(base_url=base_url, api_key=KEY, model=model, max_tokens=64, max_retries=0)
    return {
        "words_first": chat.invoke([HumanMessage(content=[words, ours])]).content,
        "image_first": chat.invoke([HumanMessage(content=[ours, words])]).content,
        "streamed": "".join(piece.content for piece in chat.stream([HumanMessage(content=[words, ours])])),
        "history": chat.invoke([colour, AIMessage(content="pink"), HumanMessage(content=NUMBER)]).content,
        "structured": judge.with_structured_output(Verdict, method="json_schema").invoke([HumanMessage(content=[words, ours])]).verdict,
    }


def with_litellm(base_url: str, model: str, image: Path) -> dict[str, str]:
    import litellm

    litellm.suppress_debug_info = True
    common = {"model": f"openai/{model}", "api_base": base_url, "api_key": KEY, "max_tokens": 12}
    turns = openai_turns(data_url(image))
    said = {case: litellm.completion(messages=messages, **common).choices[0].message.content for case, messages in turns.items()}
    stream = litellm.completion(messages=turns["words_first"], stream=True, **common)
    said["streamed"] = "".join(part.choices[0].delta.content or "" for part in stream)
    judged = litellm.completion(messages=turns["words_first"], response_format=Verdict, **{**common, "max_tokens": 64})
    said["structured"] = Verdict.model_validate_json(judged.choices[0].message.content).verdict
    return said


def with_llama_index(base_url: str, model: str, image: Path) -> dict[str, str]:
    from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
    from llama_index.llms.openai_like import OpenAILike

    chat = OpenAILike(api_base=base_url, api_key=KEY, model=model, is_chat_model=True, max_tokens=12, max_retries=0, context_window=1000)
    words, ours = TextBlock(text=NUMBER), ImageBlock(image=image.read_bytes(), image_mimetype="image/png")
    colour = ChatMessage(role="user", blocks=[TextBlock(text=COLOUR), ours])
    turns = [colour, ChatMessage(role="assistant", content="pink"), ChatMessage(role="user", content=NUMBER)]
    return {
        "words_first": chat.chat([ChatMessage(role="user", blocks=[words, ours])]).message.content,
        "image_first": chat.chat([ChatMessage(role="user", blocks=[ours, words])]).message.content,
        "streamed": "".join(piece.delta or "" for piece in chat.stream_chat([ChatMessage(role="user", blocks=[words, ours])])),
        "history": chat.chat(turns).message.content,
    }


def with_pydantic_ai(base_url: str, model: str, image: Path) -> dict[str, str]:
    from pydantic_ai import Agent, BinaryContent, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    served = OpenAIChatModel(model, provider=OpenAIProvider(base_url=base_url, api_key=KEY))
    agent = Agent(served, model_settings={"max_tokens": 12})
    judge = Agent(served, output_type=NativeOutput(Verdict), model_settings={"max_tokens": 64})
    ours = BinaryContent(data=image.read_bytes(), media_type="image/png")

    async def ask() -> dict[str, str]:
        earlier = await agent.run([COLOUR, ours])
        async with agent.run_stream([NUMBER, ours]) as stream:
            streamed = "".join([piece async for piece in stream.stream_text(delta=True)])
        return {
            "words_first": (await agent.run([NUMBER, ours])).output,
            "image_first": (await agent.run([ours, NUMBER])).output,
            "streamed": streamed,
            "history": (await agent.run(NUMBER, message_history=earlier.all_messages())).output,
            "structured": (await judge.run([NUMBER, ours])).output.verdict,
        }

    return asyncio.run(ask())


def with_instructor(base_url: str, model: str, image: Path) -> dict[str, str]:
    import instructor
    from openai import OpenAI

    def ask(mode: Any) -> Verdict:
        client = instructor.from_openai(OpenAI(base_url=base_url, api_key=KEY, max_retries=0), mode=mode)
        asked = {"model": model, "messages": openai_turns(data_url(image))["words_first"], "max_tokens": 64, "max_retries": 0}
        return client.chat.completions.create(response_model=Verdict, **asked)

    said = {"structured": ask(instructor.Mode.JSON_SCHEMA).verdict}
    try:
        ask(instructor.Mode.TOOLS)
    except Exception as error:  # of instructor's own kind, with the server's words in it
        said["tools"] = str(error)
    return said


CLIENTS: dict[str, Callable[[str, str, Path], dict[str, str]]] = {
    "openai": with_openai,
    "langchain": with_langchain,
    "litellm": with_litellm,
    "llama_index": with_llama_index,
    "pydantic_ai": with_pydantic_ai,
    "instructor": with_instructor,
}

if __name__ == "__main__":
    client, base_url, model, image = sys.argv[1:]
    print(json.dumps(CLIENTS[client](base_url, model, Path(image))))
