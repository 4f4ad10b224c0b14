"""The local tasks: files agree with the data, scores are fair, and one's own file is four lines away."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import avg_llava_lmms_eval
import pytest
import yaml
from avg_llava_lmms_eval import TASKS
from avg_llava_lmms_eval.__main__ import past_folders, remembering, with_tasks
from avg_llava_lmms_eval.local_tasks import doc_to_text, mean_over_families, process_results

from llava.eval.report.tasks import open_task
from llava.inference import Options, Question

yaml.SafeLoader.add_constructor("!function", lambda loader, node: "!function " + loader.construct_scalar(node))


def read(name):
    return yaml.safe_load(next(TASKS.glob(f"*/{name}.yaml")).read_text())


def utils_of(name):
    path = next(TASKS.glob(f"*/{name}.yaml")).with_name("utils.py")
    spec = importlib.util.spec_from_file_location(f"utils_of_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["playground", "easy_vqa", "my_questions"])
def test_every_function_that_a_task_names_exists(name):
    config, utils = read(name), utils_of(name)
    assert config["task"] == name
    for function in re.findall(r"!function utils\.(\w+)", next(TASKS.glob(f"*/{name}.yaml")).read_text()):
        assert callable(getattr(utils, function))


def rows_of(name):
    config = read(name)
    path = next(TASKS.glob(f"*/{name}.yaml")).parent / config["dataset_kwargs"]["data_files"]["test"]
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["playground", "my_questions"])
def test_questions_have_pictures_and_a_metric_per_family(name):
    rows, config = rows_of(name), read(name)
    metrics = {metric["metric"] for metric in config["metric_list"]}
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
    assert process_results(doc, ["RED"]) == {"accuracy": 1.0, "colour": 1.0, "family_mean": {"family": "colour", "score": 1.0}}
    assert [process_results(doc, [said])["accuracy"] for said in (" Red\n", "red.", "")] == [1.0, 0.0, 0.0]
    items = [{"family": "a", "score": 1.0}] * 3 + [{"family": "b", "score": 0.0}]
    assert mean_over_families(items) == 0.5
    assert doc_to_text(doc, {"pre_prompt": "In the poster, ", "post_prompt": "\n"}) == "In the poster, which?\n"


def test_the_own_file_is_answered(micro):
    utils = utils_of("my_questions")
    for row in rows_of("my_questions"):
        question = Question(utils.doc_to_visual(row), utils.doc_to_text(row))
        assert micro.answer(question.images, question.messages, Options(max_new_tokens=16)).text == row["answer"]


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
