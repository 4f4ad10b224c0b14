"""What was reported of servers of this kind, line by line, and the tests which show that ours behaves; here are those found nowhere else.

`ATTACKS` and `PAINS` name, for each report, the tests that fail when its rule is broken. Every attack meets a server on a socket of this
machine. Nothing here connects to another address: where a rule about addresses is tested, a recorder stands in place of the network.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import functools
import hmac
import importlib.util
import json
import logging
import pickle
import re
import resource
import selectors
import socket
import struct
import threading
import time
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route

from llava import fetch as fetching
from llava.serve import gradio_web_server
from llava.serve.api import image_loader
from llava.serve.api.image_loader import ImageLoader
from llava.serve.api.worker_app import create_worker_app
from llava.serve.cluster.controller_app import create_controller_app
from llava.serve.cluster.settings import ControllerSettings
from llava.serve.http import connections as http_connections
from llava.serve.http.middleware import MAX_HEADER_BYTES
from llava.serve.page import uploads
from llava.serve.page.app import PageOptions, create_page_app
from llava.serve.page.guard import PageGuard
from llava.serve.protocol import Limits
from tests.serve.api.test_image_loader import BAD_IMAGES, told_of
from tests.serve.bodies import CHAT, WORKER, chat_body, data_url, picture, worker_body
from tests.serve.cluster.test_controller_app import FOREIGN, MALFORMED, STATUS, RecordingConnector, no_names, settings
from tests.serve.fake_engine import FakeEngine
from tests.serve.http.test_middleware import raw_exchange
from tests.serve.page_backend import running as running_page
from tests.serve.running import RunningApp, forget_peak_memory, peak_memory, wait_until

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60.0
"""After which a test gives up on an answer; on a machine with much else to do, all of them come late."""
HTTP = httpx.Client(timeout=SECONDS, trust_env=False)

ATTACKS: dict[str, tuple[str, ...]] = {
    "CVE-2024-9309, CVE-2024-12068, CVE-2024-10044: server-side requests through worker registration": (
        "serve/test_threats.py::test_no_foreign_worker_is_registered_or_called",
        "serve/cluster/test_controller_app.py::test_without_token_and_list_no_foreign_address_is_taken_or_called",
        "serve/cluster/test_controller_app.py::test_the_token_is_asked_of_everybody_once_there_is_one",
        "serve/cluster/test_controller_app.py::test_the_checked_address_is_what_is_connected_to_and_the_name_is_resolved_once",
        "serve/cluster/test_controller_app.py::test_a_worker_that_redirects_is_not_followed",
    ),
    "CVE-2025-6242, CVE-2026-24779, CVE-2026-33626, CVE-2026-0599: server-side requests through addresses of images": (
        "serve/test_threats.py::test_addresses_of_images_are_not_followed_unless_the_operator_says_so",
        "serve/test_threats.py::test_followed_addresses_of_images_stay_on_the_public_internet",
        "serve/api/test_image_loader.py::test_text_is_never_searched_for_addresses",
        "serve/api/test_image_loader.py::test_each_redirect_passes_the_same_door",
        "test_images.py::test_a_dripping_server_is_left_at_the_deadline",
        "test_images.py::test_bad_answers_are_refused",
    ),
    "CVE-2026-22778: a decoder's words tell addresses": (
        "serve/test_threats.py::test_every_broken_image_gets_the_same_words",
        "serve/http/test_middleware.py::test_nothing_about_an_inner_failure_leaves_the_log",
    ),
    "CVE-2026-22773, GHSA-8jr5-v98p-w75m: odd images": (
        "serve/test_faults.py::test_broken_and_odd_pictures_in_a_crowd_cost_nobody_an_answer",
        "serve/api/test_image_loader.py::test_odd_images_are_read",
        "test_images.py::test_exif_orientation_is_applied",
    ),
    "decompression bombs": (
        "serve/test_threats.py::test_bombs_are_refused_by_their_headers",
        "test_images.py::test_base64_length_is_checked_before_decoding",
    ),
    "CVE-2025-46722, CVE-2025-25183: caches with weak keys": (
        "serve/test_faults.py::test_what_is_kept_of_one_picture_never_answers_for_another",
        "serve/engine/test_caches.py::test_a_key_holds_pixels_mode_size_and_revision",
        "serve/engine/test_caches.py::test_the_key_of_a_beginning_holds_ids_pictures_granularities_and_revision",
    ),
    "CVE-2025-62372: embeddings of a wrong shape": ("serve/test_threats.py::test_the_fields_of_a_request_are_a_closed_set",),
    "CVE-2025-62164, CVE-2025-67729, CVE-2025-32434, CVE-2026-7301: unpickling": (
        "serve/test_threats.py::test_nothing_that_comes_in_is_unpickled",
        "serve/test_threats.py::test_no_module_unpickles_or_runs_a_checkpoints_code",
        "model/test_loading.py::test_pickled_weights_are_read_only_when_asked",
    ),
    "CVE-2025-66448: code from a checkpoint": ("serve/test_threats.py::test_no_module_unpickles_or_runs_a_checkpoints_code",),
    "CVE-2025-48956, CVE-2025-61620: huge headers and bodies, clients' own template arguments": (
        "serve/test_threats.py::test_the_fields_of_a_request_are_a_closed_set",
        "serve/test_threats.py::test_sizes_and_counts_have_caps",
        "serve/http/test_connections.py::test_headers_that_do_not_come_or_are_too_large_end_the_connection",
        "serve/test_fuzz.py::test_no_random_body_is_a_500",
    ),
    "CVE-2025-59425: a key compared in variable time": (
        "serve/test_threats.py::test_keys_are_compared_in_constant_time_by_a_running_server",
        "serve/http/test_keys.py::test_all_keys_are_compared_in_constant_time_whichever_fits",
    ),
    "CVE-2024-1561, CVE-2024-4325, CVE-2026-7302: files through the page or clients' file names": (
        "serve/page/test_app.py::test_no_file_proxy_or_unknown_address_is_served",
        "serve/page/test_app.py::test_uploads_get_names_made_here_and_only_images_are_kept",
        "serve/page/test_app.py::test_requests_that_name_remote_files_or_are_no_json_never_reach_gradio",
        "serve/page/test_app.py::test_expired_uploads_are_deleted",
        "serve/page/test_app.py::test_programs_can_ask_through_gradio_client",
        "serve/test_threats.py::test_uploads_that_drip_in_are_bounded_in_number_and_time",
    ),
    "uploads that stall, and bodies before keys": (
        "serve/http/test_body_limits.py::test_one_clients_stalled_bodies_leave_everybody_their_answers",
        "serve/http/test_body_limits.py::test_a_slow_body_goes_on_and_a_stalled_one_is_ended",
        "serve/cluster/test_controller_app.py::test_keys_and_tokens_are_judged_from_the_head",
        "serve/cluster/test_controller_app.py::test_strangers_bodies_have_a_budget_of_their_own",
        "serve/test_threats.py::test_one_clients_connections_leave_some_to_others",
        "serve/test_threats.py::test_the_page_gives_up_a_browser_that_does_not_read",
    ),
    "a worker that hangs, a worker that lies": (
        "serve/cluster/test_controller_app.py::test_a_request_leaves_a_worker_that_hangs_when_that_is_forgotten",
        "serve/cluster/test_controller_app.py::test_a_stream_that_has_begun_ends_with_a_typed_error_when_its_worker_is_forgotten",
        "serve/cluster/test_controller_app.py::test_a_lying_workers_words_reach_nobody",
        "serve/cluster/test_controller_app.py::test_a_lie_that_is_hidden_in_a_stream_reaches_nobody",
    ),
    "compressed bodies": ("serve/http/test_body_limits.py::test_a_compressed_body_is_refused_by_name_and_unread",),
    "web pages of other sites": (
        "serve/test_threats.py::test_a_web_page_cannot_ask_a_server_on_the_readers_machine",
        "serve/cluster/test_controller_app.py::test_pages_of_the_sites_that_the_operator_names_may_ask",
    ),
    "overload": (
        "serve/http/test_middleware.py::test_a_full_server_says_so_before_the_body_comes",
        "serve/http/test_middleware.py::test_refusing_takes_less_than_50_milliseconds",
        "serve/test_threats.py::test_bodies_that_drip_in_keep_nobody_out",
        "serve/test_threats.py::test_a_body_that_does_not_come_in_time_is_given_up",
        "serve/api/test_worker_app.py::test_a_client_that_leaves_ends_its_generation",
        "serve/api/test_worker_app.py::test_a_signal_lets_running_answers_finish_and_refuses_new_ones",
        "serve/test_faults.py::test_a_client_that_leaves_in_the_middle_gives_its_place_back",
        "serve/test_faults.py::test_programs_recover_from_a_killed_controller_and_drain_on_sigterm",
    ),
}
"""What attacks such servers."""

PAINS: dict[str, tuple[str, ...]] = {
    "LLaVA#709, #1149, #1305; LLaVA-NeXT#365, #398: batched answers wrong or empty": (
        "serve/engine/test_embedded.py::test_a_crowd_gets_the_answers_that_each_gets_alone",
        "serve/test_worker_with_model.py::test_answers_are_those_of_the_model_alone_whoever_else_asks",
    ),
    "LLaVA#14, #1332, #1634; FastChat#1527: every fault is 'high traffic'": (
        "serve/api/test_worker_app.py::test_every_kind_of_error_reaches_the_client",
        "serve/test_faults.py::test_one_request_of_a_batch_that_runs_out_of_memory_or_is_poisoned_fails_alone",
        "serve/test_faults.py::test_a_batch_too_large_for_memory_costs_nobody_an_answer",
    ),
    "LLaVA#14, #361, #986: empty list of models, the order of starting matters": (
        "serve/cluster/test_controller_app.py::test_any_order_of_starting_works_and_a_restarted_controller_is_found_again",
        "serve/cluster/test_controller_app.py::test_workers_are_forgotten_after_silence_and_ready_says_so",
        "serve/test_faults.py::test_a_controller_that_starts_again_has_its_worker_back",
        "serve/page/test_browser.py::test_no_worker_is_told_and_a_new_one_is_found_by_itself",
    ),
    "AVG-LLaVA#4; LLaVA#754; LLaVA-NeXT#100, #115: wrong template, '!!!!'": (
        "serve/test_worker_with_model.py::test_llavas_own_way_of_asking",
        "serve/engine/test_embedded.py::test_broken_numbers_fail_their_own_row",
        "serve/engine/test_sampling.py::test_broken_numbers_are_seen_in_their_own_row",
    ),
    "AVG-LLaVA#8: a list of granularities, errors swallowed": (
        "serve/api/test_openai_chat.py::test_granularity",
        "serve/engine/test_embedded.py::test_a_request_that_cannot_work_fails_alone_with_a_sentence",
    ),
    "LLaVE#3; LLaVA-NeXT#130, #501; LLaVA#402: no way to other engines": (
        "serve/test_sglang_worker.py::test_our_own_api_as_the_backend_gives_the_same_answers_and_reports",
        "serve/test_sglang_worker.py::test_a_misbehaving_backend_is_a_typed_error_with_a_request_id",
    ),
    "InternVL#1231; VisionZip#24; vllm PR#51221: fewer tokens but no speed-up": (
        "serve/http/test_metrics.py::test_answers_are_counted_with_what_they_saved",
        "serve/page/test_app.py::test_a_report_shows_choice_probabilities_savings_and_times",
    ),
    "LLaVA#700, #704: Mac and CPU": ("serve/test_main.py::test_the_command_serves_the_micro_model_and_ends_well_on_sigterm",),
}
"""What hurts users, where the serving side has a part in it."""


@functools.cache
def functions_of(file: str) -> dict[str, list[ast.FunctionDef]]:
    """A test page's functions by their names; of several with one name, pytest sees the last alone."""
    found: dict[str, list[ast.FunctionDef]] = {}
    for node in ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found.setdefault(node.name, []).append(node)
    return found


