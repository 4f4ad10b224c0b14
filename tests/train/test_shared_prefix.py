"""Rows about one image, scored behind what they have in common, score as each does alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.language_model.llava_native import LlavaNativeConfig
from llava.model.splice import ContextLengthError
from llava.train import shared_prefix
from llava.train.data import Collator, ConversationDataset
from llava.train.objectives import image_features, score_rows, score_rows_of_one_image
from llava.train.rows import RowReader
from tests.stage_runs import ORACLE

QUESTIONS = [("Where?", "here"), ("Where is it now?", "left of the box"), ("Who", "a"), ("Where?", "there, and there")]


def row(image: Any, *turns: tuple[str, str]) -> dict[str, Any]:
    marks = "<image>\n" * (len(image) if isinstance(image, list) else image is not None)
    said = [("human", f"{marks * (number == 0)}{question}", answer) for number, (question, answer) in enumerate(turns)]
    conversation = [{"from": who, "value": text} for _, question, answer in said for who, text in (("human", question), ("gpt", answer))]
    return {"conversations": conversation, **({} if image is None else {"image": image})}


def batch_of(reader: RowReader, *rows: dict[str, Any]) -> dict[str, Any]:
    dataset = ConversationDataset(rows, reader)
    return Collator(0)([dataset[index] for index in range(len(rows))])


def names() -> list[str]:
    return sorted(path.name for path in (ORACLE / "images").iterdir())


class Calls:
    """Positions that the language model reads."""

    def __init__(self, model: Any) -> None:
        self.lengths: list[int] = []
        self.hook = model.model.layers[0].register_forward_pre_hook(lambda module, args: self.lengths.append(args[0].shape[1]))


@pytest.mark.parametrize("at_once", [1, 40, 1024])
@pytest.mark.parametrize("images", [1, 2])
def test_rows_behind_one_image_score_as_alone(
    images: int, at_once: int, reader: RowReader, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_prefix, "POSITIONS_AT_ONCE", at_once)
    image: Any = names()[:images] if images > 1 else names()[0]
    rows = [row(image, turn) for turn in QUESTIONS] + [row(image, *QUESTIONS[:3])]
    batch = batch_of(reader, *rows)
    expected = [score_rows(tiny_model, alone, image_features(tiny_model, alone)) for alone in (batch_of(reader, each) for each in rows)]
    features = image_features(tiny_model, batch)
    calls = Calls(tiny_model)
    losses, tokens = score_rows_of_one_image(tiny_model, batch, features)
    levels, groups = len(tiny_model.levels), {1: 5, 40: 4, 1024: 1}[at_once]
    assert len(calls.lengths) == levels * (1 + groups)
    torch.testing.assert_close(losses, torch.cat([each for each, _ in expected]), rtol=1e-5, atol=1e-6)
    assert torch.equal(tokens, torch.cat([each for _, each in expected]))


def test_what_cannot_share_is_read_row_by_row(reader: RowReader, tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = names()[:2]
    one, other = row(first, QUESTIONS[0]), row(second, QUESTIONS[0])
    text = row(None, QUESTIONS[0])
    late = {"conversations": [{"from": "human", "value": "Well?\n<image>\nHm"}, {"from": "gpt", "value": "b"}], "image": first}
    for rows in ([one], [one, other], [one, text], [text, text], [one, late]):
        batch = batch_of(reader, *rows)
        shares = shared_prefix.shared_prefix(batch) > 0
        features = image_features(tiny_model, batch)
        found, expected = score_rows_of_one_image(tiny_model, batch, features), score_rows(tiny_model, batch, features)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6, equal_nan=True)
        assert shares == (rows[-1].get("image") == first and len(rows) == 2)
    for field, value in (("sliding_window", 16), ("_attn_implementation", "flash_attention_2")):
        config = tiny_model.config
        with monkeypatch.context() as patch:
            patch.setattr(config, field, value, raising=False)
            assert not shared_prefix.reads_behind_a_prefix(tiny_model, 17)
    assert shared_prefix.reads_behind_a_prefix(tiny_model, 17)


def test_a_native_models_window_is_its_text_models() -> None:
    parts: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
    tower = {"model_type": "clip_vision_model", **parts, "image_size": 8, "patch_size": 4}
    for window, reads in ((16, False), (17, True), (None, True)):
        text = {"model_type": "mistral", "num_key_value_heads": 2, **parts, "sliding_window": window}
        config = LlavaNativeConfig(text_config=text, vision_config=tower, image_token_id=3, image_aspect_ratio="pad")
        assert shared_prefix.reads_behind_a_prefix(SimpleNamespace(config=config), 17) == reads


def test_answers_are_never_shared(reader: RowReader) -> None:
    """Equal rows have everything in common, but what they answer is predicted in each."""
    batch = batch_of(reader, *[row(names()[0], QUESTIONS[0])] * 2)
    count = shared_prefix.shared_prefix(batch)
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert labels[count] != IGNORE_INDEX and (labels[:count] == IGNORE_INDEX).all() and (ids[:count] == IMAGE_TOKEN_INDEX).sum() == 1


def test_a_row_longer_than_the_context_is_refused(reader: RowReader, tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of(reader, row(names()[0], QUESTIONS[0]), row(names()[0], ("Where " * 20, "here")))
    features = image_features(tiny_model, batch)
    monkeypatch.setattr(type(tiny_model.config), "context_length", 40)
    with pytest.raises(ContextLengthError, match="the context of this model is 40"):
        score_rows_of_one_image(tiny_model, batch, features)
