"""The one path from pictures and a question to an answer, a stream and a report."""

from __future__ import annotations

import random
import threading
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from llava import inference
from llava.conversation import conv_templates
from llava.generation import StopAtText, StopBeamsAtText
from llava.inference import (
    MICRO_MODEL,
    Answer,
    Assistant,
    Message,
    Options,
    Question,
    cached_assistant,
    write_prompt,
)
from llava.messages import RoutingRequest
from llava.text_stream import TextStream, cut_at_stop

QUESTION = "What is written on the sign?"
SHORT = Options(max_new_tokens=6)


@pytest.fixture(scope="module")
def assistant(oracle):
    return Assistant.load(str(oracle / "checkpoint"), device="cpu")


@pytest.fixture(scope="module")
def picture(oracle):
    return Image.open(oracle / "images" / "wide.png").convert("RGB")


@pytest.fixture(scope="module")
def micro():
    return Assistant.load(device="cpu")


@pytest.fixture(scope="module")
def scene():
    return Image.open(MICRO_MODEL.parent / "images" / "scene_beige.png").convert("RGB")


def test_the_prompt_follows_the_template():
    prompt = write_prompt([Message("user", "Hi?")], 1, "v1")
    assert prompt.endswith("questions. USER: <image>\nHi? ASSISTANT:")
    turns = [Message("user", "One <image-placeholder>?"), Message("assistant", "Yes."), Message("user", "And?")]
    assert write_prompt(turns, 1, "v1").endswith("USER: One <image>? ASSISTANT: Yes.</s>USER: And? ASSISTANT:")
    assert write_prompt([Message("user", "Both?")], 2, "v1").count("<image>\n") == 2
    assert "<im_start><image><im_end>\nHi?" in write_prompt([Message("user", "Hi?")], 1, "v1", use_start_end=True)


@pytest.mark.parametrize("template", sorted(set(conv_templates) - {"plain", "v0_plain"}))
def test_images_behind_the_words_are_written_in_front_of_them(template):
    first = [Message("user", "<image>\nBoth?"), Message("assistant", "No."), Message("user", "<image>\n<image>\nAnd these?")]
    behind = [Message("user", "Both? <image>"), Message("assistant", "No."), Message("user", "And these?\n<image><image-placeholder>")]
    for framed in (False, True):
        assert write_prompt(behind, 3, template, framed) == write_prompt(first, 3, template, framed)


@pytest.mark.parametrize(("question", "answer"), [("Which number does the sign show?", "558"), ("What is the background colour?", "pink")])
def test_the_answer_is_the_same_whichever_order(micro, question, answer):
    image = Image.open(MICRO_MODEL.parent / "images" / "scene_pink.png").convert("RGB")
    for text in (question, f"<image>\n{question}", f"{question}\n<image>", f"{question} <image>"):
        assert micro.answer([image], text).text == answer
    earlier = [Message("user", "What is the background colour? <image>"), Message("assistant", "pink"), Message("user", question)]
    assert micro.answer([image], earlier).text == answer


@pytest.mark.parametrize(
    "turns",
    [
        ["u:Look at this. <image>", "u:Q"],
        ["u:Q", "a:", "u:Q"],
        ["s:", "a:Hello, what can I do for you?", "u:", "u:Q <image>"],
        ["u:Q", "a:\n", "u: "],
    ],
)
@pytest.mark.parametrize(("question", "answer"), [("Which number does the sign show?", "558"), ("What is the background colour?", "pink")])
def test_conversations_as_clients_keep_them_are_answered(micro, turns, question, answer):
    image = Image.open(MICRO_MODEL.parent / "images" / "scene_pink.png").convert("RGB")
    roles = {"s": "system", "u": "user", "a": "assistant"}
    assert micro.answer([image], [Message(roles[turn[0]], turn[2:].replace("Q", question)) for turn in turns]).text == answer


def test_an_image_needs_no_words(micro, scene):
    for messages in ("", "<image>", [Message("user", "\n")]):
        assert micro.answer([scene], messages, Options(max_new_tokens=2)).reports[0].num_visual_tokens > 0
    with pytest.raises(ValueError, match="Turn 0 is empty"):
        micro.answer([], "")


