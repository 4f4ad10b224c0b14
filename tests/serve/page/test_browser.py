"""The page in a real browser, at a desk's and at a phone's width, in light and in dark: what is pressed happens, nothing foreign is loaded.

Chromium is taken from the variable CHROMIUM or from the path. With SCREENSHOTS=folder, pictures of what was seen are kept there.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

import pytest

from llava.serve.page.app import PageOptions, create_page_app
from tests.serve.browser import chromium
from tests.serve.page_backend import Backend, running

pytestmark = pytest.mark.slow

SCENE = Path(__file__).resolve().parents[3] / "playground" / "images" / "scene_pink.png"
WIDE, PHONE = (1280, 900), (390, 844)
SCREENSHOTS = os.environ.get("SCREENSHOTS")


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(backend, the page's address, folder of its log)."""
    backend, logs = Backend(), tmp_path_factory.mktemp("logs")
    with running(backend.app) as api:
        app = create_page_app(PageOptions(api, mode="reload", log_folder=logs))
        with running(app) as url:
            yield backend, url, logs


class Visit:
    """One browser at the page; notes errors of the console and requests to other hosts."""

    def __init__(self, browser, url, size, scheme):
        self.url = url
        self.context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.errors, self.foreign = [], []
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self._note(request.url))
        self.page.goto(url)
        self.page.wait_for_selector("#avg-composer textarea")

    def _note(self, url):
        if not url.startswith((self.url, "data:", "blob:")):
            self.foreign.append(url)

    def ready(self):
        self.page.wait_for_selector('#avg-granularity-0 label:has-text("576")')
        return self

    def ask(self, text, picture=None):
        if picture:
            self.page.set_input_files("#avg-composer input[type=file]", str(picture))
            self.page.wait_for_selector("#avg-composer .thumbnails img, #avg-composer .thumbnail-item")
        self.page.fill("#avg-composer textarea", text)
        self.page.press("#avg-composer textarea", "Enter")

    def answers(self, count, side=0):
        """Wait until a side shows so many finished answers."""
        self.page.wait_for_selector(f"#avg-chat-{side} .avg-card, #avg-chat-{side} .avg-error")
        self.page.wait_for_function(
            "([side, count]) => document.querySelectorAll(`#avg-chat-${side} .avg-card, #avg-chat-${side} .avg-error`).length == count",
            arg=[side, count],
        )

    def last_answer_is_visible(self, side=0, whole=True):
        """Whether the text of the last answer, or its first line, is within the conversation's part of the window."""
        return self.page.evaluate(
            """([side, whole]) => {
              const log = document.querySelector(`#avg-chat-${side} [role=log]`).getBoundingClientRect();
              const text = [...document.querySelectorAll(`#avg-chat-${side} .bot-row .avg-said`)].pop().getBoundingClientRect();
              const end = whole ? text.bottom : text.top + 20;
              return text.top >= Math.max(0, log.top) - 1 && end <= Math.min(window.innerHeight, log.bottom) + 1;
            }""",
            [side, whole],
        )

    def text(self, side=0):
        return self.page.inner_text(f"#avg-chat-{side}")

    def shoot(self, name, **options):
        if SCREENSHOTS:
            self.page.wait_for_timeout(600)
            self.page.screenshot(path=str(Path(SCREENSHOTS) / f"{name}.png"), **options)

    @property
    def overflow(self):
        return self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")


@pytest.fixture
def visit(browser, served):
    """Open the page; at the end, nothing may have gone wrong in the console or been asked of another host."""
    visits = []
    served[0].models = ["avg-llava", "avg-llava-stage3"]
    served[0].bodies.clear()

    def open_page(size=WIDE, scheme="light", allow_errors=False):
        visits.append((Visit(browser, served[1], size, scheme), allow_errors))
        return visits[-1][0]

    yield open_page
    for each, allow_errors in visits:
        each.context.close()
        assert each.foreign == []
        assert allow_errors or each.errors == []


