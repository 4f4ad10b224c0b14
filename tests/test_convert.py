"""Converting between layouts: the command, every pair of layouts, exact round trips, and the same answers behind transformers' doors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava.checkpoint_files import weight_files
from llava.constants import IGNORE_INDEX, MICRO_MODEL
from llava.convert import main
from llava.images import load_image
from llava.inference import Assistant
from llava.model.answers import in_answers
from llava.model.native import AvgLlavaForConditionalGeneration
from tests.micro import llava_micro_folder

PLAYGROUND = Path(MICRO_MODEL).parent


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("native") / "micro"
    assert main([str(llava_micro_folder()), str(output), "--to", "native"]) == 0
    return output


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}


def same_weights(first: Path, second: Path) -> bool:
    ours, theirs = weights(first), weights(second)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_way_there_and_back_is_exact(native: Path, tmp_path: Path) -> None:
    assert main([str(native), str(tmp_path / "back"), "--to", "llava"]) == 0
    assert same_weights(tmp_path / "back", llava_micro_folder())
    marks = {name: json.loads((native / "config.json").read_text())[name] for name in ("answer_start", "answer_end")}
    assert all(marks.values())
    for name, added in {"config.json": marks, "generation_config.json": {}, "tokenizer.json": {}}.items():
        back, given = (json.loads((folder / name).read_text()) for folder in (tmp_path / "back", llava_micro_folder()))
        if "transformers_version" in given:
            added = {**added, "transformers_version": transformers.__version__}
        assert back == {**given, **added}


def test_a_released_checkpoint_comes_back_with_its_rules(oracle: Path, tmp_path: Path) -> None:
    """The published layout: its own fields completed, weights to the bit."""
    assert main([str(oracle / "checkpoint"), str(tmp_path / "native"), "--to", "native"]) == 0
    assert main([str(tmp_path / "native"), str(tmp_path / "back"), "--to", "llava"]) == 0
    assert same_weights(tmp_path / "back", oracle / "checkpoint")
    stored = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (stored["unpad_rule"], stored["router_text_fill"], stored["router_attention_axis"]) == ("pooled_grid", "answer", "views")


def test_stock_code_gives_the_answers_of_our_own(native: Path) -> None:
    """Processor, chat template, generate and trimming as for any LLaVA-NeXT of transformers, in one padded batch."""
    rows = [json.loads(line) for line in (PLAYGROUND / "eval" / "test.jsonl").read_text().splitlines()[:2400:200]]
    images = [load_image(PLAYGROUND / "eval" / row["image"]) for row in rows]
    assistant = Assistant.load(str(llava_micro_folder()))
    ours = [assistant.answer([image], row["text"]) for row, image in zip(rows, images, strict=True)]
    model, processor = AutoModelForImageTextToText.from_pretrained(native).eval(), AutoProcessor.from_pretrained(native)
    assert isinstance(model, AvgLlavaForConditionalGeneration)
    talks = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["text"]}]}] for row in rows
    ]
    prompts = [processor.apply_chat_template(talk, add_generation_prompt=True) for talk in talks]
    inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
    output, routing = model.generate(**inputs, max_new_tokens=16, do_sample=False, output_routing=True)
    texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [text.strip() for text in texts] == [answer.text for answer in ours]
    assert [report.granularity for report in routing] == [answer.reports[0].granularity for answer in ours]


def test_transformers_layout_is_reached_from_the_native_one_and_left_for_it(native: Path, tmp_path: Path) -> None:
    assert main([str(native), str(tmp_path / "next"), "--to", "transformers", "--drop-router"]) == 0
    assert json.loads((tmp_path / "next" / "config.json").read_text())["model_type"] == "llava_next"
    assert main([str(tmp_path / "next"), str(tmp_path / "again"), "--to", "native"]) == 0
    ours, theirs = weights(tmp_path / "again"), weights(native)
    assert set(theirs) - set(ours) == {name for name in theirs if name.startswith("model.router.")}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["again", "next"]


def test_a_native_folder_is_written_anew_with_a_card_and_code(native: Path, tmp_path: Path) -> None:
    report = PLAYGROUND.parent / "docs" / "evaluation" / "playground.json"
    flags = ["--with-code", "--report", str(report), "--license", "apache-2.0", "--base-model", "some/base", "--max-shard-gb", "0.002"]
    assert main([str(native), str(tmp_path / "again"), "--to", "native", *flags]) == 0
    assert same_weights(tmp_path / "again", native) and len(weight_files(tmp_path / "again")) > 1
    assert type(AutoProcessor.from_pretrained(tmp_path / "again")).__name__ == "AvgLlavaProcessor"
    card = (tmp_path / "again" / "README.md").read_text()
    assert "license: apache-2.0" in card and "- some/base" in card and "| adaptive | 99.0 | 98.8 to 99.3 | 91.6 |" in card
    assert (tmp_path / "again" / "modeling_avg_llava.py").is_file()
    assert main([str(tmp_path / "again"), str(tmp_path / "without"), "--to", "native"]) == 0
    assert json.loads((tmp_path / "without" / "config.json").read_text()) == json.loads((native / "config.json").read_text())
    assert "auto_map" not in (tmp_path / "without" / "processor_config.json").read_text()
    assert "Measured" not in (tmp_path / "without" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([str(llava_micro_folder()), "OUT", "--to", "transformers", "--with-code"], "--with-code is for native folders; leave it out"),
        ([str(llava_micro_folder()), "OUT", "--to", "llava"], "has the llava layout already; choose another with --to"),
        (["OUT", "OUT", "--to", "native"], "is not a folder; give a downloaded checkpoint"),
        ([str(llava_micro_folder()), "OUT", "--to", "transformers"], "(--drop-router leaves it out)"),
    ],
)
def test_what_cannot_be_converted_is_named(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main([str(output) if argument == "OUT" else argument for argument in arguments]) == 1
    assert message in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize("stored", ["[]", '{"model_type": ["avg_llava"]}', "{", "[" * 100000], ids=["list", "kind", "cut", "deep"])
def test_a_config_that_is_none_is_refused_in_a_sentence(stored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(stored)
    assert main([str(tmp_path), str(tmp_path / "out"), "--to", "native"]) == 1
    said = capsys.readouterr().err
    assert "config.json" in said and said.count("\n") == 1


def test_what_a_second_step_would_refuse_is_refused_first_and_of_the_folder_that_was_named(
    native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between a native folder and transformers' the weights are written twice: nothing is, if the second time cannot be."""
    assert main([str(native), str(tmp_path / "new" / "next"), "--to", "transformers"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {native} cannot be converted: it has a router")
    assert not (tmp_path / "new").exists()
    assert main([str(native), str(tmp_path), "--to", "transformers", "--drop-router"]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path} exists already; name a folder that does not.\n"


def test_the_granularity_does_not_depend_on_an_answer_behind_the_prompt(native: Path) -> None:
    """As a loss outside the model or a reward asks for it: a forward pass without labels over prompt and answer."""
    model, processor = AutoModelForImageTextToText.from_pretrained(native).eval(), AutoProcessor.from_pretrained(native)
    rows = [json.loads(line) for line in (PLAYGROUND / "eval" / "test.jsonl").read_text().splitlines()[::100]]
    chosen = set()
    for row in rows:
        image = load_image(PLAYGROUND / "eval" / row["image"])
        talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["text"]}]}]
        prompt = processor.apply_chat_template(talk, add_generation_prompt=True)
        asked = processor(images=image, text=prompt, return_tensors="pt")
        _, (expected,) = model.generate(**asked, max_new_tokens=1, output_routing=True)
        answered = processor(images=image, text=f"{prompt} {row['answer']}{processor.tokenizer.eos_token}", return_tensors="pt")
        labels = answered["input_ids"].clone()
        labels[:, : asked["input_ids"].shape[1]] = IGNORE_INDEX
        for further in ({}, {"labels": labels}, {"labels": answered["input_ids"]}):
            with torch.no_grad():
                (found,) = model(**answered, **further).routing
            assert torch.equal(found.logits, expected.logits) and found.granularity == expected.granularity
        chosen.add(expected.granularity)
    assert len(chosen) > 1