def checks_something(function: ast.FunctionDef, others: dict[str, list[ast.FunctionDef]], seen: frozenset[str] = frozenset()) -> bool:
    """Whether a function of a page of tests asserts or expects an error, itself or in a function of that page that it calls."""
    if function.name in seen:
        return False
    for node in ast.walk(function):
        if isinstance(node, ast.Assert) and not isinstance(node.test, ast.Constant):
            return True
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if called == "pytest.raises":
            return True
        if called in others and checks_something(others[called][-1], others, seen | {function.name}):
            return True
    return False


@pytest.mark.parametrize("line", [*ATTACKS, *PAINS])
def test_every_line_names_tests_that_run_and_check_something(line: str) -> None:
    for name in (ATTACKS | PAINS)[line]:
        file, _, function = name.partition("::")
        functions = functions_of(file)
        assert function.startswith("test_") and len(functions.get(function, ())) == 1, name
        found = functions[function][0]
        marks = {mark for decorator in found.decorator_list for mark in re.findall(r"pytest\.mark\.(\w+)", ast.unparse(decorator))}
        assert marks <= {"parametrize", "filterwarnings", "slow"}, (name, marks)  # neither skipped nor expected to fail
        assert not re.search(r"pytest\.(skip|xfail)\b", ast.unparse(found)), name
        for package in re.findall(r"pytest\.importorskip\('(\w+)'", ast.unparse(found)):
            assert importlib.util.find_spec(package), (name, package)
        assert checks_something(found, functions), name


