"""Token ids and strings that the text side and the image side must agree on, with LLaVA's names and values."""

from __future__ import annotations

from pathlib import Path

CONTROLLER_HEART_BEAT_EXPIRATION = 30
"""Seconds without a heartbeat after which the controller forgets a worker."""
WORKER_HEART_BEAT_INTERVAL = 15
"""LLaVA's value, kept for its callers; workers here follow `HEARTBEAT_SECONDS` of `llava.serve.cluster.registration`."""
LOGDIR = "."
"""Folder for the log files of the services."""

IGNORE_INDEX = -100
"""Label of a position that no loss is computed for."""
IMAGE_TOKEN_INDEX = -200
"""Id that stands for one image in `input_ids`; it is never looked up in the embedding table."""
DEFAULT_IMAGE_TOKEN = "<image>"
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"
DEFAULT_IM_START_TOKEN = "<im_start>"
DEFAULT_IM_END_TOKEN = "<im_end>"
IMAGE_PLACEHOLDER = "<image-placeholder>"
"""What a user may write in a query to say where the image goes; it is replaced by `DEFAULT_IMAGE_TOKEN`."""

MICRO_MODEL = Path(__file__).resolve().parents[1] / "playground" / "avg-llava-micro"
"""The model that ships with the repository and is used where none is given."""
