"""The page's parts, and which of them press which button."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from llava.serve.chat_client import ModelInfo
from llava.serve.page.catalogue import ListMode, ModelList
from llava.serve.page.chat import Chat, Refusal
from llava.serve.page.conversation import Conversation, Settings
from llava.serve.page.examples import Example
from llava.serve.page.render import chat_messages, heading_html, notice_html

AUTO = "auto"
POLL_SECONDS = 5.0
"""How often an open page asks whether the list of models has changed."""
BUDGET_VIEWS = 6
"""The budget slider ends at so many views of the finest granularity; more than one picture of most models takes."""
DEFAULT_BUDGET_END = 4096
DRAWN, LISTED = 6, 8
"""How many values `Parts.drawn` and `Parts.listed` take."""


@dataclass(frozen=True)
class Side:
    """One of the two conversations: its settings and where it is drawn."""

    model: gr.Dropdown
    granularity: gr.Radio
    heading: gr.HTML
    chatbot: gr.Chatbot


@dataclass(frozen=True)
class Parts:
    """Everything on the page that a handler reads or writes."""

    notice: gr.HTML
    composer: gr.MultimodalTextbox
    sides: tuple[Side, Side]
    compare: gr.Checkbox
    second_settings: gr.Group
    second_column: gr.Column
    budget: gr.Slider
    bias: gr.Slider
    temperature: gr.Slider
    top_p: gr.Slider
    max_tokens: gr.Slider
    regenerate: gr.Button
    stop: gr.Button
    clear: gr.Button
    timer: gr.Timer
    shown: gr.State

    @property
    def settings(self) -> list[Any]:
        """In the order of `read_settings`."""
        first, second = self.sides
        sampling = [self.budget, self.bias, self.temperature, self.top_p, self.max_tokens]
        return [self.compare, first.model, first.granularity, second.model, second.granularity, *sampling]

    @property
    def drawn(self) -> list[Any]:
        """In the order of `draw`."""
        first, second = self.sides
        return [self.composer, self.stop, first.heading, first.chatbot, second.heading, second.chatbot]

    @property
    def listed(self) -> list[Any]:
        """In the order of `draw_models`."""
        first, second = self.sides
        return [self.shown, self.notice, first.model, first.granularity, second.model, second.granularity, self.budget, self.timer]


def build_page(chat: Chat, mode: ListMode, address: str, examples: Sequence[Example], *, concurrency: int, embed: bool) -> gr.Blocks:
    """The page.

    Args:
        chat: what it does. mode: whether the list of models is asked again once there is one. address: shown to whoever starts workers.
        concurrency: answers written at the same time, for all browsers. embed: without the title, to be put into another page.
    """
    with gr.Blocks(title="AVG-LLaVA", analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)) as page:
        parts = _place(examples, embed)
        _wire(page, parts, chat, mode, address, examples, concurrency)
        page.unload(_leaver(chat))
        _place_for_programs(chat, concurrency)
    page.queue(default_concurrency_limit=None, api_open=False, max_size=1000)
    return page


def _place(examples: Sequence[Example], embed: bool) -> Parts:
    if not embed:
        gr.HTML(
            "<h1>AVG-LLaVA</h1><p>Looks at a picture and a question, and chooses how many visual tokens they deserve.</p>",
            elem_id="avg-title",
        )
    notice = gr.HTML("", elem_id="avg-notice", visible=False)
    with gr.Row(elem_id="avg-main", equal_height=False):
        with gr.Column(scale=1, min_width=280, elem_id="avg-settings"):
            controls = _place_settings()
        with gr.Column(scale=3, min_width=320, elem_id="avg-talk"):
            talk = _place_talk(examples)
    first = Side(controls["model_0"], controls["granularity_0"], talk["heading_0"], talk["chatbot_0"])
    second = Side(controls["model_1"], controls["granularity_1"], talk["heading_1"], talk["chatbot_1"])
    names = ("compare", "second_settings", "budget", "bias", "temperature", "top_p", "max_tokens")
    return Parts(
        notice=notice,
        sides=(first, second),
        timer=gr.Timer(POLL_SECONDS),
        shown=gr.State(None),
        **{name: controls[name] for name in names},
        **{name: talk[name] for name in ("composer", "second_column", "regenerate", "stop", "clear")},
    )


def _model_and_granularity(name: str, elem: str) -> tuple[gr.Dropdown, gr.Radio]:
    model = gr.Dropdown([], label=f"Model{name}", elem_id=f"avg-model{elem}", interactive=True, allow_custom_value=True)
    granularity = gr.Radio(
        [AUTO], value=AUTO, label=f"Granularity{name}", info="Visual tokens per view; auto lets the router choose.",
        elem_id=f"avg-granularity{elem}", interactive=True,
    )  # fmt: skip
    return model, granularity


def _place_settings() -> dict[str, Any]:
    parts: dict[str, Any] = {}
    with gr.Group():
        parts["model_0"], parts["granularity_0"] = _model_and_granularity("", "-0")
    parts["compare"] = gr.Checkbox(label="Compare side by side", info="A second model or granularity answers too.", elem_id="avg-compare")
    with gr.Group(visible=False, elem_id="avg-second") as parts["second_settings"]:
        parts["model_1"], parts["granularity_1"] = _model_and_granularity(" of the second", "-1")
    with gr.Group():
        parts["budget"] = gr.Slider(
            0, DEFAULT_BUDGET_END, value=0, step=1, label="Token budget", info="Visual tokens of all pictures together; 0 is no limit.",
            elem_id="avg-budget",
        )  # fmt: skip
        parts["bias"] = gr.Slider(
            -4, 4, value=0, step=0.1, label="Cheaper or finer", info="Leans the router: below 0 to fewer tokens, above 0 to more.",
            elem_id="avg-bias",
        )  # fmt: skip
    with gr.Accordion("Sampling", open=False):
        parts["temperature"] = gr.Slider(0, 2, value=0, step=0.05, label="Temperature", info="0 always takes the likeliest word.")
        parts["top_p"] = gr.Slider(0.05, 1, value=1, step=0.05, label="Top p")
        parts["max_tokens"] = gr.Slider(1, 4096, value=512, step=1, label="Most new tokens")
    return parts


def _place_talk(examples: Sequence[Example]) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    with gr.Row(elem_id="avg-sides", equal_height=True):
        for side in (0, 1):
            with gr.Column(min_width=300, visible=side == 0) as column:
                parts[f"heading_{side}"] = gr.HTML("", elem_classes="avg-side-name", visible=False)
                parts[f"chatbot_{side}"] = gr.Chatbot(
                    label="Answers" if side == 0 else "Answers of the second",
                    show_label=False,
                    elem_id=f"avg-chat-{side}",
                    height="max(360px, calc(100vh - 270px))",
                    render_markdown=False,  # an answer is text: no picture or link in it may be loaded
                    allow_file_downloads=False,
                    buttons=[],
                    feedback_options=["Like", "Dislike", "Flag"],
                    layout="panel",
                    placeholder='<div class="avg-hint">Ask about a picture: add one below, or take an example.</div>',
                    examples=[example.message() for example in examples] if side == 0 else None,
                )
                # Gradio deletes what it has copied; the examples' pictures have to stay.
                parts[f"chatbot_{side}"].keep_in_cache.update(parts[f"chatbot_{side}"].temp_files)
            parts["second_column"] = column
    parts["composer"] = gr.MultimodalTextbox(
        placeholder="Ask about the picture …", show_label=False, label="Question", file_types=["image"], file_count="multiple",
        sources=["upload"], max_plain_text_length=20_000, max_lines=8, elem_id="avg-composer", autofocus=True,
    )  # fmt: skip
    with gr.Row(elem_id="avg-buttons"):
        parts["stop"] = gr.Button("◼ Stop", size="sm", min_width=90, interactive=False, elem_id="avg-stop")
        parts["regenerate"] = gr.Button("↻ Regenerate", size="sm", min_width=90, elem_id="avg-regenerate")
        parts["clear"] = gr.Button("✕ Clear", size="sm", min_width=90, elem_id="avg-clear")
    return parts


def _wire(page: gr.Blocks, parts: Parts, chat: Chat, mode: ListMode, address: str, examples: Sequence[Example], concurrency: int) -> None:
    answering: dict[str, Any] = {
        "concurrency_limit": concurrency,
        "concurrency_id": "answers",
        "api_visibility": "private",
        "show_progress": "hidden",
    }
    quick: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
    first, second = parts.sides
    send, again, send_example = _askers(chat, examples)
    parts.composer.submit(send, [parts.composer, *parts.settings], parts.drawn, **answering)
    first.chatbot.example_select(send_example, parts.settings, parts.drawn, **answering)
    gr.on([parts.regenerate.click, first.chatbot.retry, second.chatbot.retry], again, parts.settings, parts.drawn, **answering)
    parts.stop.click(_stopper(chat), None, None, **quick)
    gr.on([parts.clear.click, first.chatbot.clear, second.chatbot.clear], _clearer(chat), None, parts.drawn, **quick)
    for index, side in enumerate(parts.sides):
        side.chatbot.like(_voter(chat, index), None, None, api_visibility="private", show_progress="hidden")  # thanks need the queue
    comparing = [parts.second_settings, parts.second_column, second.chatbot]
    parts.compare.change(_comparer(chat), parts.compare, comparing, **quick)
    refresh = _refresher(chat, mode, address)
    inputs = [parts.shown, first.model, second.model]
    page.load(refresh, inputs, parts.listed, **quick)
    parts.timer.tick(refresh, inputs, parts.listed, **quick)
    for side in parts.sides:
        side.model.input(_model_chooser(chat), side.model, [side.granularity, parts.budget], **quick)


def _place_for_programs(chat: Chat, concurrency: int) -> None:
    """One endpoint for `gradio_client`: `/ask`, of a question with pictures, a model, a granularity and a budget."""
    question = gr.MultimodalTextbox(visible=False, label="question", file_types=["image"], file_count="multiple")
    model = gr.Textbox(visible=False, label="model")
    granularity = gr.Textbox(AUTO, visible=False, label="granularity")
    budget = gr.Number(0, visible=False, label="max_visual_tokens", precision=0)
    answer = gr.JSON(visible=False, label="answer")

    async def ask(message: dict[str, Any], model: str, granularity: str, max_visual_tokens: float) -> dict[str, Any]:
        try:
            names = (await chat.catalogue.get()).names
            values = (False, model or (names[0] if names else None), granularity, None, AUTO, max_visual_tokens, 0.0, 0.0, 1.0, 512)
            if not isinstance(message, dict):
                raise Refusal("There is no question.")
            reply = await chat.once(message.get("text") or "", message.get("files") or [], read_settings(values)[0])
        except Refusal as refusal:
            raise gr.Error(str(refusal), print_exception=False) from None
        outcome = reply.outcome
        return {
            "text": reply.text,
            "model": reply.settings.model,
            "finish_reason": outcome.finish_reason if outcome else None,
            "usage": dict(outcome.usage) if outcome else {},
            "images": [dict(image) for image in outcome.images] if outcome else [],
        }

    gr.Button(visible=False).click(
        ask, [question, model, granularity, budget], answer, api_name="ask", concurrency_limit=concurrency, concurrency_id="answers"
    )


def _session(request: gr.Request) -> str:
    if not request.session_hash:
        raise gr.Error("This request belongs to no open page.", print_exception=False)
    return request.session_hash


def _whole(value: Any) -> int | None:
    """A slider's number; `None` for its 0."""
    return int(value or 0) or None


