"""The page as one ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from fastapi import FastAPI
from starlette.middleware import Middleware

from llava.images import MAX_BYTES
from llava.serve.backend.chat_client import ChatClient
from llava.serve.http.origins import AllowedHosts
from llava.serve.page.catalogue import Catalogue, ListMode
from llava.serve.page.chat import Chat
from llava.serve.page.examples import load_examples
from llava.serve.page.guard import PageGuard
from llava.serve.page.layout import build_page
from llava.serve.page.log import ConversationLog
from llava.serve.page.script import SCRIPT
from llava.serve.page.sessions import ChatSessions
from llava.serve.page.style import CSS
from llava.serve.page.uploads import Uploads

EXPIRE_SECONDS = 300.0
"""How often old uploads are looked for."""


@dataclass(frozen=True)
class PageOptions:
    """How the page is set up.

    url: of the controller, or of a worker. api_key: for it. mode: see `Catalogue`. concurrency: answers at the same time. embed: for use
    inside another page. log_folder: where votes and conversations are written, or `None`. shown_url: the controller's address as the page
    prints it for users; `url` when missing. names: it answers under these and no others, see `AllowedHosts`; `None` is every name.
    """

    url: str
    api_key: str | None = None
    mode: ListMode = "once"
    concurrency: int = 16
    embed: bool = False
    log_folder: Path | None = Path("logs")
    shown_url: str | None = None
    names: frozenset[str] | None = None


def create_page_app(options: PageOptions) -> FastAPI:
    """The page with its guard; uploads live in a folder of this process, which goes when the application ends.

    Raises:
        ValueError: an address that cannot work.
    """
    folder = Path(tempfile.mkdtemp(prefix="avg-llava-page-"))
    os.environ["GRADIO_TEMP_DIR"] = str(folder)  # the one way to tell Gradio, read when its application is made
    client = ChatClient(options.url, options.api_key)
    uploads = Uploads(folder / "uploads")
    chat = Chat(client, Catalogue(client, options.mode), ChatSessions(), ConversationLog(options.log_folder), folder)
    blocks = build_page(
        chat,
        options.mode,
        options.shown_url or client.url,
        load_examples(),
        concurrency=options.concurrency,
        embed=options.embed,
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        expiring = asyncio.create_task(_expire(uploads))
        try:
            yield
        finally:
            expiring.cancel()
            await client.close()
            shutil.rmtree(folder, ignore_errors=True)

    app = FastAPI(
        lifespan=lifespan,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        middleware=[
            *([] if options.names is None else [Middleware(AllowedHosts, names=options.names)]),
            Middleware(PageGuard, events=_events(blocks), embed=options.embed, names=options.names or ()),
        ],
    )
    app.add_route("/gradio_api/upload", uploads.receive, methods=["POST"])
    app.add_route("/gradio_api/upload_progress", uploads.progress, methods=["GET"])
    app.state.chat, app.state.drain = chat, chat.drain
    return gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        show_error=False,
        max_file_size=MAX_BYTES,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        theme=_theme(),
        head=f"<style>{CSS}</style><script>{SCRIPT}</script>",  # Gradio rewrites what it is given as css, and drops what it does not know
    )


def _events(blocks: gr.Blocks) -> dict[int | str, int]:
    """The page's events, by number and by name, with the number of their inputs."""
    found: dict[int | str, int] = {}
    for number, event in blocks.fns.items():
        found[number] = len(event.inputs)
        if isinstance(event.api_name, str):
            found[event.api_name] = len(event.inputs)
    return found


def _theme() -> gr.themes.Base:
    """Fonts of the reader's own machine: none is loaded."""
    sans = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
    mono = ("ui-monospace", "SFMono-Regular", "Menlo", "monospace")
    readable = "*neutral_500"  # Gradio's own is too faint on white
    return gr.themes.Default(font=sans, font_mono=mono).set(body_text_color_subdued=readable, block_info_text_color=readable)


async def _expire(uploads: Uploads) -> None:
    while True:
        await asyncio.sleep(EXPIRE_SECONDS)
        await asyncio.to_thread(uploads.expire)
