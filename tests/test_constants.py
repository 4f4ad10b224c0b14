"""The values that checkpoints and other programs rely on."""

from __future__ import annotations

import subprocess
import sys

from llava import constants


def test_values_are_those_of_published_checkpoints() -> None:
    assert constants.IGNORE_INDEX == -100
    assert constants.IMAGE_TOKEN_INDEX == -200
    assert constants.DEFAULT_IMAGE_TOKEN == "<image>"
    assert constants.DEFAULT_IMAGE_PATCH_TOKEN == "<im_patch>"
    assert (constants.DEFAULT_IM_START_TOKEN, constants.DEFAULT_IM_END_TOKEN) == ("<im_start>", "<im_end>")
    assert constants.IMAGE_PLACEHOLDER == "<image-placeholder>"
    assert constants.CONTROLLER_HEART_BEAT_EXPIRATION == 30
    assert constants.WORKER_HEART_BEAT_INTERVAL == 15
    assert constants.LOGDIR == "."


def test_importing_the_package_does_not_load_torch() -> None:
    code = "import sys, llava, llava.constants; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
