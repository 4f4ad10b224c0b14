"""Where the endpoints are that OpenAI, vLLM and LLaVA define."""

from __future__ import annotations

CHAT_PATH = "/v1/chat/completions"
COMPLETIONS_PATH = "/v1/completions"
RESPONSES_PATH = "/v1/responses"
TOKENIZE_PATH = "/tokenize"
DETOKENIZE_PATH = "/detokenize"
WORKER_PATH = "/worker_generate_stream"
STATUS_PATH = "/worker_get_status"
