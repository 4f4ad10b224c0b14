"""Pages of other sites ask a worker from a real browser: those that the operator names read its answers, all others read nothing."""

from __future__ import annotations

import json

import pytest
from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from llava.serve.api.worker_app import create_worker_app
from tests.serve.bodies import CHAT, chat_body
from tests.serve.browser import chromium
from tests.serve.fake_engine import FakeEngine
from tests.serve.page_backend import running
from tests.serve.running import RunningApp

pytestmark = pytest.mark.slow
ASK = """async ([url, body, headers]) => {
  try {
    const options = {method: "POST", body: JSON.stringify(body), headers: {"Content-Type": "application/json", ...headers}};
    const answer = await fetch(url, options);
    return {status: answer.status, text: await answer.text()};
  } catch (error) {
    return {blocked: error.name};
  }
}"""
BLOCKED = {"blocked": "TypeError"}
KEY = {"Authorization": "Bearer right"}


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


def site():
    """A web site of its own: another port is another origin."""
    app = FastAPI()
    app.add_api_route("/", lambda: HTMLResponse("<!doctype html><title>somebody's page</title>"))
    return running(app)


@pytest.mark.parametrize("keys", [(), ("right",)])
def test_a_page_of_another_site_is_answered_where_its_origin_is_allowed_and_blocked_where_not(browser, keys):
    engine = FakeEngine()
    with site() as allowed, site() as foreign:
        with RunningApp(create_worker_app(engine, api_keys=keys, allowed_origins=(allowed,))) as worker:
            page = browser.new_page()

            def ask(address, headers=KEY, **fields):
                page.goto(address)
                return page.evaluate(ASK, [worker.url + CHAT, chat_body("hello there", **fields), headers])

            found = ask(allowed)
            assert found["status"] == 200
            assert json.loads(found["text"])["choices"][0]["message"]["content"].split() == ["hello", "there"]
            streamed = ask(allowed, stream=True)
            assert streamed["status"] == 200 and streamed["text"].rstrip().endswith("data: [DONE]")
            assert ask(allowed, temperature=-1)["status"] == 400  # the page reads why it is refused
            assert not keys or ask(allowed, {})["status"] == 401
            asked = len(engine.requests)
            assert ask(foreign) == BLOCKED and ask("data:text/html,nobody's page") == BLOCKED
            assert ask(allowed.replace("127.0.0.1", "localhost")) == BLOCKED  # the same server under another name
            assert len(engine.requests) == asked == 2
            page.close()


def test_without_allowed_origins_every_page_of_another_site_is_blocked(browser):
    engine = FakeEngine()
    with site() as foreign, RunningApp(create_worker_app(engine)) as worker:
        page = browser.new_page()
        page.goto(foreign)
        assert page.evaluate(ASK, [worker.url + CHAT, chat_body(), {}]) == BLOCKED
        page.goto(worker.url + "/health")
        assert page.evaluate(ASK, [worker.url + CHAT, chat_body("its own page"), {}])["status"] == 200
        assert len(engine.requests) == 1
        page.close()
