"""The page's server without a browser: conversations, votes, reports, uploads, and what it refuses to do."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest
from PIL import Image
from starlette.responses import PlainTextResponse

from llava.serve import gradio_web_server
from llava.serve.backend.chat_client import ChatClient, ChatError, ModelInfo, Outcome
from llava.serve.page import guard
from llava.serve.page.app import PageOptions, create_page_app
from llava.serve.page.catalogue import Catalogue, ModelList
from llava.serve.page.chat import Chat, Refusal, page_error
from llava.serve.page.guard import PageGuard
from llava.serve.page.layout import _another_level, _place_settings, draw_models, read_settings
from llava.serve.page.log import ConversationLog
from llava.serve.page.render import chat_messages, error_html, notice_html, report_html, view_svg
from llava.serve.page.sessions import ChatSession, ChatSessions, Reply, Settings, Turn, read_image
from llava.serve.page.uploads import Uploads
from tests.serve.fake_backend import HTTP
from tests.serve.page_backend import Backend, running
from tests.serve.ports import free_port
from tests.serve.running import wait_until

ROOT = Path(__file__).resolve().parents[3]
EVIL = '<script>alert(1)</script><img src="http://192.0.2.1/x">'


def png(size=(32, 24), colour="red"):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def api():
    backend = Backend()
    with running(backend.app) as url:
        yield backend, url


@pytest.fixture(scope="module")
def page(api, tmp_path_factory):
    """(address, the application's chat, the log's folder)."""
    logs = tmp_path_factory.mktemp("logs")
    app = create_page_app(PageOptions(api[1], mode="reload", log_folder=logs))
    with running(app) as url:
        yield url, app.state.chat, logs


def make_chat(url, tmp_path, mode="reload"):
    client = ChatClient(url)
    return Chat(client, Catalogue(client, mode, seconds=0), ChatSessions(), ConversationLog(tmp_path / "logs"), tmp_path)


ONE_SIDE = (Settings("avg-llava"),)


async def converse(chat, *questions, sides=ONE_SIDE, files=()):
    for question in questions:
        conversation = await chat.begin("s", question, files, sides)
        async for _ in chat.answers(conversation):
            pass
        files = ()
    return conversation


# --- conversations ---


def test_a_conversation_goes_out_with_its_pictures_and_earlier_answers(api, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    chat = make_chat(api[1], tmp_path)
    conversation = asyncio.run(converse(chat, "first", "second", files=[str(tmp_path / "a.png")]))
    messages = api[0].bodies[-1]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert [part["type"] for part in messages[0]["content"]] == ["image_url", "text"]
    assert messages[1]["content"] == "You asked avg-llava: first"
    assert conversation.turns[1].replies[0].status == "done"


def test_a_failed_question_is_left_out_and_its_picture_goes_with_the_next(api, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    chat = make_chat(api[1], tmp_path)
    conversation = asyncio.run(converse(chat, "refuse", "again", files=[str(tmp_path / "a.png")]))
    assert conversation.turns[0].replies[0].error.code == "overloaded"
    (message,) = api[0].bodies[-1]["messages"]
    assert [part["type"] for part in message["content"]] == ["image_url", "text"]


def test_two_sides_keep_their_own_answers(api, tmp_path):
    sides = (Settings("avg-llava"), Settings("avg-llava-stage3", granularity=36))
    chat = make_chat(api[1], tmp_path)
    conversation = asyncio.run(converse(chat, "first", "second", sides=sides))
    assert [conversation.messages(side)[1]["content"].split()[2] for side in (0, 1)] == ["avg-llava:", "avg-llava-stage3:"]
    assert {(body["model"], body.get("granularity")) for body in api[0].bodies[-2:]} == {("avg-llava", None), ("avg-llava-stage3", 36)}


@pytest.mark.parametrize(
    ("text", "files", "model", "told"),
    [
        ("  ", (), "avg-llava", "Type a question"),
        ("x" * 20_001, (), "avg-llava", "20,001 characters"),
        ("hi", (), "gone", "not being served"),
        ("hi", ("/etc/passwd",), "avg-llava", "no longer here"),
        ("hi", ("../../etc/passwd",), "avg-llava", "no longer here"),
        ("hi", ("missing.png",), "avg-llava", "no longer here"),
        ("hi", ("text.png",), "avg-llava", "cannot be used"),
        ("hi", ("link.png",), "avg-llava", "no longer here"),
        ("hi", ("good.png",) * 9, "avg-llava", "at most 8 images"),
    ],
)
def test_what_cannot_be_asked_is_refused_and_the_next_question_works(api, tmp_path, text, files, model, told):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "link.png").symlink_to("/etc/hostname")
    chat = make_chat(api[1], tmp_path)

    async def go():
        with pytest.raises(Refusal, match=told):
            await chat.begin("s", text, [str(tmp_path / name) for name in files], [Settings(model)])
        return await converse(chat, "fine")

    assert asyncio.run(go()).turns[-1].replies[0].status == "done"


def test_one_answer_at_a_time_and_stopping_keeps_what_was_written(api, tmp_path):
    chat = make_chat(api[1], tmp_path)

    async def go():
        conversation = await chat.begin("s", "long", [], [Settings("avg-llava")])
        with pytest.raises(Refusal, match="still being written"):
            await chat.begin("s", "second", [], [Settings("avg-llava")])
        async for _ in chat.answers(conversation):
            if conversation.turns[0].replies[0].text:
                chat.stop("s")
        return conversation

    conversation = asyncio.run(go())
    reply = conversation.turns[0].replies[0]
    assert reply.status == "stopped" and reply.counts and not conversation.busy


def test_a_closed_answer_frees_the_conversation(api, tmp_path):
    chat = make_chat(api[1], tmp_path)

    async def go():
        conversation = await chat.begin("s", "long", [], [Settings("avg-llava")])
        answers = chat.answers(conversation)
        await anext(answers)
        await answers.aclose()
        return conversation

    assert not asyncio.run(go()).busy


def test_a_page_that_ends_lets_answers_finish_and_takes_no_new_questions(api, tmp_path):
    chat = make_chat(api[1], tmp_path)

    async def go():
        conversation = await chat.begin("s", "slow but sure", [], [Settings("avg-llava")])
        answers = chat.answers(conversation)
        await anext(answers)
        draining = asyncio.create_task(chat.drain())
        await asyncio.sleep(0)
        with pytest.raises(Refusal, match="shutting down"):
            await chat.begin("t", "too late", [], [Settings("avg-llava")])
        async for _ in answers:
            assert not draining.done()
        await asyncio.wait_for(draining, 10)
        return conversation

    assert asyncio.run(go()).turns[0].replies[0].status == "done"


def test_old_and_large_conversations_are_forgotten():
    image = read_image(png())
    conversations = ChatSessions(max_count=3, max_bytes=2 * image.cost)
    for name in "abcd":
        conversations.get(name)
    assert len(conversations) == 3 and conversations.find("a") is None
    for name in "bcd":
        conversations.get(name).turns.append(Turn("q", [image]))
    conversations.get("d")
    assert conversations.find("b") is None and conversations.find("d") is not None


def test_settings_are_those_of_the_sides_that_answer():
    with gr.Blocks():
        controls = _place_settings()
    first, second = controls.choices
    values = {part: part.value for part in controls.all}
    values |= {first.model: "a", second.model: "b", second.granularity: "36", controls.budget: 500, controls.bias: -1}
    assert read_settings(values, controls) == [Settings("a", None, 500, -1.0)]
    values[controls.compare] = True
    assert read_settings(values, controls) == [Settings("a", None, 500, -1.0), Settings("b", 36, 500, -1.0)]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"budget": float("inf")}, "token budget"),
        ({"top_p": None}, "top p"),
        ({"max_tokens": "many"}, "limit of new tokens"),
        ({"bias": []}, "cheaper or finer"),
        ({"temperature": "warm"}, "temperature"),
    ],
)
def test_settings_that_are_no_numbers_are_refused_by_name(wrong, told):
    with gr.Blocks():
        controls = _place_settings()
    values = {part: part.value for part in controls.all} | {controls.choices[0].model: "a"}
    values |= {getattr(controls, name): value for name, value in wrong.items()}
    with pytest.raises(Refusal, match=f"{told}.* is not a number; set it again"):
        read_settings(values, controls)


@pytest.mark.parametrize("wrong", ["8,32", "fine", "", [36]])
def test_the_page_takes_one_level_and_says_so(wrong):
    with gr.Blocks():
        controls = _place_settings()
    values = {part: part.value for part in controls.all} | {controls.choices[0].model: "a", controls.choices[0].granularity: wrong}
    with pytest.raises(Refusal, match="^The granularity is neither auto nor one whole number; set it again.$"):
        read_settings(values, controls)


# --- the list of models ---


def test_once_keeps_the_first_list_and_reload_asks_again(api):
    async def go(mode):
        async with ChatClient(api[1]) as client:
            catalogue = Catalogue(client, mode, seconds=0)
            lists = []
            for names in ([], ["one"], ["two"]):
                api[0].models = names
                lists.append((await catalogue.get()).names)
            return lists

    kept = api[0].models
    try:
        assert asyncio.run(go("once")) == [[], ["one"], ["one"]]
        assert asyncio.run(go("reload")) == [[], ["one"], ["two"]]
    finally:
        api[0].models = kept


# --- votes ---


def test_votes_and_conversations_are_lines_under_names_made_here(api, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    chat = make_chat(api[1], tmp_path)
    asyncio.run(converse(chat, "../../evil\nname", files=[str(tmp_path / "a.png")]))
    assert chat.vote("s", 0, 1, True) and chat.vote("s", 0, 1, "Flag") and chat.vote("s", 0, 1, None)
    assert chat.vote("s", 0, 1, None) == ""
    (file,) = (tmp_path / "logs").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-conv\.json", file.name)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["type"] for line in lines] == ["chat", "upvote", "flag", "unvote"]
    assert lines[1]["state"] == [
        {"question": "../../evil\nname", "images": [read_image(png()).sha256], "answer": lines[1]["state"][0]["answer"]}
    ]
    assert lines[0]["request_id"] == "req-7" and "data:" not in file.read_text()


@pytest.mark.parametrize(
    ("session", "message", "value"), [("s", 0, True), ("s", 7, True), ("s", -1, True), ("t", 1, True), ("s", 1, "../x")]
)
def test_votes_on_nothing_are_refused(api, tmp_path, session, message, value):
    chat = make_chat(api[1], tmp_path)
    asyncio.run(converse(chat, "hello"))
    with pytest.raises(Refusal):
        chat.vote(session, 0, message, value)


# --- what is drawn ---


def finished(images=(), usage=None, text="answer"):
    return Reply(Settings("m"), text, "done", Outcome("stop", usage or {}, tuple(images)), first_ms=12.0, total_ms=2345.0)


def test_a_report_shows_choice_probabilities_savings_and_times(api):
    report = api[0].report((640, 480), {"messages": [1]})
    html = report_html(finished([report], {"visual_tokens": 100, "full_visual_tokens": 400}), [read_image(png((640, 480)))])
    assert "<b>144</b> tokens per view" in html and "<b>75 %</b> saved" in html and "<b>2.3 s</b> in all" in html
    assert html.count("<svg") == 2 and "whole view: 12 by 12" in html and "4 tiles" in html
    assert html.count("avg-chosen") == 1 and "55 %" in html


def test_nothing_from_outside_becomes_markup(api):
    report = {
        **api[0].report((640, 480), {"messages": [1]}),
        "granularity": EVIL,
        "tokens_per_level": {EVIL: EVIL, "2": 3},
        "probabilities": [EVIL, 1],
    }
    reply = finished([report], {"visual_tokens": EVIL, "full_visual_tokens": EVIL, "completion_tokens": EVIL}, EVIL)
    image = read_image(png())
    drawn = str(chat_messages([Turn(EVIL, [image], {0: reply})], 0, lambda html: html))
    drawn += (
        error_html(ChatError(EVIL, EVIL, EVIL)) + notice_html(ModelList(error=ChatError(EVIL, EVIL)), EVIL) + notice_html(ModelList(), EVIL)
    )
    assert "<script" not in drawn and '<img src="http' not in drawn and "&lt;script&gt;" in drawn


@pytest.mark.parametrize(
    "change",
    [
        {"canvas": [0, 10]},
        {"canvas": [1e9, 10]},
        {"canvas": "<b>"},
        {"grid": [100_000, 100_000]},
        {"rows": [5, 1]},
        {"columns": [0, 99_999]},
        {"tiles": [0, 1]},
        {"picture": [1, 2, 3]},
        {"newlines": float("inf")},
        {"newlines": EVIL},
    ],
)
def test_a_grid_that_makes_no_sense_is_not_drawn(api, change):
    view = api[0].report((640, 480), {"messages": [1]})["grid"]["views"][1]
    image = read_image(png())
    assert view_svg(view, image) is not None
    assert view_svg({**view, **change}, image) is None
    assert view_svg(EVIL, image) is None


@pytest.mark.parametrize(
    ("budget", "pictures", "struck"),
    [
        (None, 1, []),
        (10**6, 1, []),
        (800, 1, ["288", "576"]),
        (1000, 2, ["288", "576"]),  # each beside the other at its cheapest, 192
        (800, 2, ["288", "576"]),  # 144 would be too much as well, but was chosen
        (1, 1, ["36", "72", "288", "576"]),  # what was chosen is never struck out
    ],
)
def test_levels_over_the_callers_budget_are_struck_out(api, budget, pictures, struck):
    report = api[0].report((672, 672), {"messages": [1]})
    reply = finished([report] * pictures)
    reply.settings = Settings("m", max_visual_tokens=budget)
    html = report_html(reply, [read_image(png((672, 672)))] * pictures)
    rows = re.findall(r'<tr class="avg-forbidden" title="over the token budget"><th scope="row">(\d+)</th>', html)
    assert rows == struck * pictures and ("struck out: over the token budget" in html) == bool(struck)


def test_a_budget_error_speaks_of_the_slider_and_its_smallest_value():
    error = ChatError("max_visual_tokens is 5, but ...", "invalid_request_error", "req-1", 400, "max_visual_tokens", 1024)
    told = page_error(error)
    assert told.text.startswith("The token budget is too small for these images: the smallest possible here is 1,024. Move “Token bu")
    malformed = ChatError("max_visual_tokens is 0, expected 1 or more.", "invalid_request_error", param="max_visual_tokens")
    assert page_error(malformed) is malformed
    assert (told.code, told.request_id, told.status) == ("invalid_request_error", "req-1", 400)
    other = ChatError("stop is wrong", "invalid_request_error", param="stop")
    assert page_error(other) is other


def test_a_budget_error_of_a_server_is_read_with_its_number(api):
    async def go():
        async with ChatClient(api[1]) as client:
            with pytest.raises(ChatError) as caught:
                async for _ in client.stream({"model": "m", "messages": [{"role": "user", "content": "budget"}]}):
                    pass
            return caught.value

    found = asyncio.run(go())
    assert (found.param, found.least) == ("max_visual_tokens", 192)


def test_a_full_disk_loses_lines_and_no_answer_and_is_told_once(api, tmp_path, monkeypatch, caplog):
    chat = make_chat(api[1], tmp_path)
    asyncio.run(converse(chat, "before"))
    (file,) = (tmp_path / "logs").iterdir()
    whole, real = file.read_bytes(), os.write

    def fills_up(descriptor, data):
        if not os.path.samestat(os.fstat(descriptor), file.stat()):
            return real(descriptor, data)
        if file.stat().st_size > len(whole):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, bytes(data)[:10])

    with monkeypatch.context() as patched:
        patched.setattr("llava.durable.os.write", fills_up)
        conversation = asyncio.run(converse(chat, "while it is full", "and again"))
    assert conversation.turns[-1].replies[0].status == "done" and file.read_bytes() == whole
    assert len([record for record in caplog.records if "no longer written" in record.message and "No space left" in record.message]) == 1
    asyncio.run(converse(chat, "after"))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["state"][-1]["question"] for line in lines] == ["before", "after"] and "2 lines are missing" in caplog.text


# --- what is chosen ---


def two(description=""):
    return ModelList((ModelInfo("a", (36, 576), True, description=description), ModelInfo("b", (36, 144))))


def chosen(controls, **values):
    first, second = controls.choices
    named = {"model": first.model, "level": first.granularity, "second": second.model, "other": second.granularity}
    start = {first.model: None, second.model: None, first.granularity: "auto", second.granularity: "auto", controls.budget: 0}
    return start | {named.get(name, controls.budget): value for name, value in values.items()}


def test_what_is_chosen_stays_chosen_when_its_worker_dies():
    with gr.Blocks():
        controls = _place_settings()
    first, second = controls.choices
    begun = draw_models(controls, two(), chosen(controls))
    assert (begun[first.model]["value"], begun[second.model]["value"]) == ("a", "b")
    without = ModelList(two().models[1:])
    after = draw_models(controls, without, chosen(controls, model="a", level="576", second="b", other="36", budget=300))
    assert after[first.model] == {"choices": ["b", "a"], "value": "a", "__type__": "update"}
    assert first.granularity not in after and controls.budget not in after
    assert after[second.granularity]["value"] == "36"
    back = draw_models(controls, two(), chosen(controls, model="a", level="576", second="b", budget=300))
    assert (back[first.granularity]["value"], back[controls.budget]["value"]) == ("576", 300)
    notice = notice_html(without, "http://localhost:30000", ["a"])
    assert "<b>a</b> is not being served now: the worker is gone" in notice and notice_html(two(), "http://localhost:30000") == ""


def test_a_models_own_description_is_shown_as_text():
    with gr.Blocks():
        controls = _place_settings()
    drawn = draw_models(controls, two("Knows <b>shapes</b>."), chosen(controls))
    assert "Knows &lt;b&gt;shapes&lt;/b&gt;." in drawn[controls.choices[0].about]["value"] and drawn[controls.choices[0].about]["visible"]
    assert not drawn[controls.choices[1].about]["visible"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"model": "a", "second": "a"}, "576"),
        ({"model": "a", "second": "a", "level": "36", "other": "36"}, "auto"),
        ({"model": "a", "second": "b"}, None),
        ({"model": "a", "second": "a", "level": "36"}, None),
    ],
)
def test_a_comparison_starts_with_two_different_settings(values, expected):
    class Served:
        async def get(self):
            return two()

    with gr.Blocks():
        controls = _place_settings()
    chat = SimpleNamespace(catalogue=Served())
    update = asyncio.run(_another_level(chat, controls, chosen(controls, **values)))
    assert update.get("value") == expected


def test_no_models_and_no_server_are_told_apart():
    assert "No model is being served now" in notice_html(ModelList(), "http://localhost:30000")
    assert "Nothing answers" in notice_html(ModelList(error=ChatError("Nothing answers.", "server_unreachable")), "http://localhost:30000")


# --- the server ---


def upload(url, *files):
    return HTTP.post(f"{url}/gradio_api/upload", files=[("files", file) for file in files])


def test_uploads_get_names_made_here_and_only_images_are_kept(page):
    url, chat, _ = page
    answer = upload(url, ("../../../evil<script>.html", png(), "text/html"))
    assert answer.status_code == 200
    (path,) = map(Path, answer.json())
    assert re.fullmatch(r"[0-9a-f]{64}\.png", path.name) and path.is_relative_to(chat.upload_folder)
    assert path.stat().st_mode & 0o077 == 0 or path.parent.stat().st_mode & 0o077 == 0
    shown = HTTP.get(f"{url}/gradio_api/file={path}")
    assert shown.status_code == 200 and shown.headers["content-type"] == "image/png"
    for name, data in (("a.png", b"no picture"), ("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"), ("empty.png", b"")):
        refused = upload(url, (name, data, "image/png"))
        assert refused.status_code == 400 and "cannot be used" in refused.text
    assert upload(url, *[("a.png", png(), "image/png")] * 9).status_code == 400
    assert HTTP.post(f"{url}/gradio_api/upload", content=iter([b"x"])).status_code == 411
    assert (
        HTTP.post(f"{url}/gradio_api/upload", content=b"x", headers={"content-type": "multipart/form-data; boundary=q"}).status_code == 400
    )


@pytest.mark.parametrize(("kind", "suffix"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("MPO", "jpg")])
def test_an_upload_is_named_and_sent_on_by_its_bytes(kind, suffix, tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (9, 7), "red").save(file, kind)
    kept = Uploads(tmp_path / "uploads").keep(file.getvalue())
    assert kept.suffix == f".{suffix}" and kept.read_bytes() == file.getvalue()
    seen = read_image(file.getvalue())
    assert seen.size == (9, 7) and seen.data_url.startswith(f"data:image/{'jpeg' if suffix == 'jpg' else suffix};base64,")


def test_expired_uploads_are_deleted(tmp_path):
    uploads = Uploads(tmp_path / "up", max_age=-1.0)
    path = uploads.keep(png())
    assert path.exists()
    uploads.expire()
    assert not path.exists()
    full = Uploads(tmp_path / "full", max_bytes=10)
    with pytest.raises(OverflowError, match="no room"):
        full.keep(png())


def test_pictures_may_come_and_go_in_many_threads(tmp_path):
    uploads = Uploads(tmp_path / "up", max_age=0.02)
    pictures = [png(colour=(number, 0, 0)) for number in range(48)]

    def keep(data):
        for _ in range(4):
            path = uploads.keep(data)
            uploads.expire()
            path.unlink(missing_ok=True)  # somebody tidies up the temporary folder

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(keep, pictures))
    finally:
        sys.setswitchinterval(interval)
    time.sleep(0.03)
    uploads.expire()
    assert list(uploads.folder.iterdir()) == []


def test_a_picture_that_comes_twice_takes_room_once(tmp_path):
    data = png()
    uploads = Uploads(tmp_path / "up", max_bytes=len(data))
    assert uploads.keep(data) == uploads.keep(data)
    with pytest.raises(OverflowError, match="no room"):
        uploads.keep(png(colour="blue"))


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=http://192.0.2.1/x",
        "/gradio_api/file=HTTPS%3A//192.0.2.1/x",
        "/gradio_api/file=file%3A///etc/passwd",
        "/gradio_api/proxy=http://192.0.2.1/x",
        "/gradio_api/stream/a/b/c/playlist.m3u8",
        "/gradio_api/deep_link",
        "/monitoring",
        "/login_check",
        "/docs",
        "/openapi.json",
        "/../../etc/passwd",
        "/static/..%2f..%2f..%2fetc/passwd",
        f"/gradio_api/file={ROOT}/pyproject.toml",
        f"/gradio_api/file={ROOT}/playground/images/scene_pink.png",
    ],
)
def test_no_file_proxy_or_unknown_address_is_served(page, path):
    answer = HTTP.get(page[0] + path)
    assert answer.status_code in (403, 404)
    assert "root:" not in answer.text and 'avg-llava"' not in answer.text


@pytest.mark.parametrize(
    "content",
    [
        b"not json",
        b"[" * 5000 + b"]" * 5000,
        json.dumps({"data": [{"text": "x", "files": [{"path": "http://192.0.2.1/x.png", "meta": {"_type": "gradio.FileData"}}]}]}).encode(),
        json.dumps({"data": [{"path": " file:///etc/passwd"}]}).encode(),
    ],
)
def test_requests_that_name_remote_files_or_are_no_json_never_reach_gradio(page, content):
    for path in ("/gradio_api/queue/join", "/gradio_api/run/predict", "/gradio_api/call/ask"):
        assert HTTP.post(page[0] + path, content=content, headers={"content-type": "application/json"}).status_code == 400
    assert HTTP.post(f"{page[0]}/gradio_api/queue/join", content=b"x" * 1_100_000).status_code == 413


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("queue/join", {"fn_index": 999, "data": [], "session_hash": "a"}),
        ("queue/join", {"fn_index": True, "data": [], "session_hash": "a"}),
        ("queue/join", {"fn_index": [], "data": [], "session_hash": "a"}),
        ("queue/join", {"data": [], "session_hash": "a"}),
        ("queue/join", []),
        ("run/predict", {"fn_index": -1, "data": [], "session_hash": "a"}),
        ("run/nope", {"data": [], "session_hash": "a"}),
        ("run/stop", {"data": []}),
        ("run/stop", {"data": [], "session_hash": 5}),
        ("run/stop", {"data": None, "session_hash": "a"}),
        ("run/compare", {"data": [], "session_hash": "a"}),
        ("run/compare", None),
        ("call/nope", {"data": []}),
    ],
)
def test_a_call_of_no_event_is_the_callers_mistake(page, path, body):
    assert HTTP.post(f"{page[0]}/gradio_api/{path}", json=body).status_code == 400


@pytest.mark.parametrize("path", ["queue/join", "run/predict", "call/ask", "cancel", "reset"])
def test_a_request_that_does_not_come_ends_in_time(path):
    async def never(scope, receive, send):
        raise AssertionError("half a request reached the page")

    head = f"POST /gradio_api/{path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    with running(PageGuard(never, {}, body_seconds=0.2)) as url:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=60) as slow:
            slow.sendall(head.encode() + b'{"data"')
            assert slow.recv(65536).startswith(b"HTTP/1.1 408 ")


def test_requests_that_arrive_hold_only_so_much_together(monkeypatch):
    monkeypatch.setattr(guard, "MAX_JSON_BYTES", 1000)
    monkeypatch.setattr(guard, "HELD_BODIES", 2)

    async def quiet(scope, receive, send):
        await PlainTextResponse("in")(scope, receive, send)

    part = b"POST /gradio_api/cancel HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n" + b" " * 990
    with running(PageGuard(quiet, {})) as url:
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        with socket.create_connection(address) as first, socket.create_connection(address) as second:
            for slow in (first, second):
                slow.sendall(part)
            wait_until(lambda: HTTP.post(f"{url}/gradio_api/cancel", content=b"{}" + b" " * 100).status_code == 503)
            refused = HTTP.post(f"{url}/gradio_api/cancel", content=b"{}" + b" " * 100)
            assert refused.headers["retry-after"] == "1"
            first.sendall(b" " * 8 + b"{}")
            assert first.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert HTTP.post(f"{url}/gradio_api/cancel", content=b"{}").status_code == 200


def test_calls_in_the_pages_own_form_reach_it(page):
    config = HTTP.get(f"{page[0]}/config").json()
    event = next(each for each in config["dependencies"] if each["api_name"] == "compare")
    box = next(part["id"] for part in config["components"] if part["props"].get("elem_id") == "avg-compare")
    data = [True if part == box else None for part in event["inputs"]]
    for path, fields in (("run/compare", {}), ("run/predict", {"fn_index": event["id"]})):
        answer = HTTP.post(f"{page[0]}/gradio_api/{path}", json={"data": data, "session_hash": "a", **fields})
        assert answer.status_code == 200 and answer.json()["data"]


def test_names_beyond_a_file_systems_are_not_looked_for(page):
    for folder in ("static", "assets", "svelte"):
        assert HTTP.get(f"{page[0]}/{folder}/{'a' * 300}").status_code == 404


def test_the_browser_is_told_to_load_nothing_foreign(page):
    answer = HTTP.get(page[0])
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "frame-ancestors 'self'" in policy and "http:" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?://(?!127\.0\.0\.1)', answer.text)
    config = HTTP.get(f"{page[0]}/config").json()
    assert config["analytics_enabled"] is False


def test_programs_can_ask_through_gradio_client(page):
    gradio_client = pytest.importorskip("gradio_client")
    client = gradio_client.Client(page[0], verbose=False, analytics_enabled=False)
    picture = gradio_client.handle_file(str(ROOT / "playground" / "images" / "scene_pink.png"))
    answer = client.predict({"text": "What is this?", "files": [picture]}, "", "36", 0, api_name="/ask")
    assert answer["text"].startswith("You asked avg-llava: What is this?") and answer["usage"]["granularities"] == [36]
    with pytest.raises(Exception, match="not being served"):
        client.predict({"text": "What is this?", "files": []}, "gone", "auto", 0, api_name="/ask")
    with pytest.raises(Exception, match="granularity is neither auto nor one whole number"):
        client.predict({"text": "What is this?", "files": []}, "", "36,72", 0, api_name="/ask")
    with pytest.raises(Exception):  # noqa: B017 - whatever gradio_client makes of Gradio's refusal of a path outside the uploads
        client.predict(
            {"text": "x", "files": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}]}, "", "auto", 0, api_name="/ask"
        )


# --- the command ---


def parsed(*flags):
    return gradio_web_server.build_parser().parse_args(flags)


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ((), {"127.0.0.1"}),
        (("--host", "::1"), {"::1"}),
        (("--host", "localhost", "--allow-host", "Chat.Example.org."), {"localhost", "chat.example.org"}),
        (("--host", "0.0.0.0"), None),
        (("--host", "::"), None),
        (("--host", ""), None),
        (("--host", "0.0.0.0", "--allow-host", "a.example", "--allow-host", "b.example"), {"0.0.0.0", "a.example", "b.example"}),
    ],
)
def test_a_page_for_this_machine_alone_has_only_the_names_it_was_given(flags, names):
    assert gradio_web_server.read_options(parsed(*flags)).names == names


@pytest.mark.parametrize("name", ["", "http://a.example", "a.example:443", "a/b", "*.example", "b\u00fccher.example"])
def test_an_allowed_host_is_a_name_alone(name):
    with pytest.raises(ValueError, match="--allow-host is .* expected a name alone"):
        gradio_web_server.read_options(parsed("--allow-host", name))


def test_a_foreign_name_that_leads_here_is_refused_before_anything_is_served(api):
    app = create_page_app(PageOptions(api[1], log_folder=None, names=frozenset({"chat.example.org"})))
    with running(app) as url:
        for host in ("chat.example.org", "chat.example.org:443", "CHAT.example.org.", "localhost:7860", "[::1]:7860"):
            assert HTTP.get(f"{url}/config", headers={"host": host}).status_code == 200
        for host in ("rebound.example", "chat.example.org.rebound.example", "127.0.0.1.rebound.example:7860", "localhost.rebound.example"):
            for method, path in (("GET", "/config"), ("POST", "/gradio_api/upload"), ("POST", "/gradio_api/queue/join")):
                refused = HTTP.request(method, url + path, headers={"host": host})
                assert refused.status_code == 403 and "--allow-host" in refused.text


def test_pages_of_other_sites_post_nothing(page):
    for origin, status in (("http://evil.example", 403), ("null", 403), (page[0], 200), ("http://localhost:9", 200), (None, 200)):
        headers = {} if origin is None else {"origin": origin}
        sent = HTTP.post(f"{page[0]}/gradio_api/upload", files={"files": ("a.png", png(), "image/png")}, headers=headers)
        assert sent.status_code == status
        called = HTTP.post(f"{page[0]}/gradio_api/run/compare", content=b"{}", headers=headers)
        assert called.status_code == (status if status == 403 else 400)


def test_a_proxys_name_is_the_pages_own_also_where_the_proxy_asks_by_address(api):
    app = create_page_app(PageOptions(api[1], log_folder=None, names=frozenset({"chat.example.org"})))
    with running(app) as url:
        for origin, status in (("https://chat.example.org", 400), ("https://evil.example", 403)):
            assert HTTP.post(f"{url}/gradio_api/run/compare", content=b"{}", headers={"origin": origin}).status_code == status


def test_the_published_command_parses():
    args = gradio_web_server.build_parser().parse_args(["--controller", "http://localhost:30000", "--model-list-mode", "reload"])
    options = gradio_web_server.read_options(args)
    assert (options.url, options.mode, options.log_folder) == ("http://localhost:30000", "reload", Path("logs"))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--concurrency-count", "0"], "expected 1 or more"),
        (["--port", "70000"], "expected 1 to 65535"),
        (["--controller", "localhost:30000"], "expected one like"),
    ],
)
def test_flags_that_cannot_work_end_with_one_sentence(flags, told, capsys):
    assert gradio_web_server.main(flags) == 1
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_an_empty_conversation_draws_nothing():
    assert chat_messages(ChatSession().turns, 0, str) == []


@pytest.mark.slow
def test_the_command_serves_the_page_and_ends_well_on_sigterm(api, tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "llava.serve.gradio_web_server", "--controller", api[1], "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout.readline() == f"The page is at http://127.0.0.1:{port}\n"
        assert "gradio_config" in HTTP.get(f"http://127.0.0.1:{port}").text
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
