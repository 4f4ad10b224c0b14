"""The page's Gradio components, and which handler each of their events calls."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import gradio as gr
from gradio.blocks import Block

from llava.serve.backend.chat_client import ModelInfo
from llava.serve.page.catalogue import ListMode, ModelList
from llava.serve.page.chat import BUDGET_LABEL, Chat, Refusal
from llava.serve.page.examples import Example
from llava.serve.page.render import about_html, chat_messages, heading_html, notice_html
from llava.serve.page.sessions import ChatSession, Settings

Values = Mapping[Block, Any]
"""What a browser sent, by component: handlers whose inputs are a set get this."""
Changes = dict[Any, Any]
"""New values or properties, by component; the others stay as they are."""
AUTO = "auto"
POLL_SECONDS = 5.0
"""How often an open page asks whether the list of models has changed."""
BUDGET_VIEWS = 6
"""The budget slider ends at this many views of the finest granularity; more than one image takes with most models."""
DEFAULT_BUDGET_END = 4096


@dataclass(frozen=True)
class Choice:
    """Who answers on one side. about: what the model says of itself."""

    model: gr.Dropdown
    about: gr.HTML
    granularity: gr.Radio

    @property
    def drawn(self) -> list[Block]:
        """Whatever a change of the model changes."""
        return [self.model, self.about, self.granularity]


@dataclass(frozen=True)
class Controls:
    """The column of settings; `second_settings` holds the second choice, where two answer."""

    choices: tuple[Choice, Choice]
    compare: gr.Checkbox
    second_settings: gr.Group
    budget: gr.Slider
    bias: gr.Slider
    temperature: gr.Slider
    top_p: gr.Slider
    max_tokens: gr.Slider

    @property
    def all(self) -> set[Block]:
        """Whatever `read_settings` reads."""
        chosen = {part for choice in self.choices for part in (choice.model, choice.granularity)}
        return {*chosen, self.compare, self.budget, self.bias, self.temperature, self.top_p, self.max_tokens}


@dataclass(frozen=True)
class Side:
    """Where one of the two conversations is drawn."""

    column: gr.Column
    heading: gr.HTML
    chatbot: gr.Chatbot


@dataclass(frozen=True)
class Talk:
    """The column of conversations, with what is asked and pressed below them."""

    sides: tuple[Side, Side]
    composer: gr.MultimodalTextbox
    stop: gr.Button
    regenerate: gr.Button
    clear: gr.Button

    @property
    def drawn(self) -> list[Block]:
        """Whatever `draw` changes."""
        return [self.composer, self.stop, *(part for side in self.sides for part in (side.heading, side.chatbot))]


@dataclass(frozen=True)
class Parts:
    """Everything on the page that a handler reads or writes. shown: which list of models an open page shows, see `_refresher`."""

    notice: gr.HTML
    controls: Controls
    talk: Talk
    timer: gr.Timer
    shown: gr.State

    @property
    def listed(self) -> list[Block]:
        """Whatever a new list of models changes."""
        chosen = [part for choice in self.controls.choices for part in choice.drawn]
        return [self.shown, self.notice, *chosen, self.controls.budget, self.timer]


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
            "<h1>AVG-LLaVA</h1><p>Looks at an image and a question, and chooses how many visual tokens they deserve.</p>",
            elem_id="avg-title",
        )
    notice = gr.HTML("", elem_id="avg-notice", visible=False)
    with gr.Row(elem_id="avg-main", equal_height=False):
        with gr.Column(scale=1, min_width=280, elem_id="avg-settings"):
            controls = _place_settings()
        with gr.Column(scale=3, min_width=320, elem_id="avg-talk"):
            talk = _place_talk(examples)
    return Parts(notice, controls, talk, timer=gr.Timer(POLL_SECONDS), shown=gr.State(None))


def _place_choice(name: str, elem: str) -> Choice:
    model = gr.Dropdown([], label=f"Model{name}", elem_id=f"avg-model{elem}", interactive=True, allow_custom_value=True)
    about = gr.HTML("", elem_id=f"avg-about{elem}", visible=False)
    granularity = gr.Radio(
        [AUTO], value=AUTO, label=f"Granularity{name}", elem_id=f"avg-granularity{elem}", interactive=True,
        info="Visual tokens per view; auto lets the router choose. In the API, image_url.detail says low, high or auto for one image.",
    )  # fmt: skip
    return Choice(model, about, granularity)


def _place_settings() -> Controls:
    with gr.Group():
        first = _place_choice("", "-0")
    compare = gr.Checkbox(label="Compare side by side", info="A second model or granularity answers too.", elem_id="avg-compare")
    with gr.Group(visible=False, elem_id="avg-second") as second_settings:
        second = _place_choice(" of the second", "-1")
    with gr.Group():
        budget = gr.Slider(
            0, DEFAULT_BUDGET_END, value=0, step=1, label=BUDGET_LABEL, info="Visual tokens of all images together; 0 is no limit.",
            elem_id="avg-budget",
        )  # fmt: skip
        bias = gr.Slider(
            -4, 4, value=0, step=0.1, label="Cheaper or finer", info="Leans the router: below 0 to fewer tokens, above 0 to more.",
            elem_id="avg-bias",
        )  # fmt: skip
    with gr.Accordion("Sampling", open=False):
        temperature = gr.Slider(0, 2, value=0, step=0.05, label="Temperature", info="0 always takes the likeliest word.")
        top_p = gr.Slider(0.05, 1, value=1, step=0.05, label="Top p")
        max_tokens = gr.Slider(1, 4096, value=512, step=1, label="Most new tokens")
    return Controls((first, second), compare, second_settings, budget, bias, temperature, top_p, max_tokens)


def _place_talk(examples: Sequence[Example]) -> Talk:
    with gr.Row(elem_id="avg-sides", equal_height=True):
        sides = (_place_side(0, "Answers", examples), _place_side(1, "Answers of the second", ()))
    composer = gr.MultimodalTextbox(
        placeholder="Ask about the image …", show_label=False, label="Question", file_types=["image"], file_count="multiple",
        sources=["upload"], max_plain_text_length=20_000, max_lines=8, elem_id="avg-composer", autofocus=True,
    )  # fmt: skip
    with gr.Row(elem_id="avg-buttons"):
        stop = gr.Button("◼ Stop", size="sm", min_width=90, interactive=False, elem_id="avg-stop")
        regenerate = gr.Button("↻ Regenerate", size="sm", min_width=90, elem_id="avg-regenerate")
        clear = gr.Button("✕ Clear", size="sm", min_width=90, elem_id="avg-clear")
    return Talk(sides, composer, stop, regenerate, clear)


def _place_side(side: int, label: str, examples: Sequence[Example]) -> Side:
    with gr.Column(min_width=300, visible=side == 0) as column:
        heading = gr.HTML("", elem_classes="avg-side-name", visible=False)
        chatbot = gr.Chatbot(
            label=label,
            show_label=False,
            elem_id=f"avg-chat-{side}",
            height="max(360px, calc(100vh - 270px))",
            autoscroll=False,  # see `llava.serve.page.script`
            render_markdown=False,  # an answer is text: no image or link in it may be loaded
            allow_file_downloads=False,
            buttons=[],
            feedback_options=["Like", "Dislike", "Flag"],
            layout="panel",
            placeholder='<div class="avg-hint">Ask about an image: add one below, or take an example.</div>',
            examples=[example.message() for example in examples] or None,
        )
        chatbot.keep_in_cache.update(chatbot.temp_files)  # Gradio deletes what it has copied; the examples' images have to stay
    return Side(column, heading, chatbot)


def _wire(page: gr.Blocks, parts: Parts, chat: Chat, mode: ListMode, address: str, examples: Sequence[Example], concurrency: int) -> None:
    answering: dict[str, Any] = {
        "concurrency_limit": concurrency,
        "concurrency_id": "answers",
        "api_visibility": "private",
        "show_progress": "hidden",
    }
    quick: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
    controls, talk = parts.controls, parts.talk
    first, second = talk.sides
    send, again, send_example = _askers(parts, chat, examples)
    talk.composer.submit(send, {talk.composer, *controls.all}, talk.drawn, **answering)
    first.chatbot.example_select(send_example, controls.all, talk.drawn, **answering)
    gr.on([talk.regenerate.click, first.chatbot.retry, second.chatbot.retry], again, controls.all, talk.drawn, **answering)
    talk.stop.click(_stopper(chat), None, None, **quick)
    gr.on([talk.clear.click, first.chatbot.clear, second.chatbot.clear], _clearer(talk, chat), None, talk.drawn, **quick)
    for index, side in enumerate(talk.sides):
        side.chatbot.like(_voter(chat, index), None, None, api_visibility="private", show_progress="hidden")  # thanks need the queue
    comparing = [controls.second_settings, second.column, second.chatbot]
    comparing += [controls.choices[1].granularity]
    chosen: set[Block] = {part for choice in controls.choices for part in (choice.model, choice.granularity)}
    controls.compare.change(_comparer(parts, chat), {controls.compare, *chosen}, comparing, **quick)
    refresh = _refresher(parts, chat, mode, address)
    inputs = {parts.shown, controls.budget, *chosen}
    page.load(refresh, inputs, parts.listed, **quick)
    parts.timer.tick(refresh, inputs, parts.listed, **quick)
    for choice in controls.choices:
        choose = _model_chooser(chat, parts, choice, address)
        choice.model.input(choose, inputs, [parts.notice, choice.about, choice.granularity, controls.budget], **quick)


def _place_for_programs(chat: Chat, concurrency: int) -> None:
    """One endpoint for `gradio_client`: `/ask`, which takes a question with images, a model, a granularity and a budget."""
    question = gr.MultimodalTextbox(visible=False, label="question", file_types=["image"], file_count="multiple")
    model = gr.Textbox(visible=False, label="model")
    granularity = gr.Textbox(AUTO, visible=False, label="granularity")
    budget = gr.Number(0, visible=False, label="max_visual_tokens", precision=0)
    answer = gr.JSON(visible=False, label="answer")

    async def ask(message: dict[str, Any], model: str, granularity: str, max_visual_tokens: float) -> dict[str, Any]:
        try:
            if not isinstance(message, dict):
                raise Refusal("There is no question.")
            names = (await chat.catalogue.get()).names
            settings = _settings(model or (names[0] if names else None), granularity, max_visual_tokens)
            reply = await chat.once(message.get("text") or "", message.get("files") or [], settings)
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


def read_settings(values: Values, controls: Controls) -> list[Settings]:
    """The settings of the sides that answer.

    Raises:
        Refusal: no model is chosen, or a value is not what the page's own parts send.
    """
    chosen = controls.choices if values[controls.compare] else controls.choices[:1]
    return [
        _settings(
            values[choice.model],
            values[choice.granularity],
            values[controls.budget],
            granularity_bias=values[controls.bias],
            temperature=values[controls.temperature],
            top_p=values[controls.top_p],
            max_tokens=values[controls.max_tokens],
        )
        for choice in chosen
    ]


N = TypeVar("N", int, float)


def _settings(
    model: Any,
    granularity: Any,
    budget: Any,
    *,
    granularity_bias: Any = Settings.granularity_bias,
    temperature: Any = Settings.temperature,
    top_p: Any = Settings.top_p,
    max_tokens: Any = Settings.max_tokens,
) -> Settings:
    """Settings out of what a browser or a program sent; a budget of 0 is none."""
    no_level = f"granularity is neither {AUTO} nor one whole number"
    return Settings(
        model=_model_name(model),
        granularity=None if granularity in (AUTO, None) else _number(int, granularity, no_level),
        max_visual_tokens=_number(int, budget or 0, "token budget (max_visual_tokens) is not a number") or None,
        granularity_bias=_number(float, granularity_bias, "leaning to cheaper or finer is not a number"),
        temperature=_number(float, temperature, "temperature is not a number"),
        top_p=_number(float, top_p, "top p is not a number"),
        max_tokens=_number(int, max_tokens, "limit of new tokens is not a number"),
    )


def _number(kind: type[N], value: Any, otherwise: str) -> N:
    """One setting as a number. otherwise: the error's text where it is none."""
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise Refusal(f"The {otherwise}; set it again.") from error


