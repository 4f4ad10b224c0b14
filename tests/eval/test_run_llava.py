"""LLaVA's argument object and the command line, with what they print, draw and refuse."""

from __future__ import annotations

import argparse
import sys

import pytest
from PIL import Image

from llava.eval import run_llava
from llava.eval.run_llava import build_parser, eval_model, main, split_names


@pytest.fixture
def base(oracle):
    return ["--model-path", str(oracle / "checkpoint"), "--device", "cpu", "--max-new-tokens", "5"]


@pytest.fixture
def picture(oracle):
    return str(oracle / "images" / "wide.png")


def arguments(oracle, **fields):
    return type("Args", (), {"model_path": str(oracle / "checkpoint"), "query": "What is it?", "max_new_tokens": 4, **fields})()


def test_the_published_argument_object_prints_and_returns_the_answer(oracle, picture, capsys):
    published = {
        "model_base": None, "model_name": "checkpoint", "conv_mode": None, "image_file": picture, "sep": ",",
        "temperature": 0, "top_p": None, "num_beams": 1, "vis_token_granularity": 144,
    }  # fmt: skip
    answer = eval_model(arguments(oracle, **published))
    assert capsys.readouterr().out == answer + "\n" and answer
    assert eval_model(arguments(oracle, image_file=picture, vis_token_granularity=144)) == answer  # fields may be missing


def test_several_files_are_joined_by_the_separator(oracle, picture, capsys):
    both = eval_model(arguments(oracle, image_file=f"{picture};{picture}", sep=";"))
    assert capsys.readouterr().out == both + "\n"
    with pytest.raises(ValueError, match="holds 1 <image> placeholders, but 2 images"):
        eval_model(arguments(oracle, image_file=f"{picture},{picture}", query="<image> What is it?"))


@pytest.mark.parametrize(
    ("text", "separator", "names"),
    [
        ("a.png", ",", ["a.png"]),
        ("a.png, b.png", ",", ["a.png", "b.png"]),
        ("a,b.png", ",", ["a,b.png"]),
        ("one, two, three.png,a.png", ",", ["one, two, three.png", "a.png"]),
        ("a.png,a,b.png,c.png", ",", ["a.png", "a,b.png", "c.png"]),
        ("c,d.png", ",", ["c", "d.png"]),
        ("data:image/png;base64,iVBORw0KGgo=,a.png", ",", ["data:image/png;base64,iVBORw0KGgo=", "a.png"]),
        ("data:image/png;base64,iVBORw0KGgo=;a.png", ";", ["data:image/png;base64,iVBORw0KGgo=", "a.png"]),
        ("a\0,b" + "c" * 5000, ",", ["a\0", "b" + "c" * 5000]),
    ],
)
def test_a_separator_within_the_name_of_a_file_or_in_a_data_url_separates_nothing(tmp_path, monkeypatch, text, separator, names):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "a,b.png", "one, two, three.png"):
        (tmp_path / name).touch()
    assert split_names(text, separator) == names


@pytest.mark.parametrize("streaming", [[], ["--stream"]])
def test_the_command_answers_explains_and_draws(base, picture, tmp_path, capsys, streaming):
    drawn = tmp_path / "out.png"
    assert main([*base, "--image-file", picture, "--query", "What is it?", "--explain", "--explain-image", str(drawn), *streaming]) == 0
    out = capsys.readouterr().out
    assert "<- chosen" in out and "milliseconds: views" in out and "router" in out
    with Image.open(drawn) as sheet:
        assert sheet.width > 1000 and sheet.height > 500


def test_a_fixed_granularity_shows_no_logits(base, picture, capsys):
    assert main([*base, "--image-file", picture, "--query", "What is it?", "--vis-token-granularity", "36", "--explain"]) == 0
    out = capsys.readouterr().out
    assert "granularity 36, 150 visual tokens of 564 (73 % saved)" in out and " - " in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image-file", "nowhere.png"], "nowhere.png"),
        (["--image-file", "{here}"], "not a readable image"),
        (["--image-file", "{picture}", "--vis-token-granularity", "50"], "is 50, but this model has [9, 18, 36, 72, 144]"),
        (["--image-file", "{picture}", "--max-visual-tokens", "10"], "the coarsest granularity allowed costs 39"),
        (["--image-file", "{picture}", "--granularity-bias", "nan"], "granularity_bias is nan, expected a finite number"),
        (["--image-file", "{picture}", "--conv-mode", "v9"], "v9"),
        (["--explain-image", "out.png"], "needs an image to draw on"),
        (["--image-file", "{picture}", "--explain-image", "out.txt"], "expected a file name ending in"),
        (["--image-file", "{picture}", "--num-beams", "2", "--stream"], "beams cannot be streamed"),
        (["--query", ""], "--query is empty"),
    ],
)
def test_bad_input_gets_one_sentence_a_failing_exit_and_no_file(base, picture, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    filled = [flag.format(picture=picture, here=__file__) for flag in flags]
    assert main([*base, "--query", "What is it?", *filled]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("text", "value"), [("auto", None), ("36", 36), ("36,144", [36, 144])])
def test_the_granularity_flag_takes_auto_a_number_or_a_list_under_both_spellings(text, value):
    for flag in ("--vis-token-granularity", "--vis_token_granularity"):
        assert build_parser().parse_args(["--query", "q", flag, text]).vis_token_granularity == value


def test_a_granularity_that_is_no_number_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args(["--query", "q", "--vis-token-granularity", "fine"])
    assert stop.value.code == 2 and "not auto, a number" in capsys.readouterr().err


def test_quantised_weights_without_their_library_end_with_one_sentence(base, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert main([*base, "--query", "Why?", "--load-4bit"]) == 1
    told = capsys.readouterr().err
    assert 'pip install "bitsandbytes>=0.50,<0.51"' in told and "Traceback" not in told


def test_of_several_files_the_broken_one_is_named(base, picture, tmp_path, capsys):
    (broken := tmp_path / "broken.png").write_bytes(b"no image")
    assert main([*base, "--image-file", f"{picture};{broken}", "--sep", ";", "--query", "Why?"]) == 1
    assert f"error: {broken}: the 8 bytes are not a readable image" in capsys.readouterr().err


def test_llavas_names_for_images_load_what_an_argument_names(oracle):
    one, two = (str(oracle / "images" / name) for name in ("grey.png", "tall.png"))
    names = run_llava.image_parser(argparse.Namespace(image_file=f"{one};{two}", sep=";"))
    assert names == [one, two]
    images = run_llava.load_images(names)
    assert [image.mode for image in images] == ["RGB", "RGB"]
    with Image.open(two) as wanted:
        assert run_llava.load_image(two).size == wanted.size == images[1].size