def test_earlier_answers_of_a_conversation_are_hidden_as_training_with_labels_hides_them(native: Path) -> None:
    model, processor = AutoModelForImageTextToText.from_pretrained(native).eval(), AutoProcessor.from_pretrained(native)
    image = load_image(PLAYGROUND / "images" / "scene_pink.png")
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour is the background?"}]}
    seen = set()
    for answer in ("pink", "It is blue, like all the digits in the row from left to right"):
        talk = [question, {"role": "assistant", "content": answer}, {"role": "user", "content": "How many shapes are there?"}]
        inputs = processor(images=image, text=processor.apply_chat_template(talk, add_generation_prompt=True), return_tensors="pt")
        answers = in_answers(inputs["input_ids"][0], model.config.answer_start, model.config.answer_end)
        _, (found,) = model.generate(**inputs, max_new_tokens=1, output_routing=True)
        marks, model.config.answer_start = model.config.answer_start, None
        with torch.no_grad():
            (trained,) = model(**inputs, labels=inputs["input_ids"].masked_fill(~answers, IGNORE_INDEX)).routing
            (leaked,) = model(**inputs).routing
        model.config.answer_start = marks
        assert torch.equal(found.logits, trained.logits) and not torch.equal(found.logits, leaked.logits)
        seen.add(tuple(found.logits.tolist()))
    assert len(seen) == 1


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def of_whole_numbers(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = min(tensors)
    save_file({**tensors, name: tensors[name].to(torch.int32)}, file)


def settings_elsewhere(folder: Path) -> None:
    (folder.parent / "secret").write_text("-----BEGIN KEY-----", encoding="utf-8")
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").symlink_to(folder.parent / "secret")


def config_of(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("to", ["native", "llava"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncated, "is no whole safetensors file"),
        (of_whole_numbers, "holds 1 tensors that are no floating-point weights"),
        (settings_elsewhere, "is not valid JSON"),
        (config_of("[1]"), "holds a list, expected an object"),
        (config_of('{"model_type": ["avg_llava"]}'), "model_type is ['avg_llava']"),
        (config_of('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"), "is nested"),
    ],
)
def test_a_damaged_source_is_one_sentence_and_leaves_nothing(
    damage: Callable[[Path], object], said: str, to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    shutil.copytree(MICRO_MODEL, source)
    damage(source)
    before = sorted(tmp_path.iterdir())
    assert main([str(source), str(output), "--to", to]) == 1
    assert said in capsys.readouterr().err and sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("size", ["nan", "inf", "-1", "0"])
def test_a_shard_has_a_size(size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(MICRO_MODEL), str(tmp_path / "output"), "--to", "native", "--max-shard-gb", size]) == 1
    assert "--max-shard-gb is" in capsys.readouterr().err
