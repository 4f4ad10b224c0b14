"""The report: rows computed by hand, the shipped model end to end, failures that are said, and a page that runs nothing."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llava.eval.granularity_report import main
from llava.eval.report.answers import Encoder, Record, ask_all, is_right
from llava.eval.report.answers_file import earlier_answers, key_of, read_answers, write_answers
from llava.eval.report.baseline import Baseline, compare, read_baseline
from llava.eval.report.contents import oracle_gap
from llava.eval.report.examples import pick_examples
from llava.eval.report.measure import PARTS, Cost, balanced_sample, measure, mixed, peak_bytes, summarise
from llava.eval.report.outcomes import Outcomes, tail
from llava.eval.report.page import write_page
from llava.eval.report.policies import Policy, apply_policies
from llava.eval.report.tables import markdown
from llava.eval.report.tasks import Item, open_task, read_task
from llava.eval.report.texts import NO_ROUTER, cards
from llava.images import load_image
from llava.inference import MICRO_MODEL, Assistant, Options
from llava.messages import RoutingRequest
from llava.model.memory import kv_cache_bytes

REPOSITORY = Path(__file__).resolve().parents[2]
EVALUATION = REPOSITORY / "playground" / "eval"
LEVELS = [4, 8, 16]
TOKENS = [10, 20, 40]
ATTACK = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
BROWSER_FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
)  # fmt: skip


def made_up() -> Outcomes:
    """Two families, one picture each question: `easy` is right everywhere, `hard` at the finest level only."""
    return of_families(easy=60, hard=20)


def of_families(**questions: int) -> Outcomes:
    """So many questions of each family, each on a picture of its own; see `made_up`."""
    families = [family for family, count in questions.items() for _ in range(count)]
    records = [
        Record(index, f"{index}.png", "?", "x", family, right=[family == "easy", family == "easy", True], tokens=TOKENS)
        for index, family in enumerate(families)
    ]
    return Outcomes(records)


@pytest.fixture(scope="module")
def micro() -> Assistant:
    return Assistant.load(device="cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A report of thirty questions with the shipped model."""
    output = tmp_path_factory.mktemp("report")
    flags = ["--task", "playground", "--limit", "30", "--timing-samples", "3", "--timing-repeats", "2", "--budgets", "48"]
    assert main([*flags, "--biases=-1,1", "--examples", "3", "--device", "cpu", "--output", str(output)]) == 0
    return {"output": output, **json.loads((output / "report.json").read_text())}


def questions(folder: Path, *changes: dict[str, Any]) -> Path:
    """A question file about a shipped picture; each change makes a line."""
    shutil.copy(EVALUATION / "images" / "000.png", folder / "a.png")
    lines = [
        {"question_id": index, "image": "a.png", "text": "What is the background colour?", "answer": "beige", **change}
        for index, change in enumerate(changes)
    ]
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# ---- rows -------------------------------------------------------------------------------------------------------------------------


def test_every_family_counts_the_same() -> None:
    outcomes = made_up()
    assert [outcomes.row(outcomes.fixed(level))["accuracy"] for level in range(3)] == [50.0, 50.0, 100.0]
    oracle = outcomes.row(outcomes.cheapest_right())
    assert (oracle["accuracy"], oracle["tokens"], oracle["saved"]) == (100.0, 25.0, 37.5)
    assert oracle["choices"] == {"easy": [100.0, 0.0, 0.0], "hard": [0.0, 0.0, 100.0]}


def test_the_oracle_gap_is_what_the_router_leaves_to_be_won() -> None:
    outcomes = made_up()
    rows = [
        {**outcomes.row(choice), "kind": kind, "name": kind, "cost": None, "difference": 0.0, "difference_interval": None}
        for kind, choice in [
            ("fixed", outcomes.fixed(2)),
            ("random", outcomes.random_at(20)),
            ("adaptive", outcomes.fixed(1)),  # half right, at 20 tokens
            ("oracle", outcomes.routed([[1.0, 0.0, 0.0]] * 80, LEVELS, RoutingRequest())),  # as right, at 10 tokens
        ]
    ]
    assert oracle_gap(rows) == {"accuracy": 0.0, "tokens": 10.0}
    rows[-1] = {**rows[-1], **outcomes.row(outcomes.cheapest_right())}  # all right, at 25 tokens
    assert oracle_gap(rows) == {"accuracy": 50.0, "tokens": -5.0}
    assert cards(rows)[-1]["value"] == "50.0 points"
    assert oracle_gap([row for row in rows if row["kind"] != "adaptive"]) is None


def test_random_choice_costs_what_it_is_compared_with() -> None:
    outcomes = made_up()
    for tokens in (10, 15, 25, 40):
        row = outcomes.row(outcomes.random_at(tokens))
        assert row["tokens"] == pytest.approx(tokens) and row["accuracy"] == pytest.approx(outcomes.interpolated(tokens))


