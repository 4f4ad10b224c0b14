"""The progress of an evaluation run by one or more processes, so that a killed run can resume and the last process joins the parts."""

from __future__ import annotations

import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava.durable import append_whole, held_alone, room_for, write_whole


class Journal:
    """A folder with the run's description (`run.json`) and one append-only part per process.

    The parts of two processes that share four questions, of which the third failed at first:

        part-00000.jsonl   {"row": 0, "answer": {"question_id": 7, "text": "red", ...}}
                           {"row": 1, "answer": {"question_id": 8, "text": "two", ...}}
        part-00001.jsonl   {"row": 2, "error": {"question_id": 9, "error": "OSError: ..."}, "id": "5f0c"}
                           {"row": 3, "answer": {"question_id": 3, "text": "yes", ...}}
                           {"withdrawn": ["5f0c"]}
                           {"row": 2, "answer": {"question_id": 9, "text": "left", ...}}

    Lines of earlier runs and of other processes count alike, so a run may resume with another number of processes. An error counts until
    it is withdrawn by its id: when a process retries its question, and when a complete run has reported its errors, so that no process of
    the next run takes them for its own. Withdrawing by id needs no order between parts, and no process waits for another.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = folder
        self.part = folder / f"part-{rank:05d}.jsonl"

    @property
    def description(self) -> Path:
        """The file that describes the run that the folder belongs to."""
        return self.folder / "run.json"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Lock this part against other processes while the block runs; everything else happens within such a block.

        Raises:
            ValueError: another process writes to it.
        """
        with room_for(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with held_alone(self.folder / f".{self.part.stem}.lock", str(self.folder)):
            yield

    def begin(self, description: dict[str, Any], labels: Mapping[str, str], cure: str, replace: bool = False) -> None:
        """Start, or resume a run of the same description; the partial line that a killed process left is cut off.

        Another run without results, such as one whose model could not be loaded, is replaced.

        Args:
            description: what the results depend on. labels: what an error message calls its fields, see `differences`.
            cure: what to do where the folder belongs to another run, for the end of the message.
            replace: start over there.

        Raises:
            ValueError: the folder belongs to another run, and the message names what differs; or it is damaged.
            NoSpaceError: there is no room.
        """
        before = self._described()
        changed = differences(before, description, labels)
        if before and changed and self.outcomes():
            if not replace:
                raise ValueError(f"{self.folder} belongs to another run: {'; '.join(changed)}. {cure}")
            self.discard()
        if changed:
            write_whole(self.description, json.dumps(description, indent=1), shared=True)
        if self.part.exists():
            os.truncate(self.part, _end_of_lines(self.part))

    def _described(self) -> dict[str, Any]:
        """The description of the run that the folder belongs to; empty for a new one."""
        if not self.description.exists():
            return {}
        try:
            return dict(json.loads(self.description.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.description} is damaged; delete {self.folder} to answer everything again.") from error

    def discard(self) -> None:
        """Forget everything."""
        for path in [self.description, *self.folder.glob("part-*.jsonl")]:
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Append lines: all of them, or none where there is no room; a kill may leave a partial line.

        Raises:
            NoSpaceError: there is no room.
        """
        append_whole(self.part, json_lines(records))

    def withdraw(self, records: Sequence[dict[str, Any]]) -> None:
        """Withdraw the errors among these; answers stay."""
        names = [record["id"] for record in records if "error" in record]
        if names:
            self.add([{"withdrawn": names}])

    def outcomes(self) -> Outcomes:
        """Where the outcome of every row is: its answer, else an error that was not withdrawn.

        Raises:
            ValueError: a part was damaged.
        """
        found = Outcomes()
        errors: dict[str, tuple[int, int, int]] = {}
        withdrawn: set[str] = set()
        for part in sorted(self.folder.glob("part-*.jsonl")):
            number = found.add_part(part)
            for offset, line in _lines(part):
                if "answer" in line:
                    found.add(line["row"], number, offset, is_answer=True)
                elif "error" in line:
                    errors[line["id"]] = (line["row"], number, offset)
                withdrawn.update(line.get("withdrawn", ()))
            for name in withdrawn & errors.keys():
                del errors[name]
        for row, number, offset in errors.values():
            found.add(row, number, offset, is_answer=False)
        return found

    def records(self) -> dict[int, dict[str, Any]]:
        """The outcome of every row, by index, as in `outcomes`, in memory."""
        outcomes = self.outcomes()
        return {row: outcomes.read(row) for row in outcomes}


class Outcomes:
    """The outcomes of rows, by index, each read from its part when it is asked for: twelve bytes of memory per row.

    A row whose answer is in several parts has the first of them; an error counts only where there is no answer, and the last of them.
    """

    def __init__(self) -> None:
        self._parts: list[Path] = []
        self._part, self._offset = array("i"), array("q")  # by row: -1 where there is none; an error's part is written as -2 - part

    def add_part(self, part: Path) -> int:
        """A part's number."""
        self._parts.append(part)
        return len(self._parts) - 1

    def add(self, row: int, part: int, offset: int, is_answer: bool) -> None:
        """Note where an outcome begins, in bytes; an answer that is known already stays."""
        if row >= len(self._part):
            missing = row + 1 - len(self._part)
            self._part.extend(array("i", [-1]) * missing)
            self._offset.extend(array("q", [0]) * missing)
        if not self.answered(row):
            self._part[row], self._offset[row] = part if is_answer else -2 - part, offset

    def answered(self, row: int) -> bool:
        """Whether a row has an answer."""
        return row < len(self._part) and self._part[row] >= 0

    def failed(self, row: int) -> bool:
        """Whether a row has an error that counts."""
        return row < len(self._part) and self._part[row] < -1

    def __contains__(self, row: int) -> bool:
        return self.answered(row) or self.failed(row)

    def __iter__(self) -> Iterator[int]:
        return (row for row, part in enumerate(self._part) if part != -1)

    def __bool__(self) -> bool:
        return any(part != -1 for part in self._part)

    def read(self, row: int) -> dict[str, Any]:
        """A row's line. The row is one of `iter(self)`."""
        number = self._part[row] if self.answered(row) else -2 - self._part[row]
        with self._parts[number].open("rb") as file:
            file.seek(self._offset[row])
            return dict(json.loads(file.readline()))


def _end_of_lines(part: Path, step: int = 2**16) -> int:
    """Where the last complete line of a file ends, in bytes; read from its end."""
    with part.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - step)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def _lines(part: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The complete lines of a part, each with the place in bytes where it begins.

    Raises:
        ValueError: the part was damaged.
    """
    offset = 0
    with part.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return  # what follows the last newline is a partial line
            try:
                yield offset, json.loads(line)
            except ValueError as error:
                raise ValueError(f"{part} is damaged in line {number}; delete that line to answer its question again.") from error
            offset += len(line)


def differences(before: dict[str, Any], now: dict[str, Any], labels: Mapping[str, str], within: str = "") -> list[str]:
    """What differs between two descriptions, a text for each innermost field.

    Args:
        labels: what a user calls a field, by its dotted path; a field without one is called by its path.
    """
    found = []
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, labels, f"{within}{name}.")
        elif old != new:
            was, now_is = ("not given" if value is None else repr(value) for value in (old, new))
            found.append(f"{labels.get(path := within + name, path)} was {was}, is {now_is}")
    return found


def json_lines(records: Iterable[Mapping[str, Any]], default: Callable[[Any], Any] | None = None) -> bytes:
    """Records as JSONL in UTF-8. A lone surrogate, which UTF-8 cannot encode, stays a JSON escape.

    Args:
        default: converts what JSON cannot represent.

    Raises:
        ValueError: a number that JSON cannot represent.
    """
    text = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False, default=default) + "\n" for record in records)
    return text.encode("utf-8", "backslashreplace")
