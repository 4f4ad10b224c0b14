"""Whether the harness's results are on the disk: where there is no room for them it writes a warning, or nothing, and exits with 0."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def look_after_saving(tracker_class: Any, failures: list[Exception]) -> None:
    """Have the harness's tracker of results look at each file that it has written, and remove and note those that are not whole."""
    for name, look in (("save_results_aggregated", _look_at_results), ("save_results_samples", _look_at_samples)):
        setattr(tracker_class, name, _looking(getattr(tracker_class, name), look, failures))


def _looking(save: Callable[..., Any], look: Callable[..., Path | None], failures: list[Exception]) -> Callable[..., Any]:
    def wrapped(tracker: Any, *args: Any, **kwargs: Any) -> Any:
        done = save(tracker, *args, **kwargs)
        broken = look(tracker, *args, **kwargs) if tracker.output_path else None
        if broken is not None:
            broken.unlink(missing_ok=True)
            failures.append(OSError(f"{broken} could not be written whole and is removed; free some space, then run the command again"))
        return done

    return wrapped


def _look_at_results(tracker: Any, results: Any = None, samples: Any = None, datetime_str: str = "") -> Path | None:
    path = _folder(tracker) / f"{datetime_str.replace(':', '-')}_results.json"
    return None if _is_whole(path, 1) else path


def _look_at_samples(tracker: Any, task_name: str, samples: Sequence[Any]) -> Path | None:
    path = _folder(tracker) / f"{getattr(tracker, 'date_id', '')}_samples_{task_name}.jsonl"
    return None if _is_whole(path, len(samples)) else path


def _folder(tracker: Any) -> Path:
    return Path(tracker.output_path) / tracker.general_config_tracker.model_name_sanitized


def _is_whole(path: Path, values: int) -> bool:
    """Whether a file holds so many JSON values, one of them over all lines or one per line."""
    try:
        text = path.read_text(encoding="utf-8")
        parts = [text] if values == 1 else text.removesuffix("\n").split("\n")
        for part in parts:
            json.loads(part)
    except (OSError, ValueError):
        return False
    return len(parts) == values