def test_a_test_that_checks_nothing_is_seen() -> None:
    page = "def a():\n    f()\ndef f():\n    g()\ndef g():\n    assert x\ndef b():\n    b()\n    h()\n    assert True\n"
    functions = {node.name: [node] for node in ast.parse(page).body if isinstance(node, ast.FunctionDef)}
    assert checks_something(functions["a"][0], functions) and not checks_something(functions["b"][0], functions)


class Served:
    """A worker over a made-up engine, and its app's parts."""

    def __init__(self, running: RunningApp, engine: FakeEngine) -> None:
        self.url, self.port, self.engine, self.limiter = running.url, running.port, engine, running.app.state.limiter
        self.server = running.server

    def ask(self, text: str = "hello", urls: tuple[str, ...] = (), **fields: Any) -> httpx.Response:
        return HTTP.post(self.url + CHAT, json=chat_body(text, urls, **fields))

    def raw(self, data: bytes) -> bytes:
        """What comes back until the server ends the connection."""
        return raw_exchange(self.port, data, SECONDS)

    def head(self, data: bytes) -> bytes:
        """The head of the first answer; nothing where the server ends the connection without one."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS) as sock:
            sock.sendall(data)
            return received(sock, b"\r\n\r\n")


@pytest.fixture(scope="module")
def worker() -> Iterator[Served]:
    engine = FakeEngine()
    with RunningApp(create_worker_app(engine, Limits(max_body_bytes=30_000_000))) as running:
        yield Served(running, engine)


@pytest.fixture
def serve() -> Iterator[Any]:
    """Serves a worker app with other options until the test ends."""
    with ExitStack() as stack:

        def start(engine: FakeEngine | None = None, limits: Limits | None = None, **options: Any) -> Served:
            engine = engine or FakeEngine()
            return Served(stack.enter_context(RunningApp(create_worker_app(engine, limits, **options))), engine)

        yield start


def received(sock: socket.socket, until: bytes) -> bytes:
    """What comes until a mark has come or the other side has ended; TimeoutError where neither happens."""
    found = b""
    while until not in found:
        try:
            part = sock.recv(65536)
        except ConnectionResetError:
            break
        if not part:
            break
        found += part
    return found


def request_head(path: str = CHAT, *headers: str, method: str = "POST") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *headers, "", ""]).encode()


# ---- addresses ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [STATUS, None])
def test_no_foreign_worker_is_registered_or_called(status: Any) -> None:
    """From this machine without a token; through a proxy on this machine; and with the token, where the address is malformed."""
    body = {"check_heart_beat": True, "worker_status": status}
    open_one, keyed = RecordingConnector(), RecordingConnector()
    wide = settings("0.0.0.0/0", "::/0", tokens=("secret",))
    with (
        RunningApp(create_controller_app(transport=open_one, resolve=no_names)) as first,
        RunningApp(create_controller_app(wide, transport=keyed, resolve=no_names)) as second,
    ):
        for url in FOREIGN:
            assert HTTP.post(first.url + "/register_worker", json={"worker_name": url, **body}).status_code == 403, url
        for url in ("http://127.0.0.1:6379", "http://[::1]:6379"):
            for header in ("X-Forwarded-For", "Forwarded", "Via", "X-Real-IP", "Origin"):
                told = HTTP.post(first.url + "/register_worker", json={"worker_name": url, **body}, headers={header: "http://127.0.0.1"})
                assert told.status_code == 403, (url, header)
            assert HTTP.post(second.url + "/register_worker", json={"worker_name": url, **body}).status_code == 401
        for url in MALFORMED:
            for at in (first.url, second.url):
                named = {"worker_name": url, "token": "secret", **body}
                assert HTTP.post(at + "/register_worker", json=named).status_code == 400, url
        metadata = {"worker_name": "http://169.254.169.254:80", "token": "secret", **body}
        assert HTTP.post(second.url + "/register_worker", json=metadata).status_code == 403
        for at in (first.url, second.url):
            HTTP.post(at + "/refresh_all_workers", json={})
            assert HTTP.post(at + CHAT, json=chat_body()).status_code == 503
            assert HTTP.post(at + "/list_models", json={}).json() == {"models": []}
    assert open_one.calls == keyed.calls == []


PRIVATE = (
    "http://169.254.169.254/latest/meta-data", "http://127.0.0.1/x.png", "http://[::1]/x.png", "http://10.1.2.3/x.png",
    "http://2130706433/x",
    "http://0177.0.0.1/x", "http://0x7f.1/x", "http://[::ffff:10.0.0.1]/x", "http://inside.example/x", "http://both.example/x",
    "HTTPS://user@inside.example/x", "http://public.example\\@127.0.0.1/x",
)  # fmt: skip


def test_addresses_of_images_are_not_followed_unless_the_operator_says_so(serve: Any) -> None:
    fetched: list[str] = []
    limits = Limits()
    loader = ImageLoader(limits, FakeEngine().prepare_image, fetch_bytes=lambda url, _: fetched.append(url) or b"")  # type: ignore
    served = serve(limits=limits, image_loader=loader)
    for url in (*PRIVATE, "http://public.example/x.png", "https://public.example/x.png", "//public.example/x", "file:///etc/passwd"):
        assert served.ask("q", (url,)).json()["error"]["code"] == "invalid_image"
        asked = HTTP.post(served.url + WORKER, json=worker_body("<image> q", images=[url]))
        assert asked.json()["error"]["code"] == "invalid_image"
    assert fetched == [] and served.engine.requests == []


def test_followed_addresses_of_images_stay_on_the_public_internet(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"inside.example": ["10.0.0.5"], "both.example": ["93.184.216.34", "127.0.0.1"], "public.example": ["93.184.216.34"]}
    resolved, connected = [], []

    def resolve(host: str, port: int) -> list[str]:
        resolved.append(host)
        literal = fetching.literal_address(host)
        return names.get(host, []) if literal is None else [str(literal)]

    def connect(address: str, port: int, timeout: float) -> socket.socket:
        connected.append(address)
        raise OSError("nothing is connected to in tests")

    def fetch(url: str, resolver: Any) -> bytes:
        return fetching.fetch(url, max_bytes=1000, timeout=SECONDS, resolve=resolver, connect=connect)

    monkeypatch.setattr(image_loader, "resolve_host", resolve)
    limits = Limits(allow_remote_images=True)
    served = serve(limits=limits, image_loader=ImageLoader(limits, FakeEngine().prepare_image, fetch_bytes=fetch))
    for url in PRIVATE:
        assert served.ask("q", (url,)).json()["error"]["code"] == "invalid_image"
    assert connected == []
    resolved.clear()
    assert served.ask("q", ("http://public.example/x",)).status_code == 400
    assert connected == ["93.184.216.34"] and resolved == ["public.example"]  # once


# ---- images ----------------------------------------------------------------------------------------------------------------


def test_every_broken_image_gets_the_same_words(worker: Served) -> None:
    for name, url in BAD_IMAGES.items():
        error = worker.ask("q", (url,)).json()["error"]
        assert error.pop("request_id") and error == {
            "message": told_of(url), "type": "invalid_request_error", "code": "invalid_image",
            "param": "messages[0].content[0].image_url.url",
        }, name  # fmt: skip


def bombs() -> list[bytes]:
    """Small files that say they are gigapixels large."""
    zeros = zlib.compress(b"\0" * 50_000_000, 9)
    large_png = png((40_000, 40_000), 8, png_chunk(b"IDAT", zeros))
    texts = png((60_000, 2000), 8, png_chunk(b"zTXt", b"a\0\0" + zeros) * 20)  # a gigabyte of comments before the picture
    gif = b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + b"\0\0\0," + struct.pack("<HHHH", 0, 0, 65_535, 65_535) + b"\0\x02\x00;"
    ppm = b"P6 60000 60000 255\n"
    bmp = b"BM" + struct.pack("<IIIIiiHHIIiiII", 60, 0, 54, 40, 50_000, 50_000, 1, 24, 0, 0, 0, 0, 0, 0)
    return [large_png, texts, gif, ppm, bmp, black_square(8100)]  # the last one is whole, and a little beyond the cap


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(size: tuple[int, int], bits: int, chunks: bytes) -> bytes:
    """A grey image's file."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunks + png_chunk(b"IEND", b"")