def log_lines(served):
    files = sorted(served[2].glob("*-conv.json"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def eventually(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.05)


@pytest.mark.parametrize(("size", "scheme"), [(WIDE, "light"), (WIDE, "dark"), (PHONE, "light"), (PHONE, "dark")])
def test_a_question_about_a_picture_shows_answer_cost_and_grid(visit, served, size, scheme):
    open_page = visit(size, scheme).ready()
    name = f"{'page' if size == WIDE else 'phone'}-{scheme}"
    open_page.shoot(f"{name}-start")
    open_page.ask("What number is on the sign?", SCENE)
    open_page.answers(1)
    text = open_page.text()
    assert "You asked avg-llava: What number is on the sign?" in text
    assert "144 tokens per view" in text and "74 % saved" in text and "55 %" in text
    assert open_page.page.locator("#avg-chat-0 .avg-card svg").count() == 2
    assert open_page.page.locator("#avg-chat-0 .avg-chosen").inner_text().split()[0] == "144"
    assert open_page.overflow <= 0
    part = served[0].bodies[0]["messages"][0]["content"][0]
    assert part["image_url"]["url"].startswith("data:image/png;base64,")
    open_page.shoot(f"{name}-answer")
    assert open_page.last_answer_is_visible()
    open_page.ask("And which colour has the background?")
    open_page.answers(2)
    assert open_page.last_answer_is_visible()


@pytest.mark.parametrize("size", [WIDE, PHONE])
def test_after_a_long_question_the_answers_begin_is_seen_until_one_scrolls(visit, size):
    open_page = visit(size).ready()
    open_page.ask("first", SCENE)
    open_page.answers(1)
    open_page.ask("What is there? " * 200)
    open_page.answers(2)
    assert open_page.last_answer_is_visible(whole=False)
    open_page.page.hover("#avg-chat-0 [role=log]")
    open_page.page.mouse.wheel(0, -100_000)
    open_page.page.wait_for_function("document.querySelector('#avg-chat-0 [role=log]').scrollTop == 0")
    open_page.page.evaluate("document.querySelector('#avg-chat-0 .avg-said').append('!')")
    open_page.page.wait_for_timeout(100)
    assert open_page.page.evaluate("document.querySelector('#avg-chat-0 [role=log]').scrollTop") == 0
    open_page.page.click("#avg-regenerate")
    eventually(lambda: open_page.last_answer_is_visible(whole=False))


def test_the_answer_streams_and_stops_and_the_server_notices(visit, served):
    open_page, before = visit().ready(), served[0].hung_up
    open_page.ask("long story")
    open_page.page.wait_for_selector('#avg-chat-0 :text("story")')
    first = len(open_page.text())
    eventually(lambda: len(open_page.text()) > first + 20)
    assert open_page.page.locator("#avg-chat-0 .avg-card").count() == 0
    open_page.page.click("#avg-stop")
    open_page.answers(1)
    assert "Stopped before the end." in open_page.text()
    eventually(lambda: served[0].hung_up == before + 1)
    open_page.ask("and now?")
    open_page.answers(2)
    assert [message["role"] for message in served[0].bodies[-1]["messages"]] == ["user", "assistant", "user"]


def test_a_closed_page_stops_its_answer(visit, served):
    open_page, before = visit().ready(), served[0].hung_up
    open_page.ask("long story")
    open_page.page.wait_for_selector('#avg-chat-0 :text("story")')
    open_page.page.close()
    eventually(lambda: served[0].hung_up == before + 1)


def test_granularity_budget_and_pictures_of_earlier_turns_go_out(visit, served):
    open_page = visit().ready()
    open_page.page.click('#avg-granularity-0 label:has-text("36") >> nth=0')
    open_page.page.fill("#avg-budget input[type=number]", "500")
    open_page.page.press("#avg-budget input[type=number]", "Tab")
    open_page.ask("first", SCENE)
    open_page.answers(1)
    open_page.page.click('#avg-granularity-0 label:has-text("auto")')
    open_page.ask("second")
    open_page.answers(2)
    first, second = served[0].bodies
    assert (first["granularity"], first["max_visual_tokens"]) == (36, 500)
    assert "granularity" not in second
    assert second["messages"][0]["content"][0]["type"] == "image_url" and second["messages"][-1]["content"] == "second"
    assert "image cached" in open_page.text()


def test_two_sides_answer_one_question(visit, served):
    open_page = visit().ready()
    open_page.page.click("#avg-compare input")
    open_page.page.wait_for_selector("#avg-chat-1")
    open_page.page.click('#avg-granularity-1 label:has-text("36") >> nth=0')
    chosen = open_page.page.locator("#avg-granularity-1 input:checked")
    assert chosen.evaluate("input => getComputedStyle(input).backgroundColor") != "rgb(255, 255, 255)"  # with the mouse over it
    open_page.ask("What number is on the sign?", SCENE)
    open_page.answers(1, 0)
    open_page.answers(1, 1)
    asked = {(body["model"], body.get("granularity")) for body in served[0].bodies}
    assert asked == {("avg-llava", None), ("avg-llava-stage3", 36)}
    assert "36 tokens per view" in open_page.text(1) and "You asked avg-llava-stage3" in open_page.text(1)
    open_page.shoot("page-compare", full_page=True)
    open_page.page.set_viewport_size({"width": PHONE[0], "height": PHONE[1]})
    assert open_page.overflow <= 0
    open_page.shoot("phone-compare", full_page=True)


def test_asking_again_voting_and_clearing(visit, served):
    open_page = visit().ready()
    open_page.ask("same question")
    open_page.answers(1)
    open_page.page.click("#avg-regenerate")
    eventually(lambda: len(served[0].bodies) == 2)
    open_page.answers(1)
    assert served[0].bodies[0]["messages"] == served[0].bodies[1]["messages"]
    open_page.page.click('#avg-chat-0 button[aria-label="Dislike"]')
    open_page.page.wait_for_selector("text=noted as bad")
    open_page.page.click('#avg-chat-0 button[aria-label="Feedback"]')
    open_page.page.click('#avg-chat-0 button:has-text("Flag")')
    open_page.page.wait_for_selector("text=flagged")
    open_page.page.click('#avg-chat-0 button[aria-label="Like"]')
    open_page.page.wait_for_selector("text=noted as good")
    assert [line["type"] for line in log_lines(served)[-3:]] == ["downvote", "flag", "upvote"]
    line = log_lines(served)[-1]
    assert line["state"][0]["question"] == "same question" and line["model"] == "avg-llava"
    open_page.page.click("#avg-clear")
    open_page.page.wait_for_function("document.querySelectorAll('#avg-chat-0 .avg-card').length == 0")
    open_page.ask("fresh")
    open_page.answers(1)
    assert len(served[0].bodies[-1]["messages"]) == 1


def test_an_example_is_one_press(visit, served):
    open_page = visit().ready()
    open_page.page.click("#avg-chat-0 button:has-text('?') >> nth=0")
    open_page.answers(1)
    assert served[0].bodies[0]["messages"][0]["content"][0]["type"] == "image_url"


def test_markup_in_an_answer_is_text(visit):
    open_page = visit().ready()
    open_page.ask("html")
    open_page.answers(1)
    assert '<script>window.hacked = 1</script> <img src="http://192.0.2.1/x.png"' in open_page.text()
    assert "![picture](http://192.0.2.1/y.png)" in open_page.text()
    assert open_page.page.evaluate("window.hacked === undefined")
    open_page.ask('<img src="http://192.0.2.1/z.png" onerror="window.hacked = 1">')
    open_page.answers(2)
    open_page.ask("${window.hacked = 1} {{value}} {{#if value}}", SCENE)
    open_page.answers(3)
    assert open_page.text().count("${window.hacked = 1} {{value}} {{#if value}}") == 2
    assert open_page.page.evaluate("window.hacked === undefined")


@pytest.mark.parametrize(
    ("question", "told", "code"),
    [
        ("refuse", "The server is at capacity; try again.", "overloaded"),
        ("fail please now", "The model computed numbers that are not finite on this request.", "non_finite_logits"),
        ("die please now", "The server broke off in the middle of the answer.", "connection_lost"),
        ("garbage", "is not the OpenAI API", "not_understood"),
    ],
)
def test_failures_are_told_by_name_and_the_page_goes_on(visit, served, question, told, code):
    open_page = visit().ready()
    open_page.ask(question)
    open_page.answers(1)
    text = open_page.text()
    assert told in text and code in text
    assert "traffic" not in text.lower()
    if question == "refuse":
        assert "req-503" in text and "HTTP 503" in text
    if code == "non_finite_logits":
        open_page.shoot("page-error")
    open_page.ask("and now?")
    open_page.answers(2)
    assert [message["role"] for message in served[0].bodies[-1]["messages"]] == ["user"]


def test_no_worker_is_told_and_a_new_one_is_found_by_itself(visit, served):
    served[0].models = []
    open_page = visit()
    open_page.page.wait_for_selector("text=No model is being served now.")
    open_page.ask("anybody?")
    open_page.page.wait_for_selector("text=No model is chosen.")
    open_page.shoot("page-no-worker")
    served[0].models = ["latecomer"]
    open_page.page.wait_for_selector("text=No model is being served now.", state="hidden")
    open_page.ready()
    open_page.page.wait_for_function("document.querySelector('#avg-model-0 input').value == 'latecomer'")
    open_page.ask("anybody?")
    open_page.answers(1)
    assert "You asked latecomer" in open_page.text()


def test_what_is_chosen_stays_when_its_worker_dies_and_comes_back(visit, served):
    open_page = visit().ready()
    model = open_page.page.locator("#avg-model-0 input")
    assert model.input_value() == "avg-llava" and "nothing else" in open_page.page.inner_text("#avg-about-0")
    open_page.page.click('#avg-granularity-0 label:has-text("288")')
    served[0].models = ["avg-llava-stage3"]
    open_page.page.wait_for_selector("text=the worker is gone")
    assert model.input_value() == "avg-llava"
    assert open_page.page.locator("#avg-granularity-0 input:checked").get_attribute("value") == "288"
    open_page.shoot("page-worker-gone")
    served[0].models = ["avg-llava", "avg-llava-stage3"]
    open_page.page.wait_for_selector("text=the worker is gone", state="hidden")
    open_page.ask("still there?")
    open_page.answers(1)
    assert (served[0].bodies[-1]["model"], served[0].bodies[-1]["granularity"]) == ("avg-llava", 288)


def test_levels_over_the_budget_are_struck_out_and_a_budget_too_small_is_told_in_words(visit):
    open_page = visit().ready()
    open_page.page.fill("#avg-budget input[type=number]", "500")
    open_page.page.press("#avg-budget input[type=number]", "Tab")
    open_page.ask("What number is on the sign?", SCENE)
    open_page.answers(1)
    assert open_page.page.locator("#avg-chat-0 .avg-forbidden th").all_inner_texts() == ["288", "576"]
    line = open_page.page.locator("#avg-chat-0 .avg-forbidden th").first.evaluate("cell => getComputedStyle(cell).textDecorationLine")
    assert line == "line-through"
    open_page.ask("budget")
    open_page.answers(2)
    assert "The token budget is too small for these images: the smallest possible here is 192." in open_page.text()
    open_page.shoot("page-budget", full_page=True)


def test_a_comparison_of_one_model_begins_with_two_granularities(visit, served):
    served[0].models = ["avg-llava"]
    open_page = visit().ready()
    open_page.page.click("#avg-compare input")
    open_page.page.wait_for_function("document.querySelector('#avg-granularity-1 input:checked')?.value == '576'")
    open_page.ask("What number is on the sign?", SCENE)
    open_page.answers(1, 0)
    open_page.answers(1, 1)
    assert {body.get("granularity") for body in served[0].bodies} == {None, 576}
    open_page.shoot("page-compare-one", full_page=True)


def test_no_controller_is_told_and_found_by_itself(browser, tmp_path):
    backend = Backend()
    with contextlib.ExitStack() as stack:
        with running(backend.app) as url:
            port = int(url.rsplit(":", 1)[1])
        address = stack.enter_context(running(create_page_app(PageOptions(url, mode="once", log_folder=tmp_path))))
        open_page = Visit(browser, address, PHONE, "light")
        open_page.page.wait_for_selector("text=Nothing answers at")
        open_page.shoot("phone-no-controller")
        stack.enter_context(running(backend.app, port))
        open_page.ready()
        assert open_page.foreign == [] and open_page.errors == []
        open_page.context.close()


def test_something_that_is_no_picture_is_refused_in_words(visit, tmp_path):
    wrong = tmp_path / "text.png"
    wrong.write_text("no picture")
    open_page = visit(allow_errors=True).ready()  # the browser notes the refused upload in its console
    open_page.page.set_input_files("#avg-composer input[type=file]", str(wrong))
    open_page.page.wait_for_selector("text=A file cannot be used")