def read_settings(values: Sequence[Any]) -> list[Settings]:
    """The settings of the sides that answer, from the values of `Parts.settings`.

    Raises:
        Refusal: no model is chosen, or a value is not what the page's own parts send.
    """
    compare, model_0, granularity_0, model_1, granularity_1, budget, bias, temperature, top_p, max_tokens = values
    chosen = [(model_0, granularity_0), (model_1, granularity_1)] if compare else [(model_0, granularity_0)]
    try:
        return [
            Settings(
                model=_model_name(model),
                granularity=None if granularity in (AUTO, None) else int(granularity),
                max_visual_tokens=_whole(budget),
                granularity_bias=float(bias),
                temperature=float(temperature),
                top_p=float(top_p),
                max_tokens=int(max_tokens),
            )
            for model, granularity in chosen
        ]
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, Refusal) else Refusal("A setting is not a number; set it again.") from error


def _model_name(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise Refusal("No model is chosen. Choose one, or start a worker where the list is empty.")
    return value


def draw(conversation: Conversation | None, composer: Any = None) -> list[Any]:
    """The conversation as values of `Parts.drawn`.

    Args:
        composer: what becomes of the question's box; left alone when missing.
    """
    turns = conversation.turns if conversation is not None else []
    busy = conversation is not None and conversation.busy
    last = turns[-1].replies if turns else {}
    comparing = len(last) > 1
    drawn: list[Any] = [gr.skip() if composer is None else composer, gr.update(interactive=busy)]
    for side in (0, 1):
        heading = heading_html(last.get(side)) if comparing else ""
        drawn += [gr.update(value=heading, visible=comparing), chat_messages(turns, side, gr.HTML)]
    return drawn


Stream = AsyncIterator[list[Any]]


def _askers(chat: Chat, examples: Sequence[Example]) -> tuple[Callable[..., Stream], Callable[..., Stream], Callable[..., Stream]]:
    """Handlers of a new question, of the last one again, and of an example."""

    async def run(begin: Callable[[list[Settings]], Awaitable[Conversation]], values: Sequence[Any], composer: Any = None) -> Stream:
        try:
            conversation = await begin(read_settings(values))
        except Refusal as refusal:
            gr.Warning(str(refusal), duration=8)  # Gradio's own error would cover the whole conversation
            yield [gr.skip()] * DRAWN
            return
        try:
            async for _ in chat.answers(conversation):
                yield draw(conversation, composer)
                composer = None
        finally:
            conversation.busy = False

    async def send(request: gr.Request, message: dict[str, Any], *values: Any) -> Stream:
        text, files = message.get("text") or "", message.get("files") or []
        async for update in run(lambda sides: chat.begin(_session(request), text, files, sides), values, gr.MultimodalTextbox(value=None)):
            yield update

    async def again(request: gr.Request, *values: Any) -> Stream:
        async for update in run(lambda sides: chat.begin_again(_session(request), sides), values):
            yield update

    async def send_example(request: gr.Request, event: gr.SelectData, *values: Any) -> Stream:
        if not isinstance(event.index, int) or not 0 <= event.index < len(examples):
            raise gr.Error("There is no such example.", print_exception=False)
        example = examples[event.index]
        pictures = [example.picture]
        async for update in run(lambda sides: chat.begin(_session(request), example.question, [], sides, pictures), values):
            yield update

    return send, again, send_example


def _stopper(chat: Chat) -> Callable[[gr.Request], None]:
    def stop(request: gr.Request) -> None:
        chat.stop(_session(request))

    return stop


_leaver = _stopper  # a browser that goes away stops its answers; its conversation stays for a while, phones come back


def _clearer(chat: Chat) -> Callable[[gr.Request], list[Any]]:
    def clear(request: gr.Request) -> list[Any]:
        chat.clear(_session(request))
        return draw(None, gr.MultimodalTextbox(value=None))

    return clear


def _voter(chat: Chat, side: int) -> Callable[[gr.Request, gr.LikeData], None]:
    def vote(request: gr.Request, event: gr.LikeData) -> None:
        index = event.index[0] if isinstance(event.index, (list, tuple)) else event.index
        try:
            thanks = chat.vote(_session(request), side, int(index), event.liked)
            if thanks:
                gr.Info(thanks, duration=3)
        except (ValueError, TypeError) as refusal:
            gr.Warning(str(refusal) if isinstance(refusal, Refusal) else "There is no such answer.", duration=8)

    return vote


def _comparer(chat: Chat) -> Callable[[gr.Request, bool], list[Any]]:
    def compare(request: gr.Request, on: bool) -> list[Any]:
        conversation = chat.conversations.find(_session(request))
        second = chat_messages(conversation.turns if conversation else [], 1, gr.HTML)
        return [gr.update(visible=on), gr.update(visible=on), second]

    return compare


def _levels(model: ModelInfo | None, value: Any = AUTO) -> Any:
    """The granularities of a model to choose from; the one chosen stays where there is such a one."""
    choices = [AUTO, *(str(level) for level in model.granularities)] if model else [AUTO]
    return gr.update(choices=choices, value=value if value in choices else AUTO)


def _budget(model: ModelInfo | None) -> Any:
    end = BUDGET_VIEWS * model.granularities[-1] if model and model.granularities else DEFAULT_BUDGET_END
    return gr.update(maximum=end, value=0)


def _model_chooser(chat: Chat) -> Callable[[Any], Any]:
    async def choose(name: Any) -> list[Any]:
        model = (await chat.catalogue.get()).find(name if isinstance(name, str) else None)
        return [_levels(model), _budget(model)]

    return choose


def _refresher(chat: Chat, mode: ListMode, address: str) -> Callable[..., Any]:
    """Handler that brings the list of models up to date, and touches nothing while it is."""

    async def refresh(shown: Any, model_0: Any, model_1: Any) -> list[Any]:
        models = await chat.catalogue.get()
        signature: list[Any] = [[model.name, list(model.granularities)] for model in models.models]
        signature = signature or [models.error.code if models.error else ""]
        if signature == shown:
            return [gr.skip()] * LISTED
        return draw_models(models, signature, (model_0, model_1), address, keep_asking=mode == "reload" or not models.models)

    return refresh


def draw_models(models: ModelList, signature: Any, chosen: tuple[Any, Any], address: str, keep_asking: bool) -> list[Any]:
    """The list as values of `Parts.listed`; a model that is still there stays chosen, and the second side starts with another one."""
    names = models.names
    first = chosen[0] if chosen[0] in names else names[0] if names else None
    second = chosen[1] if chosen[1] in names else next((name for name in names if name != first), first)
    return [
        signature,
        gr.update(value=notice_html(models, address), visible=not names),
        gr.update(choices=names, value=first),
        _levels(models.find(first)),
        gr.update(choices=names, value=second),
        _levels(models.find(second)),
        _budget(models.find(first)),
        gr.Timer(active=keep_asking),
    ]