def _model_name(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise Refusal("No model is chosen. Choose one, or start a worker where the list is empty.")
    return value


def draw(talk: Talk, conversation: ChatSession | None) -> Changes:
    """The conversation as it is now."""
    turns = conversation.turns if conversation is not None else []
    last = turns[-1].replies if turns else {}
    comparing = len(last) > 1
    changes: Changes = {talk.stop: gr.update(interactive=conversation is not None and conversation.busy)}
    for index, side in enumerate(talk.sides):
        changes[side.heading] = gr.update(value=heading_html(last.get(index)) if comparing else "", visible=comparing)
        changes[side.chatbot] = chat_messages(turns, index, gr.HTML)
    return changes


def _emptied(talk: Talk) -> Changes:
    """The box of the question, empty again."""
    return {talk.composer: gr.MultimodalTextbox(value=None)}


Stream = AsyncIterator[Changes]
Asker = Callable[..., Stream]


def _askers(parts: Parts, chat: Chat, examples: Sequence[Example]) -> tuple[Asker, Asker, Asker]:
    """Handlers of a new question, of the last one again, and of an example."""
    talk = parts.talk

    async def run(begin: Callable[[list[Settings]], Awaitable[ChatSession]], values: Values, at_first: Changes | None = None) -> Stream:
        try:
            conversation = await begin(read_settings(values, parts.controls))
        except Refusal as refusal:
            gr.Warning(str(refusal), duration=8)  # Gradio's own error would cover the whole conversation
            yield gr.skip()
            return
        try:
            async for _ in chat.answers(conversation):
                yield draw(talk, conversation) | (at_first or {})
                at_first = None
        finally:
            conversation.busy = False

    async def send(values: Values, request: gr.Request) -> Stream:
        text, files = values[talk.composer].get("text") or "", values[talk.composer].get("files") or []
        async for changes in run(lambda sides: chat.begin(_session(request), text, files, sides), values, _emptied(talk)):
            yield changes

    async def again(values: Values, request: gr.Request) -> Stream:
        async for changes in run(lambda sides: chat.begin_again(_session(request), sides), values):
            yield changes

    async def send_example(values: Values, request: gr.Request, event: gr.SelectData) -> Stream:
        if not isinstance(event.index, int) or not 0 <= event.index < len(examples):
            raise gr.Error("There is no such example.", print_exception=False)
        example = examples[event.index]
        async for changes in run(lambda sides: chat.begin(_session(request), example.question, [], sides, [example.image]), values):
            yield changes

    return send, again, send_example


def _stopper(chat: Chat) -> Callable[[gr.Request], None]:
    def stop(request: gr.Request) -> None:
        chat.stop(_session(request))

    return stop


_leaver = _stopper
"""A browser that goes away stops its answers. Its conversation stays for a while: a phone that was put away asks on in it later."""


def _clearer(talk: Talk, chat: Chat) -> Callable[[gr.Request], Changes]:
    def clear(request: gr.Request) -> Changes:
        chat.clear(_session(request))
        return draw(talk, None) | _emptied(talk)

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


def _comparer(parts: Parts, chat: Chat) -> Callable[[gr.Request, Values], Awaitable[Changes]]:
    second, controls = parts.talk.sides[1], parts.controls

    async def compare(request: gr.Request, values: Values) -> Changes:
        on = bool(values[controls.compare])
        conversation = chat.sessions.find(_session(request))
        answers = chat_messages(conversation.turns if conversation else [], 1, gr.HTML)
        changes: Changes = {controls.second_settings: gr.update(visible=on), second.column: gr.update(visible=on), second.chatbot: answers}
        if on:
            changes[controls.choices[1].granularity] = await _another_level(chat, controls, values)
        return changes

    return compare


async def _another_level(chat: Chat, controls: Controls, values: Values) -> Any:
    """A second granularity that makes two sides of one model differ: the finest beside the router, and the router beside a level."""
    (first, level), (second, other) = [(values[choice.model], values[choice.granularity]) for choice in controls.choices]
    model = (await chat.catalogue.get()).find(second)
    if (first, level) != (second, other) or model is None or not model.granularities:
        return gr.skip()
    return gr.update(value=str(model.granularities[-1]) if level == AUTO else AUTO)


def _levels(model: ModelInfo | None, value: Any = AUTO) -> Any:
    """The granularities of a model to choose from; the one chosen stays where there is such a one."""
    choices = [AUTO, *(str(level) for level in model.granularities)] if model else [AUTO]
    return gr.update(choices=choices, value=value if value in choices else AUTO)


def _budget(model: ModelInfo | None, value: Any) -> Any:
    """The budget's slider for a model; its value stays where the slider reaches it."""
    end = BUDGET_VIEWS * model.granularities[-1] if model and model.granularities else DEFAULT_BUDGET_END
    return gr.update(maximum=end, value=value if isinstance(value, (int, float)) and 0 <= value <= end else 0)


def _about(model: ModelInfo | None) -> Any:
    return gr.update(value=about_html(model.description if model else ""), visible=bool(model and model.description))


def _gone(models: ModelList, values: Values, controls: Controls) -> list[str]:
    """Chosen models that are no longer served, each once."""
    asked = [values[choice.model] for choice in controls.choices]
    return [name for name in dict.fromkeys(asked) if isinstance(name, str) and name and name not in models.names]


def _model_chooser(chat: Chat, parts: Parts, choice: Choice, address: str) -> Callable[[Values], Awaitable[Changes]]:
    controls = parts.controls

    async def choose(values: Values) -> Changes:
        models = await chat.catalogue.get()
        model = models.find(values[choice.model] if isinstance(values[choice.model], str) else None)
        notice = notice_html(models, address, _gone(models, values, controls))
        return {
            parts.notice: gr.update(value=notice, visible=bool(notice)),
            choice.about: _about(model),
            choice.granularity: _levels(model, values[choice.granularity]),
            controls.budget: _budget(model, values[controls.budget]),
        }

    return choose


def _refresher(parts: Parts, chat: Chat, mode: ListMode, address: str) -> Callable[[Values], Awaitable[Changes]]:
    """Handler that brings the list of models up to date, and touches nothing while it is."""

    async def refresh(values: Values) -> Changes:
        models = await chat.catalogue.get()
        signature: list[Any] = [[model.name, list(model.granularities), model.description] for model in models.models]
        signature = signature or [models.error.code if models.error else ""]
        if signature == values[parts.shown]:
            return gr.skip()
        keep_asking = mode == "reload" or not models.models
        notice = notice_html(models, address, _gone(models, values, parts.controls))
        changes = draw_models(parts.controls, models, values) if models.models else {}
        return changes | {
            parts.shown: signature,
            parts.notice: gr.update(value=notice, visible=bool(notice)),
            parts.timer: gr.Timer(active=keep_asking),
        }

    return refresh


def draw_models(controls: Controls, models: ModelList, values: Values) -> Changes:
    """The models to choose from. What is chosen stays so, also while it is gone; the second side starts with another model."""
    names = models.names
    asked = [values[choice.model] for choice in controls.choices]
    first = asked[0] or names[0]
    second = asked[1] or next((name for name in names if name != first), first)
    changes: Changes = {}
    for choice, name in zip(controls.choices, (first, second), strict=True):
        changes[choice.model] = gr.update(choices=list(dict.fromkeys([*names, name])), value=name)
        if (model := models.find(name)) is not None:
            changes |= {choice.about: _about(model), choice.granularity: _levels(model, values[choice.granularity])}
    if (model := models.find(first)) is not None:
        changes[controls.budget] = _budget(model, values[controls.budget])
    return changes
