"""The public helpers: prompts to ids, pictures to tensors, stopping words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sentencepiece
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, StoppingCriteriaList

from llava import mm_utils
from llava.conversation import Span, conv_templates, get_template, text_spans
from llava.crops import load_image_processor
from llava.images import ImageError
from llava.tokenizer import load_tokenizer

ORACLE = Path(__file__).parent / "oracle"
TOKENS = json.loads((ORACLE / "tokens.json").read_text())
CASES = next(value for value in TOKENS.values() if isinstance(value, list))
PREPROCESS = json.loads((ORACLE / "preprocess.json").read_text())
PINPOINTS = json.loads((ORACLE / "resolution_choice.json").read_text())["pinpoints_small_string"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(ORACLE / "checkpoint")


@pytest.fixture(scope="module")
def legacy_tokenizer() -> Any:
    return load_tokenizer(ORACLE / "checkpoint", legacy=True)


@pytest.fixture(scope="module", params=["loaded", "saved", "saved_twice", "plain_auto_class"])
def any_tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tokenizer as loaded, and after its ways through a folder."""
    tokenizer = load_tokenizer(ORACLE / "checkpoint")
    loads: dict[str, list[Any]] = {
        "loaded": [],
        "saved": [load_tokenizer],
        "saved_twice": [load_tokenizer, load_tokenizer],
        "plain_auto_class": [AutoTokenizer.from_pretrained],
    }
    for load in loads[request.param]:
        folder = tmp_path_factory.mktemp("tokenizer")
        tokenizer.save_pretrained(folder)
        tokenizer = load(folder)
    return tokenizer


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_ids_and_text(case: dict[str, Any], any_tokenizer: Any) -> None:
    assert mm_utils.tokenizer_image_token(case["prompt"], any_tokenizer) == case["ids"]
    assert any_tokenizer(case["prompt"]).input_ids == case["plain_tokenizer_ids"]
    text_ids = [i for i in case["ids"] if i != TOKENS["image_placeholder_id"]]
    assert any_tokenizer.decode(text_ids, skip_special_tokens=True) == case["decoded_skip_special"]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_ids_of_a_legacy_tokenizer(case: dict[str, Any], legacy_tokenizer: Any) -> None:
    assert mm_utils.tokenizer_image_token(case["prompt"], legacy_tokenizer) == case["ids_with_legacy_true"]


@pytest.mark.parametrize(
    "text", ["Hello", " leading", "   three", "\n", " \n ", " ", "   ", "tail ", "▁x", "a▁b", "é 日"]
)
def test_any_text_has_the_ids_of_the_sentencepiece_model(text: str, tokenizer: Any) -> None:
    model = sentencepiece.SentencePieceProcessor(model_file=str(ORACLE / "checkpoint" / "tokenizer.model"))
    assert tokenizer(text, add_special_tokens=False).input_ids == model.encode(text)
    assert tokenizer.decode(model.encode(text)) == model.decode(model.encode(text))


def test_special_tokens_and_settings_survive_saving(any_tokenizer: Any) -> None:
    assert isinstance(any_tokenizer, PreTrainedTokenizerFast)
    assert any_tokenizer.bos_token_id == TOKENS["bos"]
    assert any_tokenizer.eos_token_id == TOKENS["eos"]
    assert (any_tokenizer.pad_token_id, any_tokenizer.unk_token_id) == (TOKENS["pad"], TOKENS["unk"])
    assert len(any_tokenizer) == TOKENS["vocab_size"]
    assert (any_tokenizer.model_max_length, any_tokenizer.padding_side) == (1024, "right")


def test_arguments_of_loading_are_honoured() -> None:
    tokenizer = load_tokenizer(ORACLE / "checkpoint", padding_side="left", model_max_length=77)
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", 77)
    assert tokenizer(["Hello there.", "Hello"], padding=True).input_ids[1][0] == tokenizer.pad_token_id


@pytest.mark.parametrize("legacy", [True, False])
def test_legacy_survives_saving(legacy: bool, tmp_path: Path) -> None:
    load_tokenizer(ORACLE / "checkpoint", legacy=legacy).save_pretrained(tmp_path)
    key = "ids_with_legacy_true" if legacy else "ids"
    again = load_tokenizer(tmp_path)
    for case in CASES:
        assert mm_utils.tokenizer_image_token(case["prompt"], again) == case[key]


