"""Conversations and votes as lines of JSON, one file a day: `2026-01-31-conv.json`, as LLaVA names them.

No name here comes from a browser, and no picture is written: a line names a picture by its SHA-256.
"""

from __future__ import annotations

import datetime
import json
import threading
import time
from pathlib import Path
from typing import Any, Literal

from llava.serve.page.conversation import Conversation, Reply, Turn

Kind = Literal["chat", "upvote", "downvote", "flag", "unvote"]


class ConversationLog:
    """Appends lines to the day's file in a folder that is made when the first line comes.

    Args:
        folder: where; `None` writes nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._lock = threading.Lock()

    def write(self, kind: Kind, conversation: Conversation, side: int, turn: Turn, reply: Reply) -> None:
        """Note what happened to one reply, with the conversation up to it."""
        if self.folder is None:
            return
        line = json.dumps(_record(kind, conversation, side, turn, reply), ensure_ascii=False)
        day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        with self._lock:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"{day}-conv.json").open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def _record(kind: Kind, conversation: Conversation, side: int, turn: Turn, reply: Reply) -> dict[str, Any]:
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
        "images": [picture.sha256 for picture in turn.pictures],
        "answer": reply.text if reply else None,
    }
