"""The processor: recorded questions and pictures lead to recorded tokens, and what it cannot prepare it refuses in a sentence."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

import llava.model  # noqa: F401  (registers the Auto classes)
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import tokenizer_image_token
from llava.model.processing import AvgLlavaProcessor

CAR = "What colour is the car next to the tree?"
DESCRIBE = "Describe the picture in detail."
GREEDY = {"do_sample": False, "max_new_tokens": 14}


@pytest.fixture(scope="module")
def processor(oracle):
    return AutoProcessor.from_pretrained(oracle / "checkpoint")


@pytest.fixture(scope="module")
def pictures(oracle):
    return {name: Image.open(oracle / "images" / f"{name}.png").convert("RGB") for name in ("wide", "tall", "square")}


def asking(text, *parts):
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def recorded(oracle, name):
    return next(case for case in json.loads((oracle / "generate.json").read_text())["cases"] if case["name"] == name)


def test_the_auto_class_finds_it_with_the_model_settings(processor):
    assert isinstance(processor, AvgLlavaProcessor)
    assert (processor.image_aspect_ratio, processor.conv_version) == ("anyres", "v1")
    assert processor.image_grid_pinpoints


@pytest.mark.parametrize(
    ("name", "picture", "question"),
    [("adaptive_wide", "wide", CAR), ("adaptive_tall", "tall", DESCRIBE), ("text_only_no_images", None, "Hello, who are you?")],
)
def test_a_chat_generates_the_recorded_tokens(oracle, released, processor, pictures, name, picture, question):
    parts = [{"type": "image", "image": pictures[picture]}] if picture else []
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(asking(question, *parts), **options)
    assert inputs["input_ids"].tolist() == recorded(oracle, name)["input_ids"]
    assert set(inputs) <= set(processor.model_input_names)
    assert released.generate(**inputs, **GREEDY).tolist() == recorded(oracle, name)["new_token_ids"]


def test_images_come_first_where_they_stand_together(processor, pictures):
    images = [{"type": "image", "image": pictures[name]} for name in ("wide", "tall")]
    words = {"type": "text", "text": CAR}
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    first, behind = (
        processor.apply_chat_template([{"role": "user", "content": parts}], **options) for parts in ([*images, words], [words, *images])
    )
    assert first["input_ids"] == behind["input_ids"] and first["image_sizes"] == behind["image_sizes"]
    written = [processor.apply_chat_template([{"role": "user", "content": f"{text}"}]) for text in (f"<image>\n{CAR}", f"{CAR} <image>")]
    assert written[0] == written[1]
    between = processor.apply_chat_template([{"role": "user", "content": [words, images[0], words, images[1]]}])
    assert f"USER: {CAR}\n<image>\n{CAR}\n<image> " in between


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_padded_batch_generates_the_recorded_tokens(oracle, released, processor, pictures, side, nested):
    case = recorded(oracle, "batch_adaptive_left")
    prompts = [processor.apply_chat_template(asking(DESCRIBE, {"type": "image"}), add_generation_prompt=True)]
    prompts.append("USER: <image>\nWhat? ASSISTANT:")
    images = [pictures["wide"], pictures["square"]]
    given = [[image] for image in images] if nested else images
    inputs = processor(images=given, text=prompts, padding=True, padding_side=side, return_tensors="pt")
    assert inputs["image_sizes"] == [image.size for image in images]
    short = inputs["attention_mask"][1]
    assert (short.argmin() == 0) == (side == "left") and int(short.sum()) < len(short)
    if side == "left":
        assert inputs["input_ids"].tolist() == case["input_ids"]
    assert released.generate(**inputs, **GREEDY).tolist() == case["new_token_ids"]


def test_it_stays_the_same_when_saved_alone(processor, pictures, tmp_path):
    processor.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    again = AvgLlavaProcessor.from_pretrained(tmp_path)
    one, other = (each(images=pictures["tall"], text="<image>\nA sign?", return_tensors="pt") for each in (processor, again))
    assert again.conv_version == processor.conv_version and one["input_ids"].equal(other["input_ids"])
    assert all(torch.equal(left, right) for left, right in zip(one["images"], other["images"], strict=True))
    assert AvgLlavaProcessor.from_pretrained(tmp_path, conv_version="mistral_instruct").conv_version == "mistral_instruct"


def test_what_it_refuses(processor, pictures, tmp_path):
    def refuses(sentence, **call):
        with pytest.raises(ValueError, match=sentence):
            processor(**call)

    refuses("got no text", images=pictures["wide"])
    refuses(r"hold \[1\] <image> placeholders, but \[0\] pictures", text="<image>\nWhat?")
    refuses("but .* pictures were given", text=["<image>", "none"], images=[[], [pictures["wide"]]])
    refuses("do not stack; pass padding=True", text=["One.", "One, two, three."], return_tensors="pt")
    refuses("padding is 'max_length'", text="One.", padding="max_length")
    refuses("return_tensors is 'np'", text="One.", return_tensors="np")
    refuses("padding_side is 'top'", text="One.", padding_side="top")
    with pytest.raises(ValueError, match="expected user and assistant in alternation"):
        processor.apply_chat_template([{"role": "system", "content": "Be brief."}])
    with pytest.raises(ValueError, match=r"parts of type \['video'\]"):
        processor.apply_chat_template(asking("Hi?", {"type": "video"}))
    with pytest.raises(ValueError, match="padding only count with tokenize=True"):
        processor.apply_chat_template(asking("Hi?"), padding=True)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="model type 'bert', expected llava_llama or llava_mistral"):
        AvgLlavaProcessor.from_pretrained(tmp_path)


def test_a_picture_may_be_a_file(oracle, processor, pictures):
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    file = {"type": "image", "path": str(oracle / "images" / "wide.png")}
    one, other = (
        processor.apply_chat_template(asking(CAR, part), **options) for part in (file, {"type": "image", "image": pictures["wide"]})
    )
    assert torch.equal(one["images"][0], other["images"][0])
    with pytest.raises(ValueError, match="put a PIL image under 'image'"):
        processor.apply_chat_template(asking(CAR, {"type": "image"}), tokenize=True)


def test_start_and_end_tokens_frame_a_picture(oracle):
    framed = AvgLlavaProcessor.from_pretrained(oracle / "checkpoint", mm_use_im_start_end=True)
    prompt = framed.apply_chat_template(asking("What?", {"type": "image"}))
    assert "<im_start><image><im_end>\nWhat?" in prompt
    ids = tokenizer_image_token(prompt, framed.tokenizer)
    place = ids.index(IMAGE_TOKEN_INDEX)
    assert (ids[place - 1], ids[place + 1]) == (420, 421)