def black_square(side: int) -> bytes:
    """An image of one bit per pixel, in a file of some kilobytes."""
    rows = zlib.compress(b"\0" * (side * (1 + (side + 7) // 8)), 9)
    return png((side, side), 1, png_chunk(b"IDAT", rows))


def growth_while_asking_about(worker: Served, file: bytes, wanted: tuple[int, str | None]) -> int:
    """By how many bytes the peak of memory grows. wanted: the status and the error's code."""
    url = data_url(base64.b64encode(file).decode())
    forget_peak_memory()
    before = peak_memory()
    answer = worker.ask("q", (url,))
    assert (answer.status_code, answer.json().get("error", {}).get("code")) == wanted, file[:20]
    return peak_memory() - before


def test_bombs_are_refused_by_their_headers(worker: Served) -> None:
    growth_while_asking_about(worker, base64.b64decode(picture()), (200, None))  # what is loaded for a first picture
    for file in bombs():
        assert growth_while_asking_about(worker, file, (400, "invalid_image")) < 60_000_000, file[:20]
    assert growth_while_asking_about(worker, black_square(6000), (200, None)) > 100_000_000  # what a large image takes is seen


# ---- what a request may hold -------------------------------------------------------------------------------------------------

FOREIGN_FIELDS: dict[str, Any] = {
    "prompt_embeds": "AAAA", "inputs_embeds": [[0.1]], "image_embeds": "AAAA", "embeddings": {"shape": [1, 2]},
    "chat_template": "{{ 7*7 }}",
    "chat_template_kwargs": {"tokenize": True}, "mm_processor_kwargs": {"num_crops": 10**9}, "logits_processors": ["os.system"],
    "guided_decoding_backend": "x", "lora_path": "/etc", "model_path": "/etc/passwd", "trust_remote_code": True, "documents": [{}],
    "allowed_local_media_path": "/", "best_of": 1000, "tools": [{}], "functions": [{}], "__proto__": {}, "constructor": {},
    "__class__": "x",
}  # fmt: skip


def test_the_fields_of_a_request_are_a_closed_set(worker: Served) -> None:
    count = len(worker.engine.requests)
    for name, value in FOREIGN_FIELDS.items():
        refused = worker.ask(**{name: value})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, name)
        assert HTTP.post(worker.url + WORKER, json=worker_body(**{name: value})).status_code == 400
    for part in ({"type": "image_embeds", "image_embeds": "AAAA"}, {"type": "image_url", "image_url": {"url": "x", "path": "/etc"}}):
        refused = worker.ask(messages=[{"role": "user", "content": [part]}])
        assert refused.status_code == 400
    assert len(worker.engine.requests) == count


class Planted:
    """Leaves a trace where it is unpickled."""

    found: list[str] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return Planted.found.append, ("unpickled",)


def test_nothing_that_comes_in_is_unpickled(worker: Served) -> None:
    planted = pickle.dumps(Planted())
    for path in (CHAT, WORKER, "/worker_get_status"):
        for kind in ("application/octet-stream", "application/x-pickle", "application/python-pickle", "application/json", "text/plain"):
            HTTP.post(worker.url + path, content=planted, headers={"Content-Type": kind})
    text = base64.b64encode(planted).decode()
    assert worker.ask("q", (data_url(text),)).status_code == 400
    assert HTTP.post(worker.url + WORKER, json=worker_body("<image>", images=[text])).status_code == 400
    assert Planted.found == []


UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "jsonpickle"}


def test_no_module_unpickles_or_runs_a_checkpoints_code() -> None:
    for file in sorted((ROOT / "llava").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            imported = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            if isinstance(node, ast.ImportFrom) and [alias.name for alias in node.names] != ["UnpicklingError"]:  # what a reader raises
                imported.add(node.module or "")
            assert not {name.partition(".")[0] for name in imported} & UNSAFE_MODULES, file
            if not isinstance(node, ast.Call):
                continue
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            called = ast.unparse(node.func)
            if called == "torch.load":
                assert "weights_only" in given and ast.unparse(given["weights_only"]) == "True", file
            assert "allow_pickle" not in given or ast.unparse(given["allow_pickle"]) == "False", file
            remote = given.get("trust_remote_code")
            assert remote is None or ast.unparse(remote) == "False", file
            assert called not in ("eval", "exec", "os.system") and ast.unparse(given.get("shell", ast.Constant(False))) == "False", file


def test_sizes_and_counts_have_caps(serve: Any) -> None:
    served = serve(limits=Limits(max_body_bytes=100_000, max_prompt_characters=5000))
    many = [{"type": "image_url", "image_url": {"url": data_url(picture((2, 2)))}}] * 9
    long_talk = [{"role": ("user", "assistant")[turn % 2], "content": "x"} for turn in range(257)]
    for fields in (
        {"text": "x" * 5001}, {"max_tokens": 4097}, {"n": 9}, {"stop": ["x"] * 9}, {"stop": "x" * 257},
        {"logprobs": True, "top_logprobs": 21},
        {"messages": [{"role": "user", "content": [*many, {"type": "text", "text": "q"}]}]}, {"messages": long_talk}, {"user": "x" * 257},
        {"model": "x" * 513}, {"granularity": [36] * 65}, {"seed": 2**63}, {"temperature": 1e9},
    ):  # fmt: skip
        assert served.ask(**fields).status_code == 400, fields
    assert served.ask("x" * 100_001).status_code == 413
    chunked = request_head(CHAT, "Transfer-Encoding: chunked") + b"c350\r\n" + b"x" * 50_000 + b"\r\n" + b"ffff\r\n" + b"x" * 65_535
    assert served.head(chunked).startswith(b"HTTP/1.1 413")
    for length in ("99999999999", "100001", "1" + "0" * 30):
        assert served.head(request_head(CHAT, f"Content-Length: {length}")).startswith((b"HTTP/1.1 413", b"HTTP/1.1 400")), length
    headers = [f"X-{number}: y" for number in range(3000)]
    assert served.head(request_head("/health", *headers, method="GET")).startswith((b"HTTP/1.1 400", b"HTTP/1.1 413"))
    assert served.engine.requests == [] and served.limiter.held_bytes == 0


# ---- keys --------------------------------------------------------------------------------------------------------------------


def test_keys_are_compared_in_constant_time_by_a_running_server(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []
    original = hmac.compare_digest

    def compare(one: Any, other: Any) -> bool:
        compared.append((len(one), len(other)))
        return original(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    served = serve(api_keys=("first-key", "second-key-that-is-longer"))
    guesses = ("z", "f", "first-ke", "first-kez", "x" * 10_000, "first-key", "second-key-that-is-longer")
    statuses = []
    for guess in guesses:
        compared.clear()
        statuses.append(HTTP.get(served.url + "/v1/models", headers={"Authorization": f"Bearer {guess}"}).status_code)
        assert compared == [(32, 32), (32, 32)], guess  # digests of one length, and every key whichever fits
    assert statuses == [401] * 5 + [200] * 2


TRICKS = (
    "//v1/models", "/v1//models", "/%76%31/models", "/v1/models/", "/health/../v1/models", "/health/%2e%2e/metrics", "/health;/metrics",
    "/health%2f..%2fmetrics", "/HEALTH", "/health%00", "/health%20", "/health#/metrics", "/./metrics", "/metrics?x=/health",
    "/metrics/health",
    "http://127.0.0.1/health", "http://x/metrics", "*", "/health\\..\\metrics", "/openapi.json", "/docs", "/redoc",
)  # fmt: skip


def test_no_spelling_of_a_path_gets_around_the_key(serve: Any) -> None:
    served = serve(api_keys=("right",))
    for path in TRICKS:
        for method in ("GET", "POST", "HEAD", "OPTIONS", "TRACE", "CONNECT"):
            answer = served.raw(request_head(path, "Content-Length: 0", "Connection: close", method=method))
            assert answer.startswith((b"HTTP/1.1 401", b"HTTP/1.1 400")), (method, path, answer[:100])
    upgrade = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")
    assert served.head(request_head("/v1/models", *upgrade, method="GET")).startswith(b"HTTP/1.1 401")
    two = request_head("/v1/models", "Authorization: Bearer right", "Authorization: Bearer wrong", "Connection: close", method="GET")
    assert served.raw(two).startswith(b"HTTP/1.1 401")
    assert served.raw(request_head("/%68ealth", "Connection: close", method="GET")).startswith(b"HTTP/1.1 200")  # the open path itself


def test_keys_images_and_questions_stay_out_of_the_log_and_nobody_writes_a_line_of_it(
    serve: Any, caplog: pytest.LogCaptureFixture
) -> None:
    served = serve(FakeEngine(), api_keys=("the-secret-key",))
    image = picture((3, 3))
    keyed = {"Authorization": "Bearer the-secret-key"}
    evil = "x\n2026-01-01 | INFO | forged\r\x1b[31m\u2028"
    with caplog.at_level(logging.DEBUG, "llava"):
        body = chat_body("a private question", (data_url(image),), user=evil)
        assert HTTP.post(served.url + CHAT, json=body, headers=keyed).status_code == 200
        HTTP.post(served.url + CHAT, json=chat_body(model=evil), headers=keyed)
        HTTP.post(served.url + CHAT, json={evil: 1}, headers=keyed)
        HTTP.get(served.url + "/v1/models/%0aforged%1b[31m", headers=keyed)
        HTTP.get(served.url + "/%0d%0aforged?key=the-secret-key", headers=keyed)
        HTTP.get(served.url + "/health", headers={"Authorization": "Bearer the-secret-kez"})
        served.raw(request_head("/health", "X-Request-Id: a\tforged", "Connection: close", method="GET"))
        broken = chat_body("q", (data_url("AAAA" + "\n" + evil),))
        HTTP.post(served.url + CHAT, json=broken, headers=keyed)
    with RunningApp(create_controller_app(transport=RecordingConnector(), resolve=no_names)) as controller:
        with caplog.at_level(logging.DEBUG, "llava"):
            named = {"worker_name": "http://127.0.0.1:1", "worker_status": {**STATUS, "model_names": [evil]}}
            assert HTTP.post(controller.url + "/register_worker", json=named).status_code == 400
            HTTP.post(controller.url + "/register_worker", json={"worker_name": f"http://127.0.0.1:1/{evil}"})
            HTTP.post(controller.url + CHAT, json=chat_body(model=evil))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) > 10
    for line in lines:
        assert line.isprintable(), line
        assert not any(secret in line for secret in ("the-secret", "a private question", image)), line


# ---- two readings of one request ---------------------------------------------------------------------------------------------


def test_a_request_that_two_servers_may_cut_differently_is_refused_and_the_connection_ends(worker: Served) -> None:
    body = json.dumps(chat_body("mine")).encode()
    hidden = request_head("/v1/models", "Connection: close", method="GET")
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    for headers, sent in (
        (("Content-Length: 4", "Transfer-Encoding: chunked"), chunks),
        ((f"Content-Length: {len(chunks)}", "Transfer-Encoding: chunked"), chunks),
        (("Content-Length: 4", "Content-Length: 5"), b"{}   "),
        (("Transfer-Encoding: xchunked",), chunks),
        (("Transfer-Encoding: chunked, identity",), chunks),
        (("Transfer-Encoding: identity, chunked",), chunks),
        (("Transfer-Encoding : chunked",), chunks),
        (("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"), chunks),
        (("Content-Length: +2",), b"{}"),
        (("Content-Length: 0x2",), b"{}"),
        (("Content-Length: -1",), b"{}"),
    ):
        answer = worker.raw(request_head(CHAT, *headers) + sent + hidden)
        assert re.match(rb"HTTP/1.1 (400|501) ", answer) and answer.count(b"HTTP/1.1") == 1, (headers, answer)
        assert b"connection: close" in answer.lower()
    broken = request_head(CHAT, "Transfer-Encoding: chunked") + chunks.replace(b"}\r\n0", b"}XX0") + hidden
    assert worker.raw(broken).count(b"HTTP/1.1 200") == 0
    for head in (
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /health\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
    ):
        assert worker.raw(head).startswith(b"HTTP/1.1 400"), head
    assert worker.ask("after").json()["choices"][0]["message"]["content"] == "after "


def test_requests_in_one_breath_get_their_own_answers_in_order(worker: Served) -> None:
    bodies = [json.dumps(chat_body(f"question-{number}", stream=number % 2 == 1)).encode() for number in range(6)]
    sent = b"".join(request_head(CHAT, f"Content-Length: {len(body)}", "X-Request-Id: same") + body for body in bodies)
    answer = worker.raw(sent + request_head("/health", "Connection: close", method="GET"))
    assert re.findall(rb"question-\d", answer) == [b"question-%d" % number for number in range(6)]


def test_http_1_0_gets_whole_answers_without_chunks(worker: Served) -> None:
    body = json.dumps(chat_body("old", stream=True)).encode()
    head = f"POST {CHAT} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    answer = worker.raw(head + body)
    assert answer.endswith(b"data: [DONE]\n\n") and b"chunked" not in answer.lower()


def test_no_answer_repeats_the_host_header(worker: Served) -> None:
    for path in ("/health/", "/v1/chat/completions/", "/v1/models/", "//evil.example/health/", "/ready/"):
        answer = worker.raw(request_head(path, "Connection: close", method="GET").replace(b"Host: x", b"Host: evil.example"))
        assert b"evil" not in answer and not answer.startswith(b"HTTP/1.1 3"), path


# ---- web pages of other sites ------------------------------------------------------------------------------------------------


def test_a_web_page_cannot_ask_a_server_on_the_readers_machine(worker: Served) -> None:
    plain = json.dumps(chat_body()).encode()
    count = len(worker.engine.requests)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/plain; application/json"):
        assert HTTP.post(worker.url + CHAT, content=plain, headers={"Content-Type": kind, "Origin": "http://127.0.0.1"}).status_code == 400
    asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    for path in (CHAT, WORKER, "/v1/models"):
        told = HTTP.options(worker.url + path, headers=asked)
        assert told.status_code >= 400 and not any(name.startswith("access-control") for name in told.headers)
    # a name that its owner makes point at this machine: the browser takes the page and this server for one site
    for origin in (
        "http://evil.example", "https://EVIL.example:8000", "http://localhost.evil.example", "http://xlocalhost", "http://[::1",
        "null", "", "http://127.0.0.1:28901.evil.test", "chrome-extension://abcdefgh", "moz-extension://1-2", "file://", "app://localhost", "capacitor://localhost",
    ):  # fmt: skip
        told = HTTP.post(worker.url + CHAT, json=chat_body(), headers={"Origin": origin, "Host": "evil.example"})
        assert (told.status_code, told.json()["error"]["code"]) == (403, "forbidden"), origin
    assert len(worker.engine.requests) == count
    for origin in (
        "http://localhost:8000",
        "http://127.0.0.1:8000",
        "http://[::1]:8000",
        "http://192.168.1.7",
        "http://app.localhost",
    ):
        assert HTTP.post(worker.url + CHAT, json=chat_body(), headers={"Origin": origin}).status_code == 200, origin


def test_a_site_of_the_operators_own_asks_with_a_key(serve: Any) -> None:
    served = serve(api_keys=("right",))
    headers = {"Origin": "https://chat.example", "Authorization": "Bearer right"}
    assert HTTP.post(served.url + CHAT, json=chat_body(), headers=headers).status_code == 200
    with RunningApp(create_controller_app(ControllerSettings(), transport=RecordingConnector(), resolve=no_names)) as controller:
        for path in (
            "/list_models",
            "/refresh_all_workers",
            "/get_worker_address",
            CHAT,
            WORKER,
            "/register_worker",
            "/receive_heart_beat",
        ):
            told = HTTP.post(controller.url + path, json=chat_body(), headers={"Origin": "http://evil.example"})
            assert told.status_code in (400, 403), path
        assert HTTP.get(controller.url + "/health", headers={"Origin": "http://evil.example"}).status_code == 200


# ---- connections that do nothing ---------------------------------------------------------------------------------------------


def connections(stack: ExitStack, port: int, count: int, data: bytes) -> list[socket.socket]:
    found = []
    for _ in range(count):
        found.append(stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=SECONDS)))
        found[-1].sendall(data)
    return found


def those_told(socks: list[socket.socket], count: int) -> list[socket.socket]:
    """The connections which something has come on, or whose end; waits for so many."""
    with selectors.DefaultSelector() as selector:
        for sock in socks:
            selector.register(sock, selectors.EVENT_READ)
        wait_until(lambda: len(selector.select(0)) >= count, SECONDS)
        return [key.fileobj for key, _ in selector.select(0) if isinstance(key.fileobj, socket.socket)]


def test_bodies_that_drip_in_keep_nobody_out(serve: Any) -> None:
    served = serve(limits=Limits(max_queue=2, body_seconds=10 * SECONDS), concurrency=2)
    body = json.dumps(chat_body("patient")).encode()
    with ExitStack() as stack:
        slow = connections(stack, served.port, 20, request_head(CHAT, f"Content-Length: {len(body)}") + body[:10])
        for _ in range(5):
            assert served.ask("quick").status_code == 200
        wait_until(lambda: served.limiter.in_flight == 0 and served.limiter.held_bytes == 20 * 10)
        slow[0].sendall(body[10:])
        answer = received(slow[0], b"patient")
        assert answer.startswith(b"HTTP/1.1 200") and b"patient" in answer
    wait_until(lambda: served.limiter.held_bytes == 0)


def test_a_body_that_does_not_come_in_time_is_given_up(serve: Any) -> None:
    served = serve(limits=Limits(body_seconds=0.5))
    with ExitStack() as stack:
        for sock in connections(stack, served.port, 3, request_head(CHAT, "Content-Length: 100") + b"{"):
            assert received(sock, b"\r\n\r\n").startswith(b"HTTP/1.1 408")
    wait_until(lambda: served.limiter.held_bytes == 0)


def test_bodies_that_come_all_at_once_still_find_only_so_many_places(serve: Any) -> None:
    served = serve(FakeEngine(start_delay=10 * SECONDS), Limits(max_queue=1, body_seconds=10 * SECONDS), concurrency=2)
    body = json.dumps(chat_body()).encode()
    with ExitStack() as stack:
        slow = connections(stack, served.port, 8, request_head(CHAT, f"Content-Length: {len(body)}") + body[:-1])
        wait_until(lambda: served.limiter.held_bytes == 8 * (len(body) - 1))
        for sock in slow:
            sock.sendall(body[-1:])
        told = those_told(slow, 5)
        assert [received(sock, b"\r\n\r\n")[:12] for sock in told] == [b"HTTP/1.1 503"] * 5
        wait_until(lambda: served.limiter.in_flight == len(served.engine.requests) == 3)
    wait_until(lambda: served.limiter.in_flight == served.limiter.held_bytes == 0)


def test_idle_connections_keep_nobody_out_and_are_ended(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    served, begun_one = serve(), b"POST / HTTP/1.1\r\nX-A: b\r\n"
    monkeypatch.setattr(http_connections, "HEADER_SECONDS", 10 * SECONDS)
    with ExitStack() as stack:
        connections(stack, served.port, 150, b"")
        connections(stack, served.port, 150, begun_one)
        wait_until(lambda: len(served.server.server_state.connections) == 300)
        begun = time.monotonic()
        assert served.ask("quick").status_code == 200 and time.monotonic() - begun < 10
    monkeypatch.setattr(http_connections, "HEADER_SECONDS", 0.5)
    with ExitStack() as stack:
        for sock in connections(stack, served.port, 10, b"") + connections(stack, served.port, 10, begun_one):
            assert received(sock, b"anything") == b""


def test_more_connections_than_the_process_may_have_are_dropped_at_once(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own, most = http_connections.max_connections_per_client(), http_connections.max_connections()
    assert 0 < own < most <= resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
    monkeypatch.setattr(http_connections, "max_connections", lambda: 20)
    monkeypatch.setattr(http_connections, "max_connections_per_client", lambda: 100)
    monkeypatch.setattr(http_connections, "HEADER_SECONDS", 10 * SECONDS)
    served = serve()
    with ExitStack() as stack:
        dropped = those_told(connections(stack, served.port, 40, b""), 20)
        assert [received(sock, b"anything") for sock in dropped] == [b""] * 20
        assert len(served.server.server_state.connections) == 20  # the others stay
    wait_until(lambda: served.raw(request_head("/health", "Connection: close", method="GET")).startswith(b"HTTP/1.1 200"))


def test_one_clients_connections_leave_some_to_others(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connections, "max_connections", lambda: 20)
    monkeypatch.setattr(http_connections, "HEADER_SECONDS", 10 * SECONDS)
    addresses = ["10.0.0.1"]
    monkeypatch.setattr(http_connections, "network_of", lambda host: addresses[-1])
    served = serve()
    with ExitStack() as stack:
        dropped = those_told(connections(stack, served.port, 30, b""), 15)
        assert [received(sock, b"anything") for sock in dropped] == [b""] * 15
        addresses.append("10.0.0.2")
        assert served.raw(request_head("/health", "Connection: close", method="GET")).startswith(b"HTTP/1.1 200")
    wait_until(lambda: served.raw(request_head("/health", "Connection: close", method="GET")).startswith(b"HTTP/1.1 200"))
    wait_until(lambda: not served.server.server_state.connections)
    assert not http_connections._connections_of[served.server.server_state]


# ---- the page's own server ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page() -> Iterator[str]:
    """The page without a controller: these tests ask no model."""
    with running_page(create_page_app(PageOptions("http://127.0.0.1:9", log_folder=None))) as url:
        yield url


def upload_body(file: bytes) -> tuple[str, bytes]:
    """A form's content type and body."""
    part = b'--cut\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    return "multipart/form-data; boundary=cut", part + file + b"\r\n--cut--\r\n"


def uploading(folder: Path, body_seconds: float) -> PageGuard:
    """The page's uploads behind its guard, without Gradio."""
    app = Starlette(routes=[Route("/gradio_api/upload", uploads.Uploads(folder / "uploads").receive, methods=["POST"])])
    return PageGuard(app, {}, body_seconds=body_seconds)


def test_uploads_that_drip_in_are_bounded_in_number_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "CLIENT_UPLOADS", 2)
    kind, body = upload_body(base64.b64decode(picture()))
    head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n".encode()
    asked_for = b"HTTP/1.1 100 Continue\r\n\r\n"
    with running_page(uploading(tmp_path, 10 * SECONDS)) as url, ExitStack() as stack:
        socks = connections(stack, int(url.rpartition(":")[2]), 3, head + b"Expect: 100-continue\r\n\r\n")
        begun = those_told(socks, 2)
        assert [received(sock, asked_for) for sock in begun] == [asked_for] * 2
        for sock in begun:
            sock.sendall(body[:-20])
        waiting = next(sock for sock in socks if sock not in begun)
        assert those_told(socks, 0) == []  # the third is not asked for its body
        begun[0].sendall(body[-20:])
        assert received(begun[0], b"\r\n\r\n").startswith(b"HTTP/1.1 200")
        assert received(waiting, asked_for) == asked_for
        waiting.sendall(body)
        assert received(waiting, b"\r\n\r\n").startswith(b"HTTP/1.1 200")
    with running_page(uploading(tmp_path, 0.3)) as url, ExitStack() as stack:
        stalled = connections(stack, int(url.rpartition(":")[2]), 1, head + b"\r\n" + body[:-20])[0]
        assert received(stalled, b"\r\n\r\n").startswith(b"HTTP/1.1 408")


def test_uploads_that_are_too_large_or_find_no_room_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, body = upload_body(base64.b64decode(picture()))
    headers = {"Content-Type": kind}
    monkeypatch.setattr(uploads, "MAX_UPLOAD_BYTES", len(body))
    monkeypatch.setattr(uploads, "HELD_UPLOADS", 0.5)
    with running_page(uploading(tmp_path, SECONDS)) as url:
        full = HTTP.post(url + "/gradio_api/upload", content=body, headers=headers)
        assert (full.status_code, full.headers["retry-after"]) == (503, "1")
        assert HTTP.post(url + "/gradio_api/upload", content=body + b" ", headers=headers).status_code == 413
        assert HTTP.post(url + "/gradio_api/upload", content=iter([body[:10]]), headers=headers).status_code == 411


def test_the_page_gives_up_a_browser_that_does_not_read() -> None:
    """As the worker does: what waits to be read is memory."""
    ended = threading.Event()

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        async def parts() -> AsyncIterator[bytes]:
            while True:
                yield b"data: " + b"x" * 65_536

        try:
            await StreamingResponse(parts(), media_type="text/event-stream")(scope, receive, send)
        finally:
            ended.set()

    app = FastAPI()
    app.state.drain = asyncio.Event().wait
    app.mount("/", PageGuard(endless, {}, send_seconds=0.3))
    with RunningApp(app) as running, ExitStack() as stack:
        sock = connections(stack, running.port, 1, request_head("/gradio_api/queue/data?session_hash=a", method="GET"))[0]
        assert b"text/event-stream" in received(sock, b"text/event-stream")  # and no more is read
        assert ended.wait(SECONDS)
        wait_until(lambda: not running.server.server_state.connections)


def test_the_pages_program_ends_connections_that_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[Any] = []
    monkeypatch.setattr(gradio_web_server, "check_address", lambda host, port: None)  # whatever listens there now
    monkeypatch.setattr("llava.serve.http.server.run_server", lambda server: configs.append(server.config))
    gradio_web_server.main(["--controller", "http://127.0.0.1:9", "--no-log"])
    assert configs[0].http is http_connections.GuardedProtocol and configs[0].ws == "none"
    assert configs[0].h11_max_incomplete_event_size == MAX_HEADER_BYTES


def test_events_that_the_page_does_not_have_change_nothing(page: str) -> None:
    def join(**fields: Any) -> httpx.Response:
        return HTTP.post(page + "/gradio_api/queue/join", json={"data": [], "fn_index": 0, "session_hash": "mine", **fields})

    numbers: tuple[Any, ...] = (-1, 999, 10**20, "x", None, [], {})
    for number in numbers:
        assert join(fn_index=number).status_code >= 400
    names: tuple[Any, ...] = (None, 5, {}, [])
    for session in names:
        assert join(session_hash=session).status_code >= 400
    for method, path in (("POST", "/gradio_api/component_server"), ("POST", "/login"), ("GET", "/gradio_api/stream/x"), ("PUT", "/config")):
        assert HTTP.request(method, page + path, json={}).status_code == 404
    assert HTTP.get(page + "/config").status_code == 200


def test_a_page_shows_nothing_of_other_sessions(page: str) -> None:
    """What is in the queue of a session comes out under that session's own random name alone."""
    fields = {"data": [None] * 11, "fn_index": 0, "session_hash": "somebody-elses"}
    assert HTTP.post(page + "/gradio_api/queue/join", json=fields).status_code == 200
    for session in ("mine", "", "%25", "*", "somebody-else", "../somebody-elses"):
        with HTTP.stream("GET", f"{page}/gradio_api/queue/data?session_hash={session}") as response:
            first = next(response.iter_lines(), "")
        assert "process" not in first and "output" not in first, session
