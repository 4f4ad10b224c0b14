"""Take the screenshots of `docs/serving` anew: the page before real services with the micro model, in the Chromium of this machine.

    python scripts/screenshots.py docs/serving

Chromium is taken from the variable CHROMIUM or from the path; playwright drives it. Times in the images are this machine's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "playground" / "images"
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync")
WAIT_SECONDS = 180.0
WIDE, PHONE = 1280, 390


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def program(module: str, port: int, *flags: str, path: str = "/health") -> Iterator[subprocess.Popen[bytes]]:
    """A service, from when it answers to the end of the block."""
    command = [sys.executable, "-m", f"llava.serve.{module}", "--host", "127.0.0.1", "--port", str(port), *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + WAIT_SECONDS
        while True:
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{' '.join(command)} did not answer")
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5):
                break
            time.sleep(0.2)
        yield process
    finally:
        process.kill()
        process.wait()


def worker(controller: int, name: str) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """A worker of this name at the controller, as `program`."""
    port = free_port()
    addresses = ("--controller", f"http://127.0.0.1:{controller}", "--worker", f"http://127.0.0.1:{port}")
    return program("model_worker", port, *addresses, "--model-name", name)


@contextmanager
def visit(browser: Browser, url: str, width: int, height: int, scheme: str = "light") -> Iterator[Page]:
    """The page in a window of this size."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(1000 * WAIT_SECONDS)
    page.goto(url)
    page.wait_for_selector("#avg-composer textarea")
    yield page
    context.close()


def ask(page: Page, text: str, image: str | None = None, answers: int = 1, sides: int = 1) -> None:
    """Ask, and wait until each side shows so many answers."""
    page.wait_for_selector('#avg-granularity-0 label:has-text("64")')
    if image:
        page.set_input_files("#avg-composer input[type=file]", str(IMAGES / image))
        page.wait_for_selector("#avg-composer .thumbnails img, #avg-composer .thumbnail-item")
    page.fill("#avg-composer textarea", text)
    page.press("#avg-composer textarea", "Enter")
    for side in range(sides):
        page.wait_for_function(
            "([side, count]) => document.querySelectorAll(`#avg-chat-${side} .avg-card, #avg-chat-${side} .avg-error`).length == count",
            arg=[side, answers],
        )
    page.wait_for_timeout(800)


def shoot(browser: Browser, folder: Path) -> None:
    """Start the services one after the other, and take each image where it is to be seen."""
    controller, page_port = free_port(), free_port()
    url = f"http://127.0.0.1:{page_port}"
    flags = ("--controller", f"http://127.0.0.1:{controller}", "--model-list-mode", "reload", "--no-log")
    with ExitStack() as stack:
        stack.enter_context(program("controller", controller))
        stack.enter_context(program("gradio_web_server", page_port, *flags, path="/"))
        with visit(browser, url, WIDE, 934) as page:
            page.wait_for_selector("text=No model is being served now.")
            page.wait_for_timeout(800)
            page.screenshot(path=folder / "no-worker.png")
        first = stack.enter_context(worker(controller, "avg-llava-micro"))
        shoot_answers(browser, url, folder)
        with worker(controller, "avg-llava-micro-2"):
            shoot_comparison(browser, url, folder)
        with visit(browser, url, WIDE, 900) as page:
            ask(page, "Which number does the sign show?", "scene_pink.png")
            first.kill()
            ask(page, "And the colour behind everything?", answers=2)
            page.screenshot(path=folder / "error.png")


def shoot_answers(browser: Browser, url: str, folder: Path) -> None:
    """Two answers, a budget that forbids levels, and the phone."""
    with visit(browser, url, WIDE, 1100) as page:
        ask(page, "Which colour does the large shape have?", "scene_beige.png")
        ask(page, "What number is on the sign?", answers=2)
        page.screenshot(path=folder / "page.png")
    with visit(browser, url, WIDE, 900) as page:
        page.fill("#avg-budget input[type=number]", "100")
        page.press("#avg-budget input[type=number]", "Tab")
        ask(page, "What is the background colour?", "scene_pink.png")
        page.screenshot(path=folder / "budget.png")
    for name, scheme in (("phone", "light"), ("phone-dark", "dark")):
        with visit(browser, url, PHONE, 844, scheme) as page:
            ask(page, "What colours are on the pole from top to bottom?", "scene_olive.png")
            page.screenshot(path=folder / f"{name}.png")


def shoot_comparison(browser: Browser, url: str, folder: Path) -> None:
    """Two workers at two granularities."""
    with visit(browser, url, WIDE, 1180) as page:
        page.wait_for_selector('#avg-granularity-0 label:has-text("64")')
        page.click("#avg-compare input")
        page.wait_for_selector("#avg-chat-1")
        page.click('#avg-granularity-1 label:has-text("4") >> nth=0')
        ask(page, "Which number does the sign show?", "scene_beige.png", sides=2)
        page.screenshot(path=folder / "compare.png")


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the images are written, in place of those of these names")
    folder: Path = parser.parse_args().folder
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if not chromium:
        parser.error("there is no Chromium: install it, or name its program in the variable CHROMIUM")
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=list(FLAGS))
        shoot(browser, folder)
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