def test_a_system_turn_replaces_the_templates_text():
    turns = [Message("system", "Be brief."), Message("user", "Hi?")]
    assert write_prompt(turns, 1, "v1") == "Be brief. USER: <image>\nHi? ASSISTANT:"
    assert write_prompt(turns, 0, "chatml_direct").startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert write_prompt(turns, 0, "llava_llama_3").startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.")
    assert "Answer the questions." in write_prompt(turns[1:], 0, "chatml_direct")


def test_a_prompt_may_hold_the_beginning_of_the_answer():
    assert write_prompt([Message("user", "Hi?")], 0, "v1", answer="Hi").endswith("USER: Hi? ASSISTANT: Hi")


@pytest.mark.parametrize(
    ("messages", "count", "message"),
    [
        ([Message("system", "<image>"), Message("user", "a")], 1, "put images into the user's turns"),
        ([Message("human", "a")], 0, "role 'human', expected one of system, user, assistant"),
        ([Message("user", "  ")], 0, "Turn 0 is empty"),
        ([Message("user", "a"), Message("assistant", "b"), Message("user", "")], 1, "Turn 2 is empty"),
        ([Message("user", "<image> <image> same?")], 1, "holds 2 <image> placeholders, but 1 images"),
        ([Message("user", "<image> what?")], 0, "holds 1 <image> placeholders, but 0 images"),
        ([Message("system", "a"), Message("assistant", "b")], 1, "no turn of the user's"),
        ([], 0, "no turn of the user's"),
    ],
)
def test_prompts_that_cannot_be_written(messages, count, message):
    with pytest.raises(ValueError, match=message):
        write_prompt(messages, count, "v1")


def test_all_impossible_options_are_named_at_once():
    with pytest.raises(ValueError, match="temperature is -1.*top_p is 2.*num_beams is 0.*max_new_tokens is 0"):
        Options(temperature=-1, top_p=2, num_beams=0, max_new_tokens=0)
    with pytest.raises(ValueError, match="exclude each other"):
        Options(num_beams=2, temperature=0.5)


def test_an_answer_says_what_it_cost(assistant, picture):
    answer = assistant.answer([picture], QUESTION, SHORT)
    report = answer.reports[0]
    assert report.num_visual_tokens == report.tokens_per_level[report.granularity] < answer.prompt_tokens
    assert set(answer.milliseconds) == {"views", "vision", "router", "splice", "prefill", "decode", "ttft"}
    parts = sum(value for part, value in answer.milliseconds.items() if part not in ("decode", "ttft"))
    assert answer.milliseconds["ttft"] == pytest.approx(parts)
    assert (answer.finish_reason == "length") == (len(answer.token_ids) == 6)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_gives_the_same_answer_in_pieces(assistant, picture, temperature):
    options = Options(max_new_tokens=12, temperature=temperature, seed=3)
    whole = assistant.answer([picture], QUESTION, options)
    stream = assistant.stream([picture], QUESTION, options)
    with pytest.raises(RuntimeError, match="not been read to its end"):
        _ = stream.answer
    pieces = list(stream)
    assert "".join(pieces) == whole.text and len(pieces) > 1 and all(pieces)
    assert stream.answer.token_ids == whole.token_ids
    with pytest.raises(RuntimeError, match="ask again for another"):
        next(iter(stream))


def test_a_seed_repeats_and_leaves_the_callers_generator_alone(assistant, picture):
    options = Options(max_new_tokens=8, temperature=2.0, seed=5)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = assistant.answer([picture], QUESTION, options).token_ids
    assert torch.equal(torch.get_rng_state(), before)
    assert assistant.answer([picture], QUESTION, options).token_ids == first
    assert assistant.answer([picture], QUESTION, Options(max_new_tokens=8, temperature=2.0, seed=6)).token_ids != first


def test_an_error_in_a_stream_reaches_its_reader_and_a_closed_stream_stops(assistant, picture):
    with pytest.raises(ValueError, match="placeholders"):
        list(assistant.stream([picture], "<image> <image>?", SHORT))
    with pytest.raises(ValueError, match="beams cannot be streamed"):
        assistant.stream([picture], QUESTION, Options(num_beams=2))
    stream = assistant.stream([picture], QUESTION, Options(max_new_tokens=400))
    pieces = iter(stream)
    next(pieces)
    pieces.close()
    assert len(stream.answer.token_ids) < 400