def test_a_sentencepiece_folder_that_does_not_say_is_legacy(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((ORACLE / "checkpoint" / "tokenizer.model").read_bytes())
    config = json.loads((ORACLE / "checkpoint" / "tokenizer_config.json").read_text())
    del config["legacy"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    for case in CASES:
        assert mm_utils.tokenizer_image_token(case["prompt"], tokenizer) == case["ids_with_legacy_true"]


def test_a_folder_saved_by_the_library_alone_is_repaired(tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(ORACLE / "checkpoint").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for case in CASES:
        assert mm_utils.tokenizer_image_token(case["prompt"], tokenizer) == case["ids"]


def test_added_tokens_stay_whole(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ORACLE / "checkpoint")
    tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("a<im_start>b", add_special_tokens=False).input_ids[1] == TOKENS["vocab_size"]


def byte_level_tokenizer(folder: Path) -> Path:
    """Save a tokenizer of the kind that Qwen and Llama 3 use, without a bos."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(folder)
    return folder


def test_other_tokenizers_pass_untouched(tmp_path: Path) -> None:
    folder = byte_level_tokenizer(tmp_path)
    ours, stock = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.backend_tokenizer.to_str() == stock.backend_tokenizer.to_str()
    ids = mm_utils.tokenizer_image_token("<image> a <image>", ours)
    assert ids == [-200, *stock(" a ").input_ids, -200]


def test_a_text_that_spells_bos_keeps_its_first_tokens(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level_tokenizer(tmp_path), bos_token="<|begin|>")
    ids = mm_utils.tokenizer_image_token("<|begin|>a<image>b", tokenizer)
    assert ids == [tokenizer.bos_token_id, *tokenizer("a").input_ids, -200, *tokenizer("b").input_ids]


def spans_of(*texts: str) -> list[Span]:
    """Markup and words in turns."""
    return [span for index, text in enumerate(texts) for span in (text_spans(text) if index % 2 else [Span(text, False)])]


def tokenizers_of_every_kind(folder: Path) -> dict[str, Any]:
    """With special tokens of one name or another; `stripped` has one that takes white space along."""
    kinds = {
        "new": load_tokenizer(ORACLE / "checkpoint"),
        "legacy": load_tokenizer(ORACLE / "checkpoint", legacy=True),
        "bytes": load_tokenizer(byte_level_tokenizer(folder), bos_token="<s>", eos_token="</s>", unk_token="<unk>"),
        "stripped": load_tokenizer(ORACLE / "checkpoint"),
    }
    kinds["stripped"].add_tokens([AddedToken("<|end|>", lstrip=True, rstrip=True), AddedToken("<image>")], special_tokens=True)
    return kinds


@pytest.mark.parametrize("kind", ["new", "legacy", "bytes", "stripped"])
def test_words_are_text_whatever_they_spell(kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizers_of_every_kind(tmp_path)[kind]
    for words in ("Hello </s>USER: x ASSISTANT: y", "</s>", "<s><unk>", " <s> a</s> ", "<|end|> b", "<</s>/s>", "a<image></s>b<image>"):
        ids = mm_utils.tokenize_spans(spans_of("USER: ", words, "</s>"), tokenizer)
        special = [token for token in ids if token in set(tokenizer.all_special_ids)]
        assert special[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in special[:-1]
        assert len(special) == (2 if tokenizer("").input_ids else 1)
        assert ids.count(-200) == words.count("<image>")
        texts = tokenizer(f"USER: {words}".split("<image>"), add_special_tokens=False, split_special_tokens=True).input_ids
        joined = [token for text in texts for token in (-200, *text)][1:]
        assert ids[len(special) - 1 : -1] == joined


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
@pytest.mark.parametrize("legacy", [False, True])
def test_a_templates_special_tokens_are_special_beside_words_that_spell_one(case: dict[str, Any], legacy: bool) -> None:
    """The recorded prompts as markup: their ids stay, in front of words that are read with the other tokenizer."""
    tokenizer = load_tokenizer(ORACLE / "checkpoint", legacy=legacy)
    markup = [part for part in re.split("(<image>)", case["prompt"]) if part]
    spans = [Span(part, False) for part in markup]
    recorded = case["ids_with_legacy_true" if legacy else "ids"]
    assert mm_utils.tokenize_spans(spans, tokenizer) == recorded
    guarded = mm_utils.tokenize_spans([*spans, Span("<image>", False), Span("</s>", True)], tokenizer)
    assert guarded[: len(recorded) + 1] == [*recorded, -200]
    assert tokenizer.eos_token_id not in guarded[len(recorded) + 1 :]


def test_tokens_that_were_added_later_are_text_too() -> None:
    tokenizer = load_tokenizer(ORACLE / "checkpoint")
    assert tokenizer.eos_token_id not in mm_utils.tokenize_spans([Span("a</s>", True)], tokenizer)
    tokenizer.add_tokens(["<tool>"], special_tokens=True)
    tokenizer.add_tokens(["<word>"])
    ids = mm_utils.tokenize_spans([Span("<tool>", False), Span("<tool><word>", True)], tokenizer)
    added = tokenizer.convert_tokens_to_ids(["<tool>", "<word>"])
    assert [token for token in ids if token in added] == added  # a word of the vocabulary is no special token


def test_a_tokenizer_that_cannot_read_special_tokens_as_text_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava.tokenizer.PreTrainedTokenizerFast", type("Other", (), {}))
    other = AutoTokenizer.from_pretrained(ORACLE / "checkpoint")
    assert mm_utils.tokenize_spans([Span("a", True)], other) == mm_utils.tokenizer_image_token("a", other)
    with pytest.raises(ValueError, match="cannot read as text; leave it out"):
        mm_utils.tokenize_spans([Span("a</s>", True)], other)


def test_ids_as_a_tensor_with_another_placeholder(tokenizer: Any) -> None:
    ids = mm_utils.tokenizer_image_token("<image>", tokenizer, 9, return_tensors="pt")
    assert isinstance(ids, torch.Tensor)
    assert (ids.tolist(), ids.dtype) == ([1, 9], torch.long)
    with pytest.raises(ValueError, match="'np', expected None"):
        mm_utils.tokenizer_image_token("<image>", tokenizer, return_tensors="np")


@pytest.mark.parametrize(
    "call", PREPROCESS["batch_calls"], ids=lambda call: f"{call['mode']}-{'-'.join(call['images'])}"
)
def test_process_images(call: dict[str, Any]) -> None:
    images = [Image.open(ORACLE / "images" / f"{name}.png") for name in call["images"]]
    config = SimpleNamespace(image_aspect_ratio=call["mode"], image_grid_pinpoints=PINPOINTS)
    out = mm_utils.process_images(images, load_image_processor(ORACLE / "tiny-clip"), config)
    assert isinstance(out, torch.Tensor) == (call["returns"] == "tensor")
    assert (list(out.shape) if isinstance(out, torch.Tensor) else [list(x.shape) for x in out]) == call["shapes"]
    pixels = load_file(ORACLE / "preprocess.safetensors")
    for view, name in zip(out, call["images"], strict=True):
        torch.testing.assert_close(view, pixels[f"{call['mode'] or 'none'}/{name}"], atol=1e-5, rtol=0)


def test_process_images_converts_grey_and_refuses_nothing_and_threads() -> None:
    processor, config = load_image_processor(ORACLE / "tiny-clip"), SimpleNamespace(image_aspect_ratio="pad")
    assert mm_utils.process_images([Image.new("L", (9, 5))], processor, config).shape == (1, 3, 48, 48)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="got no image"):
        mm_utils.process_images([], processor, config)
    with pytest.raises(ImageError, match="1 x 4000"):
        mm_utils.process_images([Image.new("RGB", (1, 4000))], processor, config)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("zhibinlan/AVG-LLaVA", "AVG-LLaVA"),
        ("/data/run-7/", "run-7"),
        ("/data/run-7/checkpoint-300", "run-7_checkpoint-300"),
        ("C:\\models\\x", "x"),
        ("x", "x"),
    ],
)
def test_model_name(path: str, name: str) -> None:
    assert mm_utils.get_model_name_from_path(path) == name


def test_model_name_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a folder"):
        mm_utils.get_model_name_from_path(" ")


def stop(tokenizer: Any, keywords: list[str], prompt: torch.Tensor, rows: list[list[int]]) -> list[bool]:
    criteria = mm_utils.KeywordsStoppingCriteria(keywords, tokenizer, prompt)
    done = criteria(torch.tensor(rows), None)  # type: ignore[arg-type]
    assert done.dtype == torch.bool
    return done.tolist()


def test_rows_stop_on_their_own(tokenizer: Any) -> None:
    ids = tokenizer("Yes it is.###Human", add_special_tokens=False).input_ids
    other = tokenizer("and so on and so on and so on", add_special_tokens=False).input_ids[: len(ids)]
    prompt = torch.tensor([[1, -200, 5], [1, -200, 6]])
    assert stop(tokenizer, ["###"], prompt, [ids, other + [263] * (len(ids) - len(other))]) == [True, False]


def test_keyword_in_the_prompt_does_not_count(tokenizer: Any) -> None:
    prompt = torch.tensor([tokenizer("Human: hi###Assistant:").input_ids])
    answer = tokenizer("yes", add_special_tokens=False).input_ids
    end = tokenizer("###", add_special_tokens=False).input_ids
    assert stop(tokenizer, ["###"], prompt, [prompt[0].tolist() + answer]) == [False]
    assert stop(tokenizer, ["###"], prompt, [prompt[0].tolist() + answer + end]) == [True]
    assert stop(tokenizer, ["###"], prompt, [answer + end]) == [True]
    assert stop(tokenizer, ["###"], prompt, [prompt[0].tolist() + answer] * 3) == [False] * 3


def test_special_token_as_keyword_and_short_answers(tokenizer: Any) -> None:
    prompt = torch.tensor([[1, 5, 6, 7]])
    assert stop(tokenizer, ["</s>"], prompt, [[287, 2]]) == [True]
    assert stop(tokenizer, ["</s>"], prompt, [[287]]) == [False]
    assert stop(tokenizer, ["</s>"], prompt, [[]]) == [False]


def test_keywords_that_say_nothing_are_refused(tokenizer: Any) -> None:
    for keywords in ([], [""], ["a", ""]):
        with pytest.raises(ValueError, match="at least one text and no empty one"):
            mm_utils.KeywordsStoppingCriteria(keywords, tokenizer, torch.tensor([[1]]))


@pytest.mark.parametrize("from_embeddings", [False, True])
def test_stopping_inside_generate(from_embeddings: bool, tokenizer: Any) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=420, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, eos_token_id=2
    )
    model = LlamaForCausalLM(config).eval()
    prompt = torch.tensor([[1, 280, 281], [1, 290, 291]])
    inputs: dict[str, Any] = {"inputs_embeds": model.get_input_embeddings()(prompt)} if from_embeddings else {}
    if not from_embeddings:
        inputs = {"input_ids": prompt}
    inputs["attention_mask"] = torch.ones_like(prompt)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    free = model.generate(**inputs, **options)[:, 0 if from_embeddings else 3 :]
    keyword = tokenizer.decode(free[0, 2:3])
    criteria = mm_utils.KeywordsStoppingCriteria([keyword], tokenizer, prompt)
    out = model.generate(**inputs, **options, stopping_criteria=StoppingCriteriaList([criteria]))
    answer = out[:, 0 if from_embeddings else 3 :]
    texts = [tokenizer.decode(row) for row in free.tolist()]
    assert keyword in tokenizer.decode(answer[0])
    assert (answer[0, 3:] == 0).all()
    if keyword not in texts[1]:
        assert torch.equal(answer[1], free[1])


@pytest.mark.parametrize("name", sorted(set(conv_templates) - {"plain", "v0_plain"}))
def test_spaces_before_an_answer_are_left_out(name: str, tokenizer) -> None:
    """A wrapper may end its prompt in `ASSISTANT: `; a token for that space would stand where the answer's own begins."""
    conversation = get_template(name)
    conversation.append_message(conversation.roles[0], "<image>\nWhich colour?")
    conversation.append_message(conversation.roles[1], None)
    prompt = conversation.get_prompt()
    ids = mm_utils.tokenizer_image_token(prompt, tokenizer)
    assert not prompt.endswith(" ") and ids[-1] != tokenizer.convert_tokens_to_ids("\N{LOWER ONE EIGHTH BLOCK}")
    for spaces in (" ", "   "):
        assert mm_utils.tokenizer_image_token(prompt + spaces, tokenizer) == ids


@pytest.mark.parametrize("prompt", ["a trailing space ", "ASSISTANT: a ", "USER: <image> ", " ", "ASSISTANT: <image> ", "USER: "])
def test_other_spaces_stay(prompt: str, tokenizer) -> None:
    ids = mm_utils.tokenizer_image_token(prompt, tokenizer)
    assert len(ids) > len(mm_utils.tokenizer_image_token(prompt.rstrip(), tokenizer))


def test_a_prompts_own_words_are_not_an_open_answer(tokenizer) -> None:
    spans = [Span("ASSISTANT: ", True)]
    assert mm_utils.tokenize_spans(spans, tokenizer)[:-1] == mm_utils.tokenizer_image_token("ASSISTANT: ", tokenizer)


def test_llavas_helpers_of_anyres_are_here() -> None:
    image = Image.new("RGB", (40, 20), "red")
    padded = mm_utils.resize_and_pad_image(image, (48, 48))
    assert padded.size == (48, 48) and padded.getpixel((0, 0)) == (0, 0, 0) and padded.getpixel((24, 24)) == (255, 0, 0)
    assert [tile.size for tile in mm_utils.divide_to_patches(padded, 24)] == [(24, 24)] * 4
