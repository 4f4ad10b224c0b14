"""What a body may say about the drawing of tokens, and that all of it can be computed with."""

from __future__ import annotations

import pytest
import torch

from llava.serve.api.llava import read_worker_request
from llava.serve.api.openai_chat import read_chat
from llava.serve.engine.sampling import pick
from llava.serve.protocol import Limits, Sampling
from tests.serve.bodies import chat_body, worker_body
from tests.serve.fake_engine import CARD

TINY = (5e-324, 1e-320, 1e-46, 1e-40, 2.0**-126, 1e-37)


def sampling_of(**fields) -> Sampling:
    return read_chat(chat_body(**fields), CARD, Limits()).sampling


@pytest.mark.parametrize("number", TINY)
@pytest.mark.parametrize("protocol", ["openai", "llava"])
def test_tiny_numbers_mean_their_limit(number, protocol):
    """Both lead to the likeliest token alone; none of them breaks the arithmetic."""
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    for fields in ({"temperature": number}, {"temperature": 1.0, "top_p": number}, {"temperature": number, "top_p": number}):
        if protocol == "openai":
            sampling = sampling_of(**fields)
        else:
            sampling = read_worker_request(worker_body("a b", **fields), CARD, Limits()).sampling
        assert [pick(logits, [sampling], [uniform])[0].token for uniform in (0.0, 0.5, 0.999999)] == [1, 1, 1]