def test_policies_choose_as_the_model_does() -> None:
    outcomes = made_up()
    logits: list[list[float] | None] = [[0.0, 1.0, 0.9]] * 80

    def chosen(**request: Any) -> list[int]:
        return outcomes.routed(logits, LEVELS, RoutingRequest(**request)).argmax(1).tolist()

    assert chosen() == [1] * 80 and chosen(bias=0.2) == [2] * 80 and chosen(bias=-2.0) == [0] * 80
    assert chosen(max_visual_tokens=15) == [0] * 80 and chosen(granularity=[4, 16]) == [2] * 80
    with pytest.raises(ValueError, match="no router to bias"):
        outcomes.routed([None] * 80, LEVELS, RoutingRequest(bias=1.0))


def test_intervals_hold_the_accuracy_and_repeat() -> None:
    outcomes = made_up()
    rng = np.random.default_rng(0)
    outcomes.right = (rng.random((80, 3)) < 0.6).astype(float)
    weights = outcomes.fixed(1)
    first, again = outcomes.resampled(weights, 3), outcomes.resampled(weights, 3)
    interval = outcomes.interval(first)
    assert interval is not None and interval[0] < outcomes.row(weights)["accuracy"] < interval[1]
    assert (first == again).all() and np.ptp(first - outcomes.resampled(weights, 3)) == 0