def test_a_stream_that_is_dropped_ends_its_generation(assistant, picture):
    before = threading.active_count()
    for _ in assistant.stream([picture], QUESTION, Options(max_new_tokens=400)):
        break
    assert threading.active_count() == before


@pytest.mark.parametrize("stop", ["white", "k w", " ", "e", "\n"])
def test_a_stream_never_shows_a_stop_text(micro, scene, stop):
    question, options = "Name the pole colours from top to bottom.", Options(max_new_tokens=12, min_new_tokens=8, stop=(stop,))
    whole = micro.answer([scene], question, options)
    stream = micro.stream([scene], question, options)
    assert "".join(stream) == stream.answer.text == whole.text and stop not in whole.text
    assert (stream.answer.token_ids, stream.answer.finish_reason) == (whole.token_ids, whole.finish_reason)


@pytest.fixture
def say(assistant, monkeypatch):
    """Let the model write given ids, as far as the stopping criteria let it; then stream them."""

    def stream(ids, *stop):
        def generate(stopping_criteria, **_):
            for count in range(1, len(ids) + 1):
                if bool(stopping_criteria(torch.tensor([ids[:count]]), None)):
                    break
            return torch.tensor([ids[:count]])

        monkeypatch.setattr(assistant.model, "generate", generate)
        return assistant.stream([], "Hi?", Options(stop=stop))

    return stream


@pytest.mark.parametrize(("stop", "text"), [((), "é→🙂 好 ### end"), (("###",), "é→🙂 好"), (("→🙂",), "é"), (("🙂 好 #", "nd"), "é→")])
def test_characters_and_stop_texts_of_several_tokens_come_whole_or_not_at_all(assistant, say, stop, text):
    tokenizer = assistant.tokenizer
    ids = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "é→🙂 好 ### end".encode()]
    stream = say(ids, *stop)
    pieces = list(stream)
    assert "".join(pieces) == stream.answer.text == text and "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert len(stream.answer.token_ids) < len(ids) or not stop
    ids = tokenizer("one two ### three", add_special_tokens=False).input_ids
    stream = say(ids, "##")
    assert "".join(stream) == stream.answer.text == "one two"


@pytest.mark.parametrize("seed", range(30))
def test_stop_texts_end_rows_where_decoding_them_whole_would(assistant, seed):
    """Rows of random ids, special ones and bytes among them, each against the plain way."""
    source = random.Random(seed)
    tokenizer, stop = assistant.tokenizer, source.sample(["e", "th", "a b", "to be", "\n", "é", "ing the", ". "], 2)
    vocabulary = source.choice([range(len(tokenizer)), range(3, 259), range(259, len(tokenizer))])
    rows = torch.tensor([[source.choice(vocabulary) for _ in range(60)] for _ in range(3)])
    texts = [TextStream(tokenizer, stop) for _ in rows]
    criterion, plain, over = StopAtText(texts, [], None), StopBeamsAtText(tokenizer, stop), torch.zeros(3, dtype=torch.bool)
    for count in range(1, 61):
        over |= plain(rows[:, :count], None)
        assert torch.equal(criterion(rows[:, :count], None), over)


def test_the_cost_of_stop_texts_grows_with_the_answer_and_not_with_its_square(assistant):
    decoded = []
    tokenizer = SimpleNamespace(
        decode=lambda ids, **options: decoded.append(len(ids)) or assistant.tokenizer.decode(ids, **options),
        convert_ids_to_tokens=assistant.tokenizer.convert_ids_to_tokens,
    )
    ids = assistant.tokenizer("one two three four " * 60, add_special_tokens=False).input_ids
    criterion = StopAtText([TextStream(tokenizer, ["never"])], [], None)
    for count in range(1, len(ids) + 1):
        criterion(torch.tensor([ids[:count]]), None)
    assert sum(decoded) < 10 * len(ids)


