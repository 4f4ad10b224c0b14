"""Conversations and votes as lines of JSON, one file a day: `2026-01-31-conv.json`, as LLaVA names them.

No file name comes from a browser, and no image is written: a line names an image by its SHA-256.
"""

from __future__ import annotations

import datetime
import json
import logging
import threading
import time
from pathlib import Path
from typing import Any, Literal

from llava.durable import append_whole
from llava.serve.page.sessions import ChatSession, Reply, Turn

logger = logging.getLogger(__name__)

Kind = Literal["chat", "upvote", "downvote", "flag", "unvote"]


class ConversationLog:
    """Appends lines to the day's file in a folder that is made when the first line comes.

    A line that cannot be written, as on a full disk, is left out as a whole, and the page goes on.

    Args:
        folder: where; `None` writes nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._lost = 0

    def write(self, kind: Kind, conversation: ChatSession, side: int, turn: Turn, reply: Reply) -> None:
        """Record what happened to one reply, with the conversation up to it."""
        if self.folder is None:
            return
        line = json.dumps(_record(kind, conversation, side, turn, reply), ensure_ascii=False) + "\n"
        day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        with self._lock:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                append_whole(self.folder / f"{day}-conv.json", line.encode("utf-8", "replace"))
            except OSError as error:
                if not self._lost:  # once, not with every answer
                    logger.error("conversations and votes are no longer written to %s: %s; the page goes on", self.folder, error)
                self._lost += 1
                return
            if self._lost:
                logger.warning("conversations and votes are written to %s again; %d lines are missing", self.folder, self._lost)
                self._lost = 0


def _record(kind: Kind, conversation: ChatSession, side: int, turn: Turn, reply: Reply) -> dict[str, Any]:
    until = conversation.turns.index(turn) + 1
    outcome = reply.outcome
    return {
        "tstamp": round(time.time(), 4),
        "type": kind,
        "conversation": conversation.id,
        "reply": reply.id,
        "side": side,
        "request_id": outcome.request_id if outcome else reply.error.request_id if reply.error else None,
        "status": reply.status,
        "error": reply.error.code if reply.error else None,
        "finish_ms": reply.total_ms,
        "usage": dict(outcome.usage) if outcome else {},
        "state": [_turn_record(each, side) for each in conversation.turns[:until]],
        **reply.settings.body(),
    }


def _turn_record(turn: Turn, side: int) -> dict[str, Any]:
    reply = turn.reply(side)
    return {
        "question": turn.question,
        "images": [image.sha256 for image in turn.images],
        "answer": reply.text if reply else None,
    }