def test_the_interval_knows_that_questions_share_pictures() -> None:
    rng = np.random.default_rng(1)
    right = [bool(value) for value in rng.random(100) < 0.5]
    apart = Outcomes([Record(i, f"{i}.png", "?", "x", right=[value], tokens=[1]) for i, value in enumerate(right)])
    shared = Outcomes([Record(i, f"{i // 5}.png", "?", "x", right=[right[i // 5]], tokens=[1]) for i in range(100)])
    widths = [np.ptp(each.interval(each.resampled(each.fixed(0), 0)) or (0.0, 0.0)) for each in (apart, shared)]
    assert widths[1] > 1.5 * widths[0]
    single = Outcomes([Record(0, "0.png", "?", "x", right=[True], tokens=[1])])
    assert single.interval(single.resampled(single.fixed(0), 0)) is None


def test_a_draw_that_lacks_a_family_is_left_out() -> None:
    """At level 0 `easy` is always right and `hard` never: with both families in it, every draw says 50 %."""
    outcomes = of_families(easy=200, hard=20)
    drawn = outcomes.resampled(outcomes.fixed(0), 0)
    assert 1990 < len(drawn) <= 2000 and (drawn == 50.0).all() and outcomes.interval(drawn) == (50.0, 50.0)
    assert len(outcomes.resampled(outcomes.fixed(1), 0)) == len(drawn)  # paired


def test_a_family_on_few_pictures_has_no_interval() -> None:
    outcomes = of_families(easy=20, hard=1)
    drawn = outcomes.resampled(outcomes.fixed(0), 0)
    assert outcomes.rare_families == {"hard": 1} and outcomes.interval(drawn) is None and (drawn == 50.0).all()
    assert of_families(easy=20, hard=19).rare_families == {"hard": 19} and not of_families(easy=21, hard=20).rare_families


def test_an_interval_on_few_pictures_is_as_wide_as_students() -> None:
    """Tails of the expanded percentile interval, computed with a table of Student's t: 2.0930 at 19 degrees, 1.9842 at 99."""
    normal = statistics.NormalDist()
    for pictures, t in ((20, 2.0930), (100, 1.9842)):
        assert tail(pictures) == pytest.approx(normal.cdf(-t * (pictures / (pictures - 1)) ** 0.5), rel=2e-3)
    assert tail(10**6) == pytest.approx(0.025, rel=1e-4)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """Twenty pictures of five questions that are of one mind; the share of intervals that hold 70 % in 400 simulated reports."""
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(400):
        right = rng.random(20) < 0.7
        outcomes = Outcomes([Record(i, f"{i // 5:02}.png", "?", "x", right=[bool(right[i // 5])], tokens=[1]) for i in range(100)])
        low, high = outcomes.interval(outcomes.resampled(outcomes.fixed(0), 0, 500)) or (0.0, 0.0)
        held += low <= 70.0 <= high
    assert 0.93 <= held / 400 <= 0.99


def test_accuracy_over_questions_is_beside_the_mean_over_families() -> None:
    outcomes = of_families(easy=24, hard=8)
    assert outcomes.row(outcomes.fixed(0))["accuracy"] == 50.0 and outcomes.over_questions(outcomes.fixed(0)) == 75.0


def test_every_draw_of_many_pictures_counts() -> None:
    """Where every family is on every picture, as in the playground, the draws are all those of the generator."""
    rng = np.random.default_rng(2)
    right = rng.random((50, 2)) < 0.7
    places = [(picture, family) for picture in range(50) for family in (0, 1)]
    records = [Record(i, f"{i:02}.png", "?", "x", "ab"[k], right=[bool(right[i, k])], tokens=[1]) for i, k in places]
    outcomes = Outcomes(records)
    draws = np.random.default_rng(5).multinomial(50, np.full(50, 1 / 50), size=2000)
    assert outcomes.resampled(outcomes.fixed(0), 5) == pytest.approx((draws @ right * 2).mean(1))


def test_mixed_costs_weigh_the_fixed_ones() -> None:
    def cost(total: float) -> Cost:
        return Cost({part: total / len(PARTS) for part in PARTS}, total / 2, total, 2.0, 100.0, total * 2**20)

    mixture = mixed([[cost(10.0)], [cost(30.0)]], np.array([[0.25, 0.75]]))
    line = summarise(mixture)
    assert line["total_ms"] == pytest.approx(25.0) and line["ttft_ms"] == pytest.approx(12.5)
    assert line["tokens_per_second"] == pytest.approx(80.0) and line["peak_mib"] == pytest.approx(25.0)


def test_samples_and_examples_take_families_in_turn() -> None:
    records = [
        Record(index, f"{index}.png", "?", "x", "ab"[index % 2], right=[index > 3, True], tokens=[1, 2], said=["", ""])
        for index in range(8)
    ]
    assert sorted(record.family for record in balanced_sample(records, 4, 0)) == ["a", "a", "b", "b"]
    picked = pick_examples(records, [1] * 7 + [0], 4)
    assert [record.family for record, _ in picked] == ["a", "b", "a", "b"] and not picked[0][0].right[0]
    assert pick_examples(records, [0] * 8, 3)[-1][0].right == [False, True] and pick_examples(records, [0] * 8, 0) == []


# ---- answers and costs ------------------------------------------------------------------------------------------------------------


def test_batches_answer_and_route_as_single_requests_do(micro: Assistant) -> None:
    task = read_task(EVALUATION / "test.jsonl")
    items = [*task.items[3:8], task.items[25], task.items[0]]
    records, crashes = ask_all(micro, items, task.folder, [4, 64], 16, batch_size=4)
    assert not crashes and [record.question_id for record in records] == [item.question_id for item in items]
    for record in records:
        picture = load_image(task.folder / record.image)
        free = micro.answer([picture], record.text, Options(max_new_tokens=16))
        single = [micro.answer([picture], record.text, Options(max_new_tokens=16, routing=RoutingRequest(level))).text for level in (4, 64)]
        assert record.said == single and record.tokens == [24, 336]
        asked = free.reports[0].logits
        assert asked is not None and record.logits == pytest.approx(asked[[0, -1]].tolist(), abs=1e-4)


def test_pictures_without_tiles_are_laid_out_as_single_requests_do(micro: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro.model.config, "image_aspect_ratio", "pad")
    task = read_task(EVALUATION / "test.jsonl")
    records, crashes = ask_all(micro, task.items[:2], task.folder, [4, 64], 16)
    assert not crashes and records[0].tokens == [4, 64]
    for record in records:
        picture = load_image(task.folder / record.image)
        options = [Options(max_new_tokens=16, routing=RoutingRequest(level)) for level in (4, 64)]
        assert record.said == [micro.answer([picture], record.text, option).text for option in options]


def test_a_report_sees_the_pixels_that_every_other_command_sees(micro: Assistant, tmp_path: Path) -> None:
    """A picture that lies on its side by its EXIF orientation, and one with transparency."""
    from PIL import Image

    upright = Image.open(EVALUATION / "images" / "000.png").convert("RGB").resize((240, 120))
    exif = Image.Exif()
    exif[274] = 6  # turn by a quarter to see it upright
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "rotated.jpg", exif=exif, quality=95)
    clear = upright.convert("RGBA")
    clear.paste((200, 30, 30, 0), (0, 0, 120, 120))
    clear.save(tmp_path / "clear.png")
    items = [Item(name, name, "What is the background colour?", "beige") for name in ("rotated.jpg", "clear.png")]
    encoded = Encoder(micro, tmp_path)(items)
    for item, image in zip(items, encoded.images, strict=True):
        picture = load_image(tmp_path / item.image)
        assert image.size == picture.size == (240, 120) and picture.mode == "RGB"
        assert torch.allclose(image.features, micro.model.encode_images(micro.image_input(picture).views), atol=1e-5)
    assert load_image(tmp_path / "clear.png").getpixel((5, 5)) == (255, 255, 255)


def test_the_policy_that_goes_first_changes_with_every_question_and_repetition(micro: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    task = read_task(EVALUATION / "test.jsonl")
    sample = [Record(item.question_id, item.image, item.text, item.answer) for item in task.items[:2]]
    asked: list[tuple[str, Any]] = []
    answer = micro.answer

    def noted(images: Any, text: Any, options: Any) -> Any:
        asked.append((text, options.routing.granularity))
        return answer(images, text, options)

    monkeypatch.setattr(micro, "answer", noted)
    requests = {"coarse": RoutingRequest(4), "fine": RoutingRequest(8)}
    measure(micro, sample, task.folder, requests, {name: ["", ""] for name in requests}, 2, repeats=2)
    first, second = (record.text for record in sample)
    timed = asked[4:12]  # between the warm-up and the requests whose memory is watched
    assert timed[0::2] == [(first, 4), (second, 8), (first, 8), (second, 4)]
    assert timed[1::2] == [(first, 8), (second, 4), (first, 4), (second, 8)]


def test_peak_memory_is_what_a_request_holds_at_once() -> None:
    def work(*sizes: int) -> None:
        for size in sizes:
            torch.zeros(size, dtype=torch.uint8)

    peaks = peak_bytes({"one": lambda: work(3 * 2**20), "in turn": lambda: work(2**20, 2**20)}, torch.device("cpu"))
    assert peaks["one"] == pytest.approx(3 * 2**20, rel=0.01) and peaks["in turn"] == pytest.approx(2**20, rel=0.01)


def test_the_cache_is_as_large_as_the_tensors_in_it(micro: Assistant) -> None:
    output = micro.model.generate(
        inputs_embeds=torch.zeros(1, 7, micro.model.config.hidden_size), attention_mask=torch.ones(1, 7, dtype=torch.long),
        max_new_tokens=1, do_sample=False, return_dict_in_generate=True,
    )  # fmt: skip
    held = sum(tensor.nbytes for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values))
    assert kv_cache_bytes(micro.model.config.get_text_config(), 7, micro.model.dtype.itemsize) == held


def test_case_and_space_do_not_matter() -> None:
    assert is_right(" Red\n", "red") and not is_right("reddish", "red")


# ---- the command ------------------------------------------------------------------------------------------------------------------


def test_the_report_has_every_row_and_column(made: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in made["rows"]}
    assert [row["kind"] for row in made["rows"]] == ["fixed"] * 5 + ["random", "adaptive", "bias", "bias", "budget", "oracle"]
    assert made["answered"] == made["asked"] == 30 and not made["crashes"]
    assert rows["random at that cost"]["tokens"] == pytest.approx(rows["adaptive"]["tokens"])
    assert rows["oracle"]["accuracy"] == max(row["accuracy"] for row in made["rows"])
    assert rows["adaptive, at most 48"]["tokens"] <= 48 < rows["adaptive"]["tokens"]
    for row in made["rows"]:
        cost = row["cost"]
        assert 0 < cost["ttft_ms"] < cost["total_ms"] and cost["peak_mib"] > 1 and cost["kv_mib"] > 0
        assert sum(cost["milliseconds"].values()) == pytest.approx(cost["total_ms"])  # bars and table say the same
        assert (cost["router_share"] > 0) == (row["kind"] in ("adaptive", "bias", "budget"))
    assert made["oracle_gap"]["accuracy"] == pytest.approx(rows["oracle"]["accuracy"] - rows["adaptive"]["accuracy"])
    assert made["no_router"] is None and NO_ROUTER not in made["notes"]
    assert made["timing"]["differing"] == 0 and set(rows["adaptive"]["choices"]) == set(made["families"])
    table = (made["output"] / "report.md").read_text()
    assert table == markdown(made) and table.count("\n| fixed ") == 5 and "Oracle gap" in table
    assert len((made["output"] / "answers.jsonl").read_text().splitlines()) == 31


def test_the_page_is_whole_and_asks_for_nothing(made: dict[str, Any]) -> None:
    page = (made["output"] / "report.html").read_text()
    assert "<script" not in page and "http://" not in page and "https://" not in page and "@import" not in page
    assert page.count("data:image/jpeg;base64,") == 3 and "default-src 'none'" in page
    assert "All policies" in page and page.count("<tr") > 20


def test_intervals_are_shown_where_there_are_some(made: dict[str, Any]) -> None:
    """The thirty questions are on three images, too few for intervals."""
    from PIL import Image

    report = json.loads(json.dumps({key: value for key, value in made.items() if key != "output"}))
    assert "No intervals are given: the family 'pole' is on 3 images," in markdown(report) and report["rows"][0]["interval"] is None
    report["rows"][0]["interval"], report["rare_families"] = [12.25, 97.5], {}
    page, table = write_page(report, [Image.new("RGB", (40, 20))] * 3), markdown(report)
    assert "1 of 150 answers (questions times granularities) is empty." in markdown({**report, "empty_answers": 1})
    assert "accuracy, mean over families, %" in page and "accuracy, mean over families, % [95 %] | accuracy over questions, %" in table
    assert "visual tokens, mean over families" in page and "visual tokens, mean over families" in table
    assert "[12.2, 97.5]" in page and "[12.2, 97.5]" in table and "No intervals" not in table


def test_a_text_cannot_become_part_of_the_page(made: dict[str, Any]) -> None:
    from PIL import Image

    report = json.loads(json.dumps({key: value for key, value in made.items() if key != "output"}))
    for example in report["examples"]:
        example |= {"text": ATTACK, "said": ATTACK, "answer": ATTACK, "family": ATTACK, "right": False}
        example["tries"][0]["said"] = ATTACK
    report["task"] = report["facts"][0] = report["rows"][0]["name"] = ATTACK
    report["crashes"] = [{"question_id": ATTACK, "image": ATTACK, "reason": ATTACK}]
    page = write_page(report, [Image.new("RGB", (40, 20))] * 3)
    assert "<script" not in page and "<img src=x" not in page and page.count("&lt;script&gt;") > 15


def test_one_task_of_ones_own_and_fewer_granularities(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = questions(tmp_path, {"family": None}, {"text": "Which cell of the grid is marked?", "answer": "nowhere"})
    output = tmp_path / "out"
    flags = ["--questions", str(path), "--granularities", "4,16", "--timing-samples", "0", "--device", "cpu"]
    assert main([*flags, "--output", str(output)]) == 0
    report = json.loads((output / "report.json").read_text())
    assert report["granularities"] == [4, 16] and report["families"] == ["all"] and report["rows"][0]["accuracy"] == 50.0
    assert all(row["cost"] is None and row["interval"] is None for row in report["rows"])
    said = capsys.readouterr().out
    assert "fixed 16" in said and "No intervals are given: the questions are on 1 image," in said
    assert "No intervals are given" in (output / "report.html").read_text() and "Where the time" not in (output / "report.html").read_text()


def test_a_model_without_a_router_says_what_is_left_out(
    tmp_path: Path, micro: Assistant, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(micro.model.model, "router", None)
    monkeypatch.setattr(Assistant, "load", classmethod(lambda *args, **options: micro))
    flags = ["--questions", str(questions(tmp_path, {})), "--timing-samples", "1", "--output", str(tmp_path / "out")]
    assert main([*flags, "--budgets", "100"]) == 0
    assert "no router" in capsys.readouterr().out and "no router" in (tmp_path / "out" / "report.html").read_text()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    rows = report["rows"]
    assert report["no_router"] == NO_ROUTER
    assert [row["kind"] for row in rows] == ["fixed"] * 5 + ["budget", "oracle"] and rows[5]["tokens"] == rows[2]["tokens"]
    assert main([*flags, "--biases=-1", "--overwrite"]) == 1 and "no router to bias" in capsys.readouterr().err


def test_crashed_questions_are_counted_and_end_the_run_with_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "empty.png").touch()
    path = questions(tmp_path, {"text": "word " * 5000}, {"image": "broken.png"}, {"image": "empty.png"}, {})
    output = tmp_path / "out"
    assert main(["--questions", str(path), "--timing-samples", "0", "--device", "cpu", "--output", str(output)]) == 1
    assert "3 of 4 questions crashed" in capsys.readouterr().err
    report = json.loads((output / "report.json").read_text())
    assert report["answered"] == 1 and [crash["question_id"] for crash in report["crashes"]] == [0, 1, 2]
    assert report["rows"][0]["accuracy"] == 100.0 and "3 of 4 questions crashed" in (output / "report.html").read_text()


def test_answers_of_an_earlier_report_are_not_asked_again(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llava.eval.report import run

    asked: list[int] = []

    def counting(assistant: Assistant, items: Any, *rest: Any) -> Any:
        asked.append(len(items))
        return ask_all(assistant, items, *rest)

    monkeypatch.setattr(run, "ask_all", counting)
    answers = made["output"] / "answers.jsonl"
    flags = ["--task", "playground", "--limit", "32", "--timing-samples", "0", "--device", "cpu", "--output", str(tmp_path / "out")]
    assert main([*flags, "--answers", str(answers)]) == 0
    assert asked == [2] and json.loads((tmp_path / "out" / "report.json").read_text())["answered"] == 32
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    lines[1]["logits"][0] += 1
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main([*flags, "--answers", str(tmp_path / "other.jsonl"), "--overwrite"]) == 1 and "another model" in capsys.readouterr().err


def test_answers_come_back_from_their_file_as_they_were(tmp_path: Path) -> None:
    """A line separator within a text is no end of a line."""
    item = Item(1, "a.png", "Who?\u2028And why?", "x")
    record = Record(item.question_id, item.image, item.text, item.answer, said=["x"], right=[True], tokens=[1], logits=[0.5])
    write_answers(tmp_path / "answers.jsonl", {"model": "m"}, [record])
    found = earlier_answers(tmp_path / "answers.jsonl", [item], {"model": "m"}, {}, lambda items: [record][: len(items)])
    assert found == ([record], [], [])


def test_a_shorter_report_in_the_same_folder_keeps_the_answers_that_it_does_not_need(made: dict[str, Any], tmp_path: Path) -> None:
    shutil.copy(made["output"] / "answers.jsonl", tmp_path / "answers.jsonl")
    before = sorted((tmp_path / "answers.jsonl").read_text().splitlines())
    flags = ["--task", "playground", "--limit", "5", "--timing-samples", "0", "--device", "cpu", "--output", str(tmp_path)]
    assert main([*flags, "--answers", str(tmp_path / "answers.jsonl")]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["answered"] == 5
    assert sorted((tmp_path / "answers.jsonl").read_text().splitlines()) == before and len(before) == 31


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--max-new-tokens", "1"], "--max-new-tokens was 16, is 1;"),
        (["--granularities", "4,8,16,32"], "--granularities was [4, 8, 16, 32, 64], is [4, 8, 16, 32];"),
        (["--model-path", "COPY"], "--model-path was "),
    ],
)
def test_answers_made_in_another_way_are_refused(
    made: dict[str, Any], more: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "COPY" in more:
        shutil.copytree(MICRO_MODEL, tmp_path / "copy")
        os.utime(tmp_path / "copy" / "model.safetensors", (1, 1))
        more = ["--model-path", str(tmp_path / "copy")]
    flags = ["--task", "playground", "--limit", "30", "--timing-samples", "0", "--device", "cpu", "--output", str(tmp_path / "out")]
    assert main([*flags, "--answers", str(made["output"] / "answers.jsonl"), *more]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "do not fit this report: " in error and words in error and not (tmp_path / "out" / "report.json").exists()


def test_answers_that_do_not_say_how_they_were_made_are_refused(
    made: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (made["output"] / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "bare.jsonl").write_text("".join(lines[1:]))
    flags = ["--task", "playground", "--limit", "30", "--timing-samples", "0", "--device", "cpu", "--output", str(tmp_path / "out")]
    assert main([*flags, "--answers", str(tmp_path / "bare.jsonl")]) == 1
    assert "does not hold 'made with'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--task", "vqa"], "no task 'vqa'; choose one of playground, easy_vqa"),
        (["--task", "playground", "--image-folder", "x"], "--image-folder belongs to --questions"),
        (["--questions", "nowhere.jsonl"], "The question file nowhere.jsonl does not exist"),
        (["--task", "playground", "--model-path", "nowhere/at/all"], "nowhere/at/all"),
        (["--task", "playground", "--granularities", "5,64"], "this model has [4, 8, 16, 32, 64]"),
        (
            ["--task", "playground", "--budgets", "5"],
            "The policy 'adaptive, at most 5' of --budgets cannot be used. The model can answer none of the first 100 questions with these "
            "options; 2000000: max_visual_tokens is 5, but",
        ),
    ],
)
def test_a_wrong_flag_is_one_sentence(flags: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*flags, "--device", "cpu", "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and sentence in error
    assert not (tmp_path / "out" / "report.json").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [(["--biases=0.5,nan"], "--biases: 'nan' is not a finite number"), (["--budgets=48,0"], "--budgets: '0' is not a whole number of 1")],
)
def test_a_number_that_cannot_be_is_a_usage_error(flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--task", "playground", "--output", "nowhere", *flags])
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "line 1: the value ends before it is complete"),
        ("[1]", "line 1: it is of type int"),
        ('{"question_id": 1, "image": "a.png", "text": "?"}', "line 1: answer is missing"),
        ('{"question_id": 1, "image": ["a.png"], "text": "?", "answer": "x"}', "line 1: image is \\['a.png'\\], expected one file name"),
        ('{"question_id": 1, "text": "?", "answer": "x"}', "line 1: image is None, expected one file name"),
        ('{"question_id": 1, "image": "a.png", "text": "?", "answer": "x"}', "line 1: there is no image"),
        ("", "holds no question"),
    ],
)
def test_a_wrong_line_is_named(line: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=sentence):
        read_task(tmp_path / "mine.jsonl")


def test_a_missing_plotting_library_is_named_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Assistant, "load", lambda *args, **options: pytest.fail("the model was loaded"))
    for name in ("page", "plots"):
        monkeypatch.delitem(sys.modules, f"llava.eval.report.{name}")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(short(tmp_path / "out")) == 1
    assert 'needs matplotlib; install it with pip install -e ".[eval]"' in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_easy_vqa_asks_in_the_micro_worlds_words() -> None:
    pytest.importorskip("easy_vqa")
    task = open_task("easy_vqa")
    assert len(task.items) == 9673 and set(task.families) == {"shape", "colour", "yes or no"}
    assert all(item.text.startswith("In the poster, ") for item in task.items) and (task.folder / task.items[0].image).is_file()


# ---- going on, comparing ------------------------------------------------------------------------------------------------------------

FILES = ("answers.jsonl", "report.csv", "report.html", "report.json", "report.md")


def short(output: Path, length: int = 24) -> list[str]:
    """Flags of a short report on the first questions, in batches of eight."""
    fixed = ["--task", "playground", "--timing-samples", "0", "--device", "cpu", "--batch-size", "8"]
    return [*fixed, "--limit", str(length), "--output", str(output)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of twenty-four questions, made without a break."""
    output = tmp_path_factory.mktemp("whole") / "report"
    assert main(short(output)) == 0
    assert sorted(path.name for path in output.iterdir()) == list(FILES)
    return output


@pytest.fixture
def stop_in_batch(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[int]]:
    """Presses Ctrl-C in the n-th batch that is asked; returns the sizes of the batches before it."""
    from llava.eval.report import answers

    real = answers.ask

    def at(number: int | None) -> list[int]:
        sizes: list[int] = []

        def stopping(assistant: Assistant, batch: Any, *rest: Any) -> Any:
            if len(sizes) + 1 == number:
                raise KeyboardInterrupt
            sizes.append(len(batch.items))
            return real(assistant, batch, *rest)

        monkeypatch.setattr(answers, "ask", stopping)
        return sizes

    return at


def test_a_stopped_report_goes_on_to_what_it_would_have_been(
    whole: Path, tmp_path: Path, stop_in_batch: Any, interrupts: None, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    stop_in_batch(3)
    assert main(short(output)) == 130
    assert capsys.readouterr().err.endswith(f"interrupted: the answers to 16 questions are kept in {output}; the same command resumes.\n")
    part = output / "answers.parts" / "part-00000.jsonl"
    part.write_bytes(part.read_bytes()[:-10])  # as a kill within the write leaves it: the last whole batch lacks a question
    sizes = stop_in_batch(None)
    assert main(short(output)) == 0
    assert sizes == [8, 8]  # the batch with the lost line as it was, and what had not been asked
    for name in FILES:
        assert (output / name).read_bytes() == (whole / name).read_bytes(), name
    assert not (output / "answers.parts").exists()


def test_a_report_on_a_full_disk_says_so_and_goes_on(
    whole: Path, tmp_path: Path, disk_of: Callable[[int | None], None], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    disk_of(5400)  # room for some lines of a batch, not for all
    assert main(short(output)) == 1
    assert "error: no space for" in capsys.readouterr().err and not (output / "report.json").exists()
    lines = (output / "answers.parts" / "part-00000.jsonl").read_text().splitlines()
    assert 8 <= len(lines) < 24 and [json.loads(line)["row"] for line in lines] == list(range(len(lines)))
    disk_of(None)
    assert main(short(output)) == 0
    assert (output / "report.json").read_bytes() == (whole / "report.json").read_bytes()


def test_no_room_for_the_pages_leaves_no_half_of_one(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import errno

    from llava.eval.report import run

    output, real = tmp_path / "out", Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if "report.html" in path.name:
            real(path, data[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert main(short(output)) == 1
    assert "error: no space for" in capsys.readouterr().err
    assert sorted(path.name for path in output.iterdir()) == ["answers.jsonl", "answers.parts"]
    monkeypatch.setattr(run, "ask", lambda *args: pytest.fail("asked again"))
    assert main(short(output)) == 0
    assert (output / "report.html").read_bytes() == (whole / "report.html").read_bytes()


def test_a_finished_report_is_replaced_on_request_alone(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    before = (output / "report.json").read_bytes()
    assert main(short(output, 8)) == 1
    assert "already holds report.json; choose another --output, or replace" in capsys.readouterr().err
    assert (output / "report.json").read_bytes() == before
    (output / "report.json").unlink()  # what is left of a report is somebody's, too
    assert main(short(output, 8)) == 1 and "already holds report.html" in capsys.readouterr().err
    assert main([*short(output, 8), "--overwrite"]) == 0
    assert json.loads((output / "report.json").read_text())["answered"] == 8


def test_a_stopped_run_is_not_taken_for_another(
    tmp_path: Path, stop_in_batch: Any, interrupts: None, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    stop_in_batch(2)
    assert main(short(output)) == 130
    stop_in_batch(None)
    assert main([*short(output), "--max-new-tokens", "3"]) == 1
    said = capsys.readouterr().err
    assert "belongs to another run: --max-new-tokens was 16, is 3. Choose another --output, or start over there with --overwrite." in said
    assert main([*short(output, 8), "--max-new-tokens", "3", "--overwrite"]) == 0


def test_questions_that_crashed_are_asked_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = questions(tmp_path, {}, {"image": "b.png"})
    (tmp_path / "b.png").write_bytes(b"no image")
    flags = ["--questions", str(path), "--timing-samples", "0", "--device", "cpu", "--output", str(tmp_path / "out")]
    assert main(flags) == 1 and "1 of 2 questions crashed" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "report.json").read_text())["answered"] == 1
    shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
    assert main(flags) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["answered"] == 2 and not (tmp_path / "out" / "answers.parts").exists()


def test_the_csv_is_the_table(whole: Path) -> None:
    import csv

    report = json.loads((whole / "report.json").read_text())
    lines = list(csv.DictReader((whole / "report.csv").open(newline="")))
    assert [line["choice"] for line in lines] == [row["name"] for row in report["rows"]]
    for line, row in zip(lines, report["rows"], strict=True):
        assert float(line["accuracy"]) == row["accuracy"] and float(line["visual_tokens"]) == row["tokens"]
        assert line["ttft_ms"] == line["accuracy_low"] == "" and float(line["accuracy of pole"]) == row["families"]["pole"]
    assert "difference_to_baseline" not in lines[0]


def compared(right: Sequence[bool], before: Sequence[bool], logits: Sequence[float] | None = None) -> dict[str, Any]:
    """Two reports on as many questions, an image each: at one level, right or not."""

    def records(values: Sequence[bool]) -> list[Record]:
        own = None if logits is None else list(logits)
        return [Record(i, f"{i:03}.png", "?", "x", said=["x"], right=[value], tokens=[10], logits=own) for i, value in enumerate(values)]

    here, there = records(right), records(before)
    baseline = Baseline(Path("old"), "old model", [4], {key_of(record): record for record in reversed(there)})
    routed = [] if logits is None else [Policy("adaptive", "adaptive", RoutingRequest())]
    return compare(here, apply_policies(Outcomes(here), here, [4], routed)[0], routed, baseline, 0)


def test_differences_to_a_baseline_are_paired() -> None:
    """Half of a hundred questions are right in both; this report has ten more. Unpaired, an interval of 60 - 50 % would hold 0."""
    right = [index < 60 for index in range(100)]
    row = compared(right, [index < 50 for index in range(100)])["rows"][0]
    assert (row["name"], row["accuracy"], row["baseline_accuracy"], row["better"], row["worse"]) == ("fixed 4", 60.0, 50.0, 10, 0)
    low, high = row["difference_interval"]
    assert row["difference"] == 10.0 and 3.5 < low < 6.0 and 14.0 < high < 17.5  # +-1.98 times sqrt(.1 * .9 / 99) around 10
    assert row["tokens_difference"] == 0.0 and row["tokens_interval"] == (0.0, 0.0)
    same = compared(right, right)["rows"][0]
    assert same["difference"] == 0.0 and same["difference_interval"] == (0.0, 0.0) and same["better"] == same["worse"] == 0


def test_few_images_give_no_interval_of_differences() -> None:
    row = compared([True] * 5, [True] * 4 + [False])["rows"][0]
    assert row["difference"] == 20.0 and row["difference_interval"] is None and row["tokens_interval"] is None


def test_rows_that_the_baseline_has_not_are_named(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    flags = ["--baseline", str(whole / "report.json"), "--budgets", "48", "--biases=-1", "--max-new-tokens", "1"]
    assert main([*short(output), *flags]) == 0
    report = json.loads((output / "report.json").read_text())
    rows = {row["name"]: row for row in report["baseline"]["rows"]}
    assert report["baseline"]["missing"] == [] and {"fixed 4", "adaptive", "adaptive, at most 48", "oracle"} <= set(rows)
    assert rows["fixed 64"]["difference"] < 0 < rows["fixed 64"]["worse"]  # answers of one token against whole ones
    table, page = (output / "report.md").read_text(), (output / "report.html").read_text()
    assert table in capsys.readouterr().out and "minus the baseline, question by question" in table and "Against the baseline" in page
    assert "difference_to_baseline" in (output / "report.csv").read_text().splitlines()[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--limit", "25"], "has no answer to question 2000024, which is asked here; give both reports the same"),
        (["--limit", "23"], "has 1 more questions (the first is 2000023)"),
        (["--baseline", "nowhere"], "nowhere holds no report.json of a finished report"),
    ],
)
def test_a_baseline_on_other_questions_is_refused_before_the_model_is_loaded(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    monkeypatch.setattr(Assistant, "load", lambda *args, **options: pytest.fail("the model was loaded"))
    assert main([*short(tmp_path / "out"), "--baseline", str(whole), *flags]) == 1
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_question_that_changed_is_named(whole: Path) -> None:
    items = open_task("playground").items[:24]
    items[3] = replace(items[3], answer="nobody")
    with pytest.raises(ValueError, match=f"Question {items[3].question_id} differs in the baseline .*: its answer was .* 'nobody'"):
        read_baseline(whole, items)


@pytest.mark.parametrize(
    ("line", "words"),
    [('{"question_id": 1}', "Line 3 .* is not an answer of a report: expected an object of"), ('{"a', "Line 3 .*: the value ends")],
)
def test_a_damaged_answers_file_is_one_sentence(whole: Path, tmp_path: Path, line: str, words: str) -> None:
    lines = (whole / "answers.jsonl").read_text().splitlines()
    (tmp_path / "answers.jsonl").write_text("\n".join([*lines[:2], line]))
    with pytest.raises(ValueError, match=words):
        read_answers(tmp_path / "answers.jsonl")


# ---- the page in a browser --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_chromium(made: dict[str, Any], width: int, dark: bool, tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    executable = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if executable is None:
        pytest.skip("no chromium; set CHROMIUM to its path")
    from PIL import Image

    report = {key: value for key, value in made.items() if key != "output"}
    report["examples"] = [{**example, "text": f"{ATTACK} {'long' * 40}"} for example in report["examples"]]
    path = tmp_path / "report.html"
    path.write_text(write_page(report, [Image.new("RGB", (40, 20))] * len(report["examples"])))
    said: list[str] = []
    asked: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(BROWSER_FLAGS))
        scheme = "dark" if dark else "light"
        page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_timeout(200)
        size = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        broken = page.evaluate("[...document.images].filter(image => !image.complete || !image.naturalWidth).length")
        shown = page.evaluate("[...document.querySelectorAll('svg.plot')].filter(plot => plot.getBoundingClientRect().width > 100).length")
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        title = page.title()
        browser.close()
    assert said == [] and [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
    assert size[0] <= size[1] == width and broken == 0 and shown == 1 and "owned" not in title
    assert background == ("rgb(18, 23, 22)" if dark else "rgb(246, 247, 246)")
