"""The harness tells of results that it could not write by a warning, or not at all; the plug-in looks at them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from avg_llava_lmms_eval.saved import look_after_saving

SAMPLES = [{"doc_id": 0, "resps": "a\u2028b"}, {"doc_id": 1, "resps": "c"}]


def tracker_of(output, room):
    """A tracker that saves as the harness's does, with so many bytes of room in a file."""

    class Tracker:
        output_path = output
        general_config_tracker = SimpleNamespace(model_name_sanitized="model")

        def save_results_aggregated(self, results, samples, datetime_str):
            self.date_id = datetime_str.replace(":", "-")
            self._write(f"{self.date_id}_results.json", json.dumps(results, indent=2))

        def save_results_samples(self, task_name, samples):
            self._write(f"{self.date_id}_samples_{task_name}.jsonl", "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples))

        def _write(self, name, text):
            folder = output / "model"
            folder.mkdir(exist_ok=True)
            (folder / name).write_bytes(text.encode()[:room])

    return Tracker


@pytest.mark.parametrize(("room", "broken"), [(None, []), (10, ["1-2_results.json", "1-2_samples_a.jsonl"]), (45, ["1-2_samples_a.jsonl"])])
def test_files_that_are_cut_short_are_failures_and_do_not_stay(tmp_path, room, broken):
    failures = []
    made = tracker_of(tmp_path, room)
    look_after_saving(made, failures)
    tracker = made()
    tracker.save_results_aggregated(results={"results": {"a": 1}}, samples=None, datetime_str="1:2")
    tracker.save_results_samples(task_name="a", samples=SAMPLES)
    assert [str(error).split(" could not be written whole")[0] for error in failures] == [str(tmp_path / "model" / name) for name in broken]
    assert not any((tmp_path / "model" / name).exists() for name in broken)


def test_a_line_that_is_missing_is_a_failure(tmp_path):
    failures = []
    made = tracker_of(tmp_path, len(json.dumps(SAMPLES[0], ensure_ascii=False).encode()) + 1)
    look_after_saving(made, failures)
    tracker = made()
    tracker.date_id = "1"
    tracker.save_results_samples("a", SAMPLES)
    assert len(failures) == 1


def test_a_run_without_a_folder_saves_nothing(tmp_path):
    failures = []
    made = tracker_of(tmp_path, None)
    made.save_results_aggregated = lambda *args, **kwargs: None
    look_after_saving(made, failures)
    tracker = made()
    tracker.output_path = None
    tracker.save_results_aggregated(results={}, samples=None, datetime_str="1")
    assert failures == []
