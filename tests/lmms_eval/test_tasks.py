"""The local tasks: files agree with the data, scores are fair, and one's own file is four lines away."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import avg_llava_lmms_eval
import pytest
import yaml
from avg_llava_lmms_eval import TASKS
from avg_llava_lmms_eval.__main__ import past_folders, remembering, with_tasks
from avg_llava_lmms_eval.local_tasks import doc_to_text, mean_over_families, process_results
from avg_llava_lmms_eval.own_questions import metrics_of, own_questions

from llava.eval.report.tasks import open_task
from llava.inference import Options, Question

yaml.SafeLoader.add_constructor("!function", lambda loader, node: "!function " + loader.construct_scalar(node))


def read(name):
    return yaml.safe_load(next(TASKS.glob(f"*/{name}.yaml")).read_text())


def utils_of(name):
    return load(next(TASKS.glob(f"*/{name}.yaml")).with_name("utils.py"))


def load(path):
    spec = importlib.util.spec_from_file_location(f"utils_of_{path.parent.name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["playground", "easy_vqa", "my_questions"])
def test_every_function_that_a_task_names_exists(name):
    config, utils = read(name), utils_of(name)
    assert config["task"] == name
    for function in re.findall(r"!function utils\.(\w+)", next(TASKS.glob(f"*/{name}.yaml")).read_text()):
        assert callable(getattr(utils, function)) or function == "METRICS"


def rows_of(name):
    config = read(name)
    own = "questions.jsonl" if name == "my_questions" else config["dataset_kwargs"]["data_files"]["test"]
    path = next(TASKS.glob(f"*/{name}.yaml")).parent / own
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["playground", "my_questions"])
def test_questions_have_pictures_and_a_metric_per_family(name):
    rows, config = rows_of(name), read(name)
    listed = utils_of(name).METRICS if name == "my_questions" else config["metric_list"]
    metrics = {metric["metric"] for metric in listed}
    assert metrics == {row["family"] for row in rows} | {"accuracy", "family_mean"}
    assert {image.mode for image in utils_of(name).doc_to_visual(rows[0])} == {"RGB"}


def test_playground_is_the_committed_split():
    assert len(rows_of("playground")) == 4000


def test_easy_vqa_comes_from_its_package():
    utils = utils_of("easy_vqa")
    questions = utils.questions_of(rows_of("easy_vqa"))
    assert len(questions) == 9673 and len(set(questions["answer"])) == 13
    assert {metric["metric"] for metric in read("easy_vqa")["metric_list"]} == set(questions["family"]) | {"accuracy", "family_mean"}
    assert utils.doc_to_visual(questions[0])[0].size == (64, 64)
    assert utils.doc_to_visual(questions[0])[0] is utils.doc_to_visual(questions[1])[0]  # one object, encoded once
    assert read("easy_vqa_plain")["include"] == "easy_vqa.yaml"


def test_a_family_has_one_name_in_the_harness_and_in_the_report():
    utils = utils_of("easy_vqa")
    assert set(utils.questions_of(rows_of("easy_vqa"))["family"]) == set(open_task("easy_vqa").families)


def test_the_packages_table_of_modules_is_its_modules():
    package = TASKS.parent
    listed = set(re.findall(r"^``(\w+\.py)``", avg_llava_lmms_eval.__doc__, flags=re.MULTILINE))
    assert listed == {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py"}


def test_scores():
    doc = {"answer": "red", "family": "colour", "text": "which?"}
    assert process_results(doc, ["RED"]) == {"accuracy": 1.0, "colour": 1.0, "family_mean": {"family": "colour", "right": 1.0}}
    assert [process_results(doc, [said])["accuracy"] for said in (" Red\n", "red.", "")] == [1.0, 0.0, 0.0]
    items = [{"family": "a", "right": 1.0}] * 3 + [{"family": "b", "right": 0.0}]
    assert mean_over_families(items) == 0.5
    assert doc_to_text(doc, {"pre_prompt": "In the poster, ", "post_prompt": "\n"}) == "In the poster, which?\n"


def test_the_own_file_is_answered(micro):
    utils = utils_of("my_questions")
    for row in rows_of("my_questions"):
        question = Question(utils.doc_to_visual(row), utils.doc_to_text(row))
        assert micro.answer(question.images, question.messages, Options(max_new_tokens=16)).text == row["answer"]


def own_file(folder, *lines):
    (folder / "1.png").write_bytes((TASKS / "my_questions" / "pictures" / "scene_pink.png").read_bytes())
    path = folder / "questions.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_an_own_file_may_leave_out_what_the_format_lets_it(tmp_path):
    path = own_file(
        tmp_path,
        '{"question_id": 1, "image": ["1.png", "1.png"], "text": "<image> or <image>?", "answer": 12.50}',
        "",
        '{"question_id": "b", "text": "How many?", "answer": 3, "family": "count", "level": [1, "x"]}',
        '{"question_id": 3, "image": "1.png", "text": "Where?", "answer": "left", "family": null}',
    )
    rows = own_questions(path, tmp_path)
    assert [(row["question_id"], row["image"], row["answer"], row["family"]) for row in rows] == [
        ("1", ["1.png", "1.png"], "12.50", "all"),
        ("b", [], "3", "count"),
        ("3", ["1.png"], "left", "all"),
    ]
    assert json.loads(rows[1]["line"])["level"] == [1, "x"]
    metrics = metrics_of(path, mean_over_families)
    assert [metric["metric"] for metric in metrics] == ["accuracy", "family_mean", "all", "count"]
    assert metrics[1]["aggregation"] is mean_over_families
    assert process_results(rows[1], ["3"])["count"] == 1.0


def test_all_that_is_wrong_with_an_own_file_is_said_at_once(tmp_path):
    path = own_file(
        tmp_path,
        '{"question_id": 1, "image": "2.png", "text": "Which?", "answer": "a"}',
        '{"question_id": 2, "text": "Which?"}',
        '{"question_id": 3, "text": "Which?", "answer": ["a"]}',
        '{"question_id": 4, "text": "Which?", "answer": "a", "family": "accuracy"}',
        "{not json",
        '{"question_id": 6, "text": "Which?", "answer": true, "family": 7}',
    )
    with pytest.raises(ValueError) as caught:
        own_questions(path, tmp_path)
    said = str(caught.value)
    complaints = {1: "no image", 2: "answer is missing", 3: "one text or number", 4: "'accuracy'", 5: "Expecting", 6: "answer is True"}
    assert all(re.search(rf"line {number}: .*{re.escape(complaint)}", said) for number, complaint in complaints.items())
    assert [metric["metric"] for metric in metrics_of(path, mean_over_families)] == ["accuracy", "family_mean", "all", "7"]
    assert [metric["metric"] for metric in metrics_of(tmp_path / "none", mean_over_families)] == ["accuracy", "family_mean"]
    with pytest.raises(ValueError, match="does not exist"):
        own_questions(tmp_path / "none", tmp_path)


def test_a_copy_of_the_template_stands_alone_and_names_faults_at_the_end_of_the_run(tmp_path):
    folder = tmp_path / "my_tasks"
    shutil.copytree(TASKS / "my_questions", folder)
    utils = load(folder / "utils.py")
    questions = utils.questions_of(None)
    assert len(questions) == 4 and all(utils.doc_to_visual(question)[0].mode == "RGB" for question in questions)
    assert utils.doc_to_visual({"image": []}) == []
    (folder / "questions.jsonl").write_text('{"question_id": 1, "text": "Which?"}\n')
    with pytest.raises(SystemExit, match=r"error: [\s\S]*line 1: answer is missing") as caught:
        utils.questions_of(None)
    assert caught.value.code != 0


def test_the_command_finds_its_tasks_and_remembers_failures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert with_tasks(["--tasks", "x"]) == ["--tasks", "x", "--include_path", str(TASKS)]
    assert with_tasks(["--include_path=mine"]) == ["--include_path=mine"]
    assert past_folders(["--tasks", "playground"]) == ["--tasks", "playground"]
    Path("playground").mkdir()
    assert past_folders(["--tasks", "playground"]) == ["--tasks", "playground,playground"]
    assert past_folders(["--tasks=playground"]) == ["--tasks=playground,playground"]
    Path("gqa").mkdir()
    assert past_folders(["--tasks", "gqa"]) == ["--tasks", "gqa"]

    failures = []
    with pytest.raises(ValueError):
        remembering(int, failures)("x")
    assert len(failures) == 1 and remembering(int, failures)("3") == 3


def test_nothing_of_the_harness_is_imported_by_the_package():
    assert "lmms_eval" not in sys.modules
