"""What the processes of one run know of each other's failures, without meeting: a launcher ends them all when one of them has ended."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore
from torch.distributed.distributed_c10d import _get_default_store

from avg_llava_lmms_eval.asking import Failed, merge_shares

OTHERS_SPEAK = timedelta(seconds=60)
"""How long a process waits before it ends for what the others have to say."""


class Tally:
    """How each kind of request went, on this process and, as far as they have noted it, on the others.

    It lives in the key-value store that the processes found each other by, so reading it takes no other process's help.
    """

    def __init__(self, name: str, rank: int, processes: int) -> None:
        """Begin.

        Args:
            name: of the run, the same on all its processes.
        """
        self.rank, self.processes = rank, processes
        self._own: dict[str, Failed] = {}
        self._store: Any = PrefixStore(name, _get_default_store()) if processes > 1 else None

    def note(self, kind: str, failed: Failed) -> None:
        """Add to this process's share."""
        self._own = merge_shares(Failed, [self._own, {kind: failed}])
        if self._store is not None:
            self._store.set(f"share {self.rank}", json.dumps({kind: asdict(each) for kind, each in self._own.items()}))

    def whole(self) -> dict[str, Failed]:
        """By kind of request, everything that was noted by any process."""
        return merge_shares(Failed, self._shares())

    def failing(self) -> list[int]:
        """The processes that have failures."""
        return [rank for rank, share in enumerate(self._shares()) if any(failed.failed for failed in share.values())]

    def said(self, ranks: Sequence[int]) -> None:
        """Note that this process has said how the run ended, and wait until some others have, or for `OTHERS_SPEAK`."""
        if self._store is None:
            return
        self._store.set(f"said {self.rank}", "")
        # one that is gone says nothing any more, and the wait then ends with an error of the store
        try:
            self._store.wait([f"said {rank}" for rank in ranks], OTHERS_SPEAK)
        except RuntimeError:
            return

    def _shares(self) -> list[dict[str, Failed]]:
        if self._store is None:
            return [self._own]
        keys = [f"share {rank}" for rank in range(self.processes)]
        found = [json.loads(self._store.get(key)) if self._store.check([key]) else {} for key in keys]
        return [{kind: Failed(**failed) for kind, failed in share.items()} for share in found]
