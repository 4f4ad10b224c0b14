"""Scripts as they are written for `llava-hf/llava-v1.6-*`: on transformers' own LlavaNext, and on a native folder after `import llava`.

Only the model's name differs. The LlavaNext is the micro model without its router, whose answers to these questions are the same.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest

from llava.constants import MICRO_MODEL
from llava.convert import main as convert

MODEL = "llava-hf/llava-v1.6-vicuna-7b-hf"
ROOT = MICRO_MODEL.parents[1]

CARD = """
from PIL import Image
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("llava-hf/llava-v1.6-vicuna-7b-hf")
model = AutoModelForImageTextToText.from_pretrained("llava-hf/llava-v1.6-vicuna-7b-hf", dtype=torch.float32, low_cpu_mem_usage=True)

# prepare image and text prompt, using the appropriate prompt template
image = Image.open("playground/images/scene_beige.png")
conversation = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "Which number does the sign show?"},
            {"type": "image"},
        ],
    },
]
prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
inputs = processor(images=image, text=prompt, return_tensors="pt").to(model.device, torch.float32)
"""
SCRIPTS = {
    "the model card": CARD + """
output = model.generate(**inputs, max_new_tokens=20)
print(processor.decode(output[0], skip_special_tokens=True).split("ASSISTANT:")[-1].strip())
""",
    "trimmed by the prompt's length": CARD + """
generate_ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)
generate_ids = generate_ids[:, inputs["input_ids"].shape[1]:]
print(processor.batch_decode(generate_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)[0].strip())
""",
    "positional and hand-written": CARD + """
prompt = "USER: <image>\\nWhich number does the sign show? ASSISTANT:"
inputs = processor(image, prompt, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=20)
print(processor.post_process_image_text_to_text(output, skip_special_tokens=True)[0].split("ASSISTANT:")[-1].strip())
""",
    "a batch": CARD + """
processor.tokenizer.padding_side = "left"
other = "Which large shape is there?"
short = processor.apply_chat_template(
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": other}]}], add_generation_prompt=True
)
images = [image, Image.open("playground/images/scene_pink.png")]
inputs = processor(images=images, text=[prompt, short], padding=True, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=20)
new = output[:, inputs.input_ids.shape[1]:]
print(*(text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)), sep=" | ")
""",
    "in one step": CARD + """
conversation[0]["content"][1] = {"type": "image", "path": "playground/images/scene_beige.png"}
inputs = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs.to(model.device), max_new_tokens=20)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip())
""",
    "what generate tells": CARD + """
output = model.generate(**inputs, max_new_tokens=20, return_dict_in_generate=True, output_scores=True, output_logits=True)
new = output.sequences[:, inputs["input_ids"].shape[1]:]
scores = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
assert scores.shape == new.shape and len(output.logits) == new.shape[1] and output.past_key_values is not None
print(processor.decode(new[0], skip_special_tokens=True).strip())
""",
    "beams": CARD + """
output = model.generate(**inputs, max_new_tokens=20, num_beams=3, num_return_sequences=2)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip())
""",
    "a streamer": CARD + """
from threading import Thread
from transformers import TextIteratorStreamer

streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
thread = Thread(target=model.generate, kwargs=dict(**inputs, streamer=streamer, max_new_tokens=20))
thread.start()
print("".join(streamer).strip())
thread.join()
""",
    "a printing streamer": CARD + """
from transformers import TextStreamer

model.generate(**inputs, streamer=TextStreamer(processor, skip_prompt=True, skip_special_tokens=True), max_new_tokens=20)
""",
    "a training step": CARD + """
inputs = processor(images=image, text=prompt + " 658", return_tensors="pt")
labels = inputs["input_ids"].clone()
labels[labels == processor.image_token_id] = -100
loss = model(**inputs, labels=labels).loss
loss.backward()
assert loss.isfinite() and model.get_input_embeddings().weight.grad is not None
print(658)
""",
    "pipelines": CARD + """
from transformers import pipeline

pipe = pipeline("image-text-to-text", model="llava-hf/llava-v1.6-vicuna-7b-hf", processor=processor)
conversation[0]["content"][1] = {"type": "image", "url": "playground/images/scene_beige.png"}
messages = conversation
whole = pipe(text=messages, max_new_tokens=20)[0]["generated_text"]
new = pipe(text=messages, max_new_tokens=20, return_full_text=False)[0]["generated_text"]
pair = pipe(image, text=prompt, max_new_tokens=20, return_full_text=False)[0]["generated_text"]
several = pipe(text=[messages, messages], max_new_tokens=20, batch_size=2, return_full_text=False)
both = pipe(images=[image, image], text=[prompt, prompt], max_new_tokens=20, return_full_text=False)
begun = pipe(text=[*messages, {"role": "assistant", "content": [{"type": "text", "text": "6"}]}], max_new_tokens=20)[0]["generated_text"]
answers = {whole[-1]["content"].strip(), new.strip(), pair.strip(), *(each[0]["generated_text"].strip() for each in several)}
answers |= {each["generated_text"].strip() for each in both} | {begun[-1]["content"][-1]["text"].strip()}
print(*answers)
""",
}  # fmt: skip
EXPECTED = {"a batch": "658 | ring"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By the model's class."""
    made = tmp_path_factory.mktemp("models")
    assert convert([str(MICRO_MODEL), str(made / "native"), "--to", "native"]) == 0
    assert convert([str(MICRO_MODEL), str(made / "next"), "--to", "transformers", "--drop-router"]) == 0
    return {"AvgLlavaForConditionalGeneration": made / "native", "LlavaNextForConditionalGeneration": made / "next"}


@pytest.mark.parametrize("kind", ["LlavaNextForConditionalGeneration", "AvgLlavaForConditionalGeneration"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_run_on_both(folders: dict[str, Path], kind: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    told = io.StringIO()
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(told):
        exec("import llava\n" + SCRIPTS[script].replace(MODEL, str(folders[kind])), names)
    assert type(names["model"]).__name__ == kind
    assert told.getvalue().strip() == EXPECTED.get(script, "658")
