"""What a run of several processes has done so far, so that a killed one goes on and the last one joins the parts."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Journal:
    """A folder with the run's description (`run.json`) and one part per process, to which lines are only ever appended.

    The parts of two processes that share four questions, of which the third failed at first:

        part-00000.jsonl   {"row": 0, "answer": {"question_id": 7, "text": "red", ...}}
                           {"row": 1, "answer": {"question_id": 8, "text": "two", ...}}
        part-00001.jsonl   {"row": 2, "error": {"question_id": 9, "error": "OSError: ..."}, "id": "5f0c"}
                           {"row": 3, "answer": {"question_id": 3, "text": "yes", ...}}
                           {"withdrawn": ["5f0c"]}
                           {"row": 2, "answer": {"question_id": 9, "text": "left", ...}}

    Lines of earlier runs and of other processes count alike, so a run may go on with another number of processes. An error counts until
    it is withdrawn by its name: when a process sets out to ask its question again, and when a whole run's errors have been reported, so
    that no process of the next run takes them for its own. Withdrawing by name needs no order between parts and no waiting.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self.part = folder / f"part-{rank:05d}.jsonl"

    def begin(self, description: dict[str, Any]) -> None:
        """Start, or go on after a run of the same description; the half line that a killed process left is cut off.

        Another run that has come to nothing yet, say because its model could not be loaded, is replaced.

        Raises:
            ValueError: the folder belongs to another run; the sentence names what differs.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "run.json"
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        changed = differences(before, description)
        if before and changed and self.records():
            raise ValueError(
                f"{self.folder} belongs to another run: {'; '.join(changed)}. Choose another --answers-file, or delete the folder and the "
                "answers."
            )
        if changed:
            write_whole(file, json.dumps(description, indent=1))
        if self.part.exists():
            whole = self.part.read_bytes().rpartition(b"\n")
            os.truncate(self.part, len(whole[0]) + len(whole[1]))

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Append lines in one write, so that only the last of them can be cut short."""
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with self.part.open("ab", buffering=0) as file:
            file.write(text.encode())

    def withdraw(self, records: Sequence[dict[str, Any]]) -> None:
        """Let errors among these count no more; answers stay."""
        names = [record["id"] for record in records if "error" in record]
        if names:
            self.add([{"withdrawn": names}])

    def records(self) -> dict[int, dict[str, Any]]:
        """The last word on every row, by index: its answer, else an error that was not withdrawn.

        Raises:
            ValueError: a part was damaged.
        """
        lines = [line for part in sorted(self.folder.glob("part-*.jsonl")) for line in _lines(part)]
        withdrawn = {name for line in lines for name in line.get("withdrawn", ())}
        found: dict[int, dict[str, Any]] = {}
        for line in lines:
            counts = "answer" in line or ("error" in line and line["id"] not in withdrawn)
            if counts and "answer" not in found.get(line["row"], {}):
                found[line["row"]] = line
        return found


def _lines(part: Path) -> list[dict[str, Any]]:
    """What the whole lines of a part say.

    Raises:
        ValueError: the part was damaged.
    """
    found = []
    for number, line in enumerate(part.read_bytes().split(b"\n")[:-1], start=1):  # what follows the last newline is half a line
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{part} is damaged in line {number}; delete that line, its question is then asked again.") from error
    return found


def differences(before: dict[str, Any], now: dict[str, Any], within: str = "") -> list[str]:
    """What differs between two descriptions, a text for each innermost field."""
    found = []
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{within}{name}.")
        elif old != new:
            found.append(f"{within}{name} was {old!r}, is {new!r}")
    return found


def write_whole(file: Path, text: str) -> None:
    """Write a file that is either there whole or not at all, whoever else writes the same at this moment."""
    draft = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, file)