def test_the_caller_has_the_last_word_on_cost(assistant, picture):
    fixed = assistant.answer([picture], QUESTION, Options(max_new_tokens=2, routing=RoutingRequest(36)))
    assert fixed.reports[0].granularity == 36
    cheap = assistant.answer([picture], QUESTION, Options(max_new_tokens=2, routing=RoutingRequest(max_visual_tokens=60)))
    assert cheap.reports[0].num_visual_tokens <= 60


def test_a_prompt_that_fills_the_context_is_refused_and_an_answer_ends_at_it(assistant, monkeypatch):
    length = assistant.answer([], QUESTION, SHORT).prompt_tokens
    monkeypatch.setattr(assistant.model.config, "max_position_embeddings", length)
    with pytest.raises(ValueError, match=f"takes all {length} positions"):
        assistant.answer([], QUESTION, SHORT)
    monkeypatch.setattr(assistant.model.config, "max_position_embeddings", length + 2)
    answer = assistant.answer([], QUESTION, Options(max_new_tokens=50))
    assert (len(answer.token_ids), answer.finish_reason) == (2, "length")


def test_text_is_cut_at_the_first_stop():
    assert cut_at_stop("yes. ### no END", ["END", "###"]) == ("yes. ", True)
    assert cut_at_stop("yes", ["###"]) == ("yes", False)


def test_a_stop_text_ends_the_answer(assistant, picture):
    whole = assistant.answer([picture], QUESTION, Options(max_new_tokens=12)).text
    marker = whole[3:5]
    answer = assistant.answer([picture], QUESTION, Options(max_new_tokens=12, stop=(marker,)))
    assert answer.text == whole[: whole.index(marker)].strip() and answer.finish_reason == "stop"


def test_a_model_is_loaded_once_per_process(oracle):
    first = cached_assistant(str(oracle / "checkpoint"), None, device="cpu")
    assert cached_assistant(str(oracle / "checkpoint"), None, device="cpu") is first


def test_without_the_repository_around_it_a_model_must_be_named(monkeypatch, tmp_path):
    monkeypatch.setattr(inference, "MICRO_MODEL", tmp_path / "gone")
    with pytest.raises(ValueError, match="give a model path"):
        Assistant.load()


def test_answers_are_plain_data():
    assert Answer("a", [1], "stop", 3, [], {}) == Answer("a", [1], "stop", 3, [], {})


# ---- batches ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(oracle):
    """Questions of every kind: portrait, landscape, small, two pictures, none, and a shared picture."""
    paths = sorted((oracle / "images").glob("*.png"))
    pictures = [Image.open(path).convert("RGB") for path in paths[:4]]
    questions = [Question([picture], f"What is in picture {index}?") for index, picture in enumerate(pictures)]
    return [*questions, Question(pictures[:2], "Same?"), Question([], "Who are you?"), Question([pictures[0]], "And its colour?")]


BATCH_OPTIONS = [Options(max_new_tokens=40), Options(max_new_tokens=6, stop=("a", "e")), Options(max_new_tokens=6, num_beams=2)]


@pytest.mark.parametrize("options", BATCH_OPTIONS, ids=["to the end", "stop texts", "beams"])
def test_a_batch_answers_like_its_questions_one_by_one(assistant, mixed, options):
    alone = [assistant.answer(question.images, question.messages, options) for question in mixed]
    together = assistant.answer_batch(mixed, options)
    for one, other in zip(alone, together, strict=True):
        assert (one.text, one.token_ids, one.finish_reason) == (other.text, other.token_ids, other.finish_reason)
        assert [report.granularity for report in one.reports] == [report.granularity for report in other.reports]
        assert one.prompt_tokens == other.prompt_tokens
    assert assistant.answer_batch([]) == []


def test_rows_of_a_batch_end_each_at_its_own_end(micro, scene):
    asked = ["Which number does the sign show?", "Which colour is behind everything?", "Is it day or night?"]
    together = micro.answer_batch([Question([scene], question) for question in asked])
    assert [answer.text for answer in together] == [micro.answer([scene], question).text for question in asked]
    assert len({len(answer.token_ids) for answer in together}) > 1
    assert {answer.finish_reason for answer in together} == {"stop"}


