"""Batches, failures by sample and the log, with the micro model and without the harness."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from avg_llava_lmms_eval.asking import Costs, Results, Sample, answer_all, costs_of, failed_of, merge_shares, score_all
from avg_llava_lmms_eval.sample_log import SampleLog, output_folder
from PIL import Image

from llava.inference import Options, Question
from llava.messages import RoutingRequest

PLAYGROUND = Path(__file__).resolve().parents[2] / "playground"
ROWS = [json.loads(line) for line in (PLAYGROUND / "eval" / "test.jsonl").read_text().splitlines()[:12]]
GREEDY = Options(max_new_tokens=16)


def loader(row):
    def load():
        with Image.open(PLAYGROUND / "eval" / row["image"]) as opened:
            return Question([opened.convert("RGB")], row["text"])

    return load


def samples_of(rows, options=GREEDY, continuation=None):
    return [Sample("playground", "test", place, loader(row), options, continuation) for place, row in enumerate(rows)]


def lines(log):
    return [json.loads(line) for line in log.path.read_text().splitlines()]


def test_a_batch_answers_as_one_by_one_and_the_log_tells_what_each_cost(micro, tmp_path):
    alone, together = SampleLog(tmp_path, "alone.jsonl"), SampleLog(tmp_path, "together.jsonl")
    one = answer_all(micro, samples_of(ROWS), 1, alone, show=False)
    eight = answer_all(micro, samples_of(ROWS), 8, together, show=False)
    said = [outcome.text for outcome in one.outcomes]
    assert said == [outcome.text for outcome in eight.outcomes] and not one.failures and not eight.failures
    assert said == [row["answer"] for row in ROWS]

    written = lines(alone)
    assert [line["doc_id"] for line in written] == list(range(12)) and [line["answer"] for line in written] == said
    first = written[0]
    assert first["task"] == "playground" and first["batch"] == 1 and len(first["logits"][0]) == 5
    assert first["granularity"] == [one.outcomes[0].reports[0].granularity]
    assert first["visual_tokens"] <= first["full_visual_tokens"] == 336
    assert {"vision", "router", "prefill", "decode", "ttft"} <= set(first["milliseconds"])
    assert lines(together)[0]["granularity"] == first["granularity"] and lines(together)[0]["batch"] == 8


def test_a_crashed_sample_is_a_failure_and_its_neighbours_are_answered(micro, tmp_path):
    def broken():
        raise OSError("the picture is cut off")

    samples = samples_of(ROWS[:5])
    samples[2] = Sample("playground", "test", 2, broken, GREEDY)
    log = SampleLog(tmp_path, "log.jsonl")
    results = answer_all(micro, samples, 4, log, show=False)
    assert list(results.failures) == [2] and results.outcomes[2] is None
    assert [outcome.text for outcome in results.outcomes if outcome] == [row["answer"] for row in ROWS[:5] if row is not ROWS[2]]
    told = failed_of(samples, results)
    assert (told.asked, told.failed, told.first) == (5, 1, ["playground (test), document 2: OSError: the picture is cut off"])
    repetition = replace(samples[2], counted=False)
    told = failed_of([*samples, repetition], Results([*results.outcomes, None], {**results.failures, 5: results.failures[2]}))
    assert (told.asked, told.failed) == (5, 1)
    told = failed_of([samples[0], repetition], Results([results.outcomes[0], None], {1: results.failures[2]}))
    assert (told.asked, told.failed) == (2, 1)  # never a failed run without a failure
    failed = [line for line in lines(log) if "error" in line]
    assert len(lines(log)) == 5
    assert failed == [{"task": "playground", "split": "test", "doc_id": 2, "error": "OSError: the picture is cut off"}]


def test_the_log_is_there_when_a_run_is_stopped(micro, tmp_path):
    def stopped():
        raise KeyboardInterrupt

    samples = [*samples_of(ROWS[:2]), Sample("playground", "test", 2, stopped, GREEDY)]
    log = SampleLog(tmp_path, "log.jsonl")
    with pytest.raises(KeyboardInterrupt):
        answer_all(micro, samples, 1, log, show=False)
    assert [line["doc_id"] for line in lines(log)] == [0, 1]


def test_samples_of_different_options_do_not_share_a_batch_and_keep_their_order(micro, tmp_path):
    coarse, fine = Options(max_new_tokens=16, routing=RoutingRequest(4)), Options(max_new_tokens=1, routing=RoutingRequest(64))
    samples = [
        Sample("playground", "test", place, loader(row), fine if place % 2 else coarse) for place, row in enumerate(ROWS[:6])
    ]
    results = answer_all(micro, samples, 8, SampleLog(None, "unused"), show=False)
    assert [outcome.reports[0].granularity for outcome in results.outcomes] == [4, 64] * 3
    assert [len(outcome.token_ids) for outcome in results.outcomes][1::2] == [1, 1, 1]


def test_the_router_does_not_see_the_continuation(micro):
    said = score_all(micro, samples_of(ROWS[:4], continuation="red"), 4, SampleLog(None, ""), show=False)
    other = score_all(micro, samples_of(ROWS[:4], continuation="row 3 column 1"), 1, SampleLog(None, ""), show=False)
    answers = answer_all(micro, samples_of(ROWS[:4]), 4, SampleLog(None, ""), show=False)
    for one, two, answer in zip(said.outcomes, other.outcomes, answers.outcomes, strict=True):
        assert one.reports[0].granularity == two.reports[0].granularity == answer.reports[0].granularity
        assert one.reports[0].logits.allclose(two.reports[0].logits, atol=1e-4)


def test_costs_of_the_processes_add_up(micro):
    samples = samples_of(ROWS[:4])
    results = answer_all(micro, samples, 4, SampleLog(None, ""), show=False)
    whole = costs_of(samples, results)["playground"]
    twice = merge_shares(Costs, [costs_of(samples, results), costs_of(samples, results)])
    assert twice["playground"].visual_tokens == 2 * whole.visual_tokens
    assert str(whole).startswith("4 samples, ") and sum(whole.granularities.values()) == 4
    assert "empty" not in str(whole)
    results.outcomes[1] = replace(results.outcomes[1], text=" ")
    assert str(costs_of(samples, results)["playground"]).endswith("; 1 of 4 answers is empty")
    no_pictures = [Sample("text", "test", 0, lambda: Question([], "What is the background colour?"), GREEDY)]
    results = answer_all(micro, no_pictures, 1, SampleLog(None, ""), show=False)
    assert str(costs_of(no_pictures, results)["text"]) == "1 samples, no images"


def test_the_output_folder_is_the_harness_flag():
    assert output_folder(["--model", "x", "--output_path", "out", "--tasks", "y"]) == "out"
    assert output_folder(["--output_path=out"]) == "out" and output_folder(["--output", "out"]) is None
