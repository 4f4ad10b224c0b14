"""The harness's view of the model, over a stand-in for the harness; the real one is in test_harness.py."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from avg_llava_lmms_eval import manifest
from PIL import Image

from llava.inference import micro_model_path
from tests.eval.plugin_server import plugin_server

PICTURE = Path(__file__).resolve().parents[2] / "playground" / "images" / "scene_beige.png"
PLUGIN = Path(__file__).resolve().parents[2] / "lmms-eval"
DOCUMENTS = {"text": {"test": [{"image": str(PICTURE), "answer": "658"}, {"image": "no such picture", "answer": "?"}]}}
SETTINGS = {"max_new_tokens": 16, "temperature": 0, "do_sample": False, "until": []}
NUMBER, SHAPE = "Which number does the sign show?", "Which large shape is there?"


def visual(doc):
    return [Image.open(doc["image"])]


@pytest.fixture
def model(harness, tmp_path):
    made = harness.model.AvgLlava(pretrained=micro_model_path(), batch_size=2, device="cpu", sample_log=str(tmp_path))
    made.task_dict = DOCUMENTS
    return made


def ask(harness, question, doc_id=0, settings=SETTINGS, **metadata):
    return harness.instance("generate_until", (question, dict(settings), visual, doc_id, "text", "test"), metadata)


def score(harness, target, **metadata):
    return harness.instance("loglikelihood", (NUMBER, target, visual, 0, "text", "test"), metadata)


def test_answers_come_in_the_order_of_the_requests_and_padding_is_not_counted(harness, model, tmp_path):
    requests = [ask(harness, NUMBER), ask(harness, SHAPE, settings={**SETTINGS, "max_new_tokens": 8}), ask(harness, SHAPE)]
    assert model.generate_until([*requests, ask(harness, SHAPE, __padding_only__=True)]) == ["658", "circle", "circle", "circle"]
    assert len([json.loads(line) for line in next(tmp_path.glob("*rank0.jsonl")).read_text().splitlines()]) == 3
    assert (model.batch_size, model.rank, model.config.model_type) == (2, 0, "avg_llava")
    assert model.generate_until([]) == []
    assert model.loglikelihood([score(harness, "658")])[0][1]
    model.clean()
    ((seconds, tokens, speed, more),) = harness.told
    assert more["total_requests"] == 4 and more["visual_tokens_text"] > 0 and speed == tokens / seconds


def test_a_server_answers_and_what_it_cannot_give_is_refused_before_anything_is_asked(harness, model, micro, tmp_path):
    requests = [ask(harness, NUMBER), ask(harness, SHAPE)]
    with plugin_server(micro) as server:
        pair = f"engine=vllm,vllm={server.url}"
        text = f"pretrained={micro_model_path()},{pair},device=cpu,batch_size=2,sample_log={tmp_path / 'served'}"
        served = harness.model.AvgLlava.create_from_arg_string(text)
        served.task_dict = DOCUMENTS
        with pytest.raises(harness.model.EvaluationError, match="task compares likelihoods of answers, which engine=vllm cannot give"):
            served.loglikelihood([score(harness, "658")])
        with pytest.raises(harness.model.EvaluationError, match="num-beams is 2, but vLLM has no beams"):
            served.generate_until([ask(harness, NUMBER, settings={"num_beams": 2})])
        assert not server.requests
        assert served.generate_until(requests) == model.generate_until(requests) == ["658", "circle"]
        assert len(server.requests) == 3  # with the first question of the task, asked as a check
        served.clean()
    logs = [next(folder.glob("*rank0.jsonl")).read_text().splitlines() for folder in (tmp_path, tmp_path / "served")]
    here, there = ([json.loads(line) for line in lines] for lines in logs)
    for line in (*here, *there):
        del line["milliseconds"], line["logits"], line["probabilities"]
    assert here == there


def test_a_server_that_is_not_there_is_one_sentence(harness, monkeypatch):
    monkeypatch.setattr("llava.eval.chat_server.DELAYS", ())
    with pytest.raises(SystemExit, match="error: Nothing answers at http://127.0.0.1:9"):
        harness.model.AvgLlava.create_from_arg_string(f"pretrained={micro_model_path()},engine=vllm,vllm=http://127.0.0.1:9")


def test_a_crashed_sample_ends_the_run_with_counts(harness, model):
    with pytest.raises(harness.model.EvaluationError) as stopped:
        model.generate_until([ask(harness, NUMBER), ask(harness, NUMBER, doc_id=1), ask(harness, SHAPE)])
    message = str(stopped.value)
    assert "1 of 3 samples failed in generate_until, 2 were answered" in message
    assert "text (test), document 1: FileNotFoundError" in message
    assert isinstance(stopped.value, SystemExit)  # the harness swallows every Exception and exits with 0


def test_the_likelier_choice_has_the_smaller_loss(harness, model):
    targets = ["658", " 658", "123", lambda doc: doc["answer"]]
    losses, greedy = zip(*model.loglikelihood([score(harness, target) for target in targets]), strict=True)
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and losses[0] == pytest.approx(losses[3], abs=1e-4)
    assert losses[0] < losses[2] and greedy == (True, True, False, True) and min(losses) >= 0


def test_a_score_reaches_the_task_as_a_pair(harness):
    pair = harness.model.Score(1.5, True)
    assert pair == (1.5, True) and isinstance(pair, harness.result) and pair.text == (1.5, True) and pair.token_counts is None
    assert not (pair.text and pair.text.strip())  # how the harness's cache asks whether to keep a result


def test_what_cannot_be_honoured_ends_the_run_before_anything_is_asked(harness, model, tmp_path):
    with pytest.raises(harness.model.EvaluationError, match="text: The generation settings hold top_k"):
        model.generate_until([ask(harness, NUMBER), ask(harness, NUMBER, settings={"top_k": 3})])
    with pytest.raises(harness.model.EvaluationError, match="asks in several rounds"):
        model.generate_until_multi_round([ask(harness, NUMBER)])
    with pytest.raises(harness.model.EvaluationError, match="acc_mutual_info"):
        model.loglikelihood([harness.instance("loglikelihood", ("", "658"))])
    assert next(tmp_path.glob("*rank0.jsonl")).read_text() == ""


def test_arguments_that_no_sample_can_be_asked_with_are_told_before_anything_is_asked(harness, tmp_path):
    made = harness.model.AvgLlava(pretrained=micro_model_path(), max_visual_tokens=5, device="cpu", sample_log=str(tmp_path))
    made.task_dict = DOCUMENTS
    sentence = "error: text: The model can answer none of the first 2 questions with these options; 0: max_visual"
    with pytest.raises(harness.model.EvaluationError, match=sentence):
        made.generate_until([ask(harness, NUMBER), ask(harness, SHAPE)])
    with pytest.raises(harness.model.EvaluationError, match="max_visual_tokens is 5"):
        made.loglikelihood([score(harness, "658")])
    (log,) = tmp_path.iterdir()
    assert log.read_text() == "" and log.name.endswith("_avg_llava_granularity-auto_max_visual_tokens-5_samples_rank0.jsonl")


def test_a_log_that_finds_no_room_ends_the_run_and_keeps_whole_lines(harness, model, tmp_path, monkeypatch):
    room = [700]

    class Full:
        def __getattr__(self, name):
            return getattr(os, name)

        def write(self, descriptor, data):
            if not room[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken = os.write(descriptor, data[: room[0]])
            room[0] -= taken
            return taken

    monkeypatch.setattr("llava.durable.os", Full())
    with pytest.raises(harness.model.EvaluationError, match="error: no space for .*rank0.jsonl"):
        model.generate_until([ask(harness, NUMBER)] * 6)
    assert all(json.loads(line) for line in next(tmp_path.glob("*rank0.jsonl")).read_text().splitlines())


def test_a_video_is_refused_as_a_failed_sample(harness, model):
    request = harness.instance("generate_until", (NUMBER, dict(SETTINGS), lambda doc: ["clip.mp4"], 0, "text", "test"))
    with pytest.raises(harness.model.EvaluationError, match="visuals hold a str, expected images only"):
        model.generate_until([request])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("pretrained=no/such/model", "No checkpoint could be read at 'no/such/model'"),
        ("granularity=4", "pretrained is missing"),
        (f"pretrained={micro_model_path()},granularity=5", r"5, but this model has \[4, 8, 16, 32, 64\]"),
        (f"pretrained={micro_model_path()},granularity=100", "The granularity is 100, but this model has"),
        (f"pretrained={micro_model_path()},granularity_bias=nan", "granularity_bias is 'nan', expected a finite number"),
        (f"pretrained={micro_model_path()},colour=red", "no argument colour"),
        (f"pretrained={micro_model_path()},device=abacus", "device is 'abacus'"),
        ("granularity=4,16", "--model_args is 'granularity=4,16', expected name=value.*granularity=4:16"),
    ],
)
def test_a_model_that_cannot_be_is_one_sentence_and_a_failed_exit(harness, arguments, complaint):
    with pytest.raises(SystemExit, match="error: .*" + complaint) as stopped:
        harness.model.AvgLlava.create_from_arg_string(arguments, {"batch_size": 1, "device": None})
    assert stopped.value.code not in (None, 0)


def test_flags_and_model_args_are_one_set(harness):
    merge = harness.model.merge_arguments
    assert merge({"batch_size": 8}, {"batch_size": 1, "device": None}) == {"batch_size": 8}
    assert merge({}, {"batch_size": "4", "device": "cpu"}) == {"batch_size": "4", "device": "cpu"}
    assert merge({"batch_size": 4}, {"batch_size": "4"}) == {"batch_size": "4"}
    with pytest.raises(ValueError, match="batch_size is 8 in --model_args and 4 in --batch_size"):
        merge({"batch_size": 8}, {"batch_size": 4})
    with pytest.raises(ValueError, match="max_batch_size is 64"):
        merge({}, {"max_batch_size": 64})


def test_the_entry_point_names_the_models(harness):
    found, stock = manifest()
    assert (found.model_id, stock.model_id) == ("avg_llava", "avg_llava_hf")
    module, name = found.simple_class_path.rsplit(".", 1)
    assert module == harness.model.__name__ and name == harness.model.AvgLlava.__name__
    for path in (stock.simple_class_path, stock.chat_class_path):
        module, name = path.rsplit(".", 1)
        assert f'"{name}"' in (PLUGIN / Path(*module.split("."))).with_suffix(".py").read_text()
    assert 'avg_llava = "avg_llava_lmms_eval:manifest"' in (PLUGIN / "pyproject.toml").read_text()


def test_pictures_go_to_the_model_as_the_task_gives_them(harness):
    """Nothing is converted on the way: the one path lays transparency on white, and a shared object is encoded once."""
    picture = Image.new("RGBA", (8, 4), (255, 0, 0, 0))
    question = harness.model.load_question("What?", lambda doc: [picture], [{}], 0)
    assert question.images[0] is picture