def test_a_batch_encodes_a_shared_picture_once(assistant, mixed, monkeypatch):
    seen = []
    original = assistant.model.encode_images
    monkeypatch.setattr(assistant.model, "encode_images", lambda views: seen.append(len(views)) or original(views))
    picture = mixed[0].images[0]
    assistant.answer_batch([Question([picture], "One?"), Question([picture], "Two?")], SHORT)
    assert seen == [len(assistant.image_input(picture).views)]


def test_the_likelihood_of_the_greedy_answer_is_what_generation_saw(micro, scene):
    question = Question([scene], "Which number does the sign show?")
    answer = micro.answer(question.images, question.messages)
    one, other = micro.log_likelihoods([question] * 2, [answer.text, "blue"])
    assert one.is_greedy and not other.is_greedy
    assert one.num_tokens == len(answer.token_ids) - 1  # without the end
    assert other.log_probability < one.log_probability < 0
    alone = micro.log_likelihoods([question], ["blue"])[0]
    assert alone.log_probability == pytest.approx(other.log_probability, abs=1e-4)


def test_the_router_does_not_see_the_candidate_answers(assistant, picture):
    candidates = ["yes", "no", "a long answer about many things", "17"]
    scored = assistant.log_likelihoods([Question([picture], QUESTION)] * 4, candidates)
    asked = assistant.answer([picture], QUESTION, SHORT)
    for likelihood in scored:
        assert torch.allclose(likelihood.reports[0].logits, asked.reports[0].logits, atol=1e-5)


@pytest.mark.parametrize("template", sorted(set(conv_templates) - {"plain", "v0_plain"}))
@pytest.mark.parametrize("answer", ["s", "d", "/", "|", "e", "end", "Received.", "yes"])
def test_the_beginning_of_an_answer_is_not_found_in_the_templates_own_marks(template, answer):
    turns = [Message("user", "Is it yes?")]
    opened = write_prompt(turns, 0, template)
    begun = write_prompt(turns, 0, template, answer=answer)
    assert begun.startswith(opened.rstrip())
    assert begun[len(opened.rstrip()) :].strip() == answer


@pytest.mark.parametrize("stop", [" no", "n", " ", "o t"])
def test_a_stop_text_ends_an_answer_whatever_tokens_it_is_made_of(micro, scene, stop):
    options = Options(max_new_tokens=12, min_new_tokens=8, stop=(stop,))
    answer = micro.answer([scene], "Name the pole colours from top to bottom.", options)
    whole = micro.answer([scene], "Name the pole colours from top to bottom.", Options(max_new_tokens=12, min_new_tokens=8))
    expected, stopped = cut_at_stop(micro.tokenizer.decode(whole.token_ids, skip_special_tokens=True), [stop])
    assert answer.text == expected.strip()
    assert (answer.finish_reason == "stop") == (stopped or whole.finish_reason == "stop")
    assert micro.answer_batch([Question([scene], "Name the pole colours from top to bottom.")] * 2, options)[1].text == answer.text


def test_likelihoods_that_cannot_be_had(assistant, picture):
    question = Question([picture], QUESTION)
    with pytest.raises(ValueError, match="A continuation is empty"):
        assistant.log_likelihoods([question], ["  "])
    with pytest.raises(ValueError, match="1 questions came with 2 continuations"):
        assistant.log_likelihoods([question], ["a", "b"])
    with pytest.raises(ValueError, match="the context of this model is"):
        assistant.log_likelihoods([question], ["word " * 5000])
    assert assistant.log_likelihoods([], []) == []


def test_each_row_of_a_batch_is_cut_at_its_own_room(assistant, picture, monkeypatch):
    """Rows are generated for as long as the one with the most room; another one's answer ends where its context does."""
    questions = [Question([picture], QUESTION + " And the rest?" * 20), Question([], "Hi?")]
    options = Options(max_new_tokens=6, min_new_tokens=6)
    long, short = assistant.answer_batch(questions, options)
    assert len(long.token_ids) == len(short.token_ids) == 6 and short.prompt_tokens + 6 < long.prompt_tokens
    context = long.prompt_tokens + 2
    monkeypatch.setattr(Assistant, "_room", lambda self, length: context - length)
    cut, whole = assistant.answer_batch(questions, options)
    assert (cut.token_ids, cut.finish_reason) == (long.token_ids[:2], "length")
    assert whole.token_ids == short.token_ids
