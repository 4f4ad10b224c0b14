"""AVG-LLaVA inside the stock lmms-eval: the models `avg_llava` and `avg_llava_hf`, local tasks, and a command that fails when a run fails.

The harness finds the models through the entry point `lmms_eval.models` of this package; nothing of the harness is copied or changed.

====================  ====================================================================================
``model.py``          the harness's view: `generate_until`, `loglikelihood`, processes
``hf.py``             the harness's own `llava_hf`, which then loads native folders too
``arguments.py``      what may stand in ``--model_args``
``generation.py``     a task's generation settings as `llava.inference.Options`
``asking.py``         batches, failures by sample, counts; knows nothing of the harness
``processes.py``      what the processes of a run know of each other's failures
``sample_log.py``     one line per sample: granularity, logits, visual tokens, milliseconds
``saved.py``          whether the harness's results are on the disk, whole
``local_tasks.py``    what the local tasks share: images, questions, scores, averages
``own_questions.py``  one's own file of questions, read and checked before anything is asked
``tasks/``            ``playground``, ``easy_vqa``, and ``my_questions`` to copy for one's own file
====================  ====================================================================================
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

TASKS = Path(__file__).resolve().parent / "tasks"
"""The folder to give as `--include_path`."""


def manifest() -> Any:
    """What the harness reads from the entry point: where each model's class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    ours = ModelManifest(model_id="avg_llava", simple_class_path="avg_llava_lmms_eval.model.AvgLlava")
    stock = {"simple_class_path": "avg_llava_lmms_eval.hf.LlavaHf", "chat_class_path": "avg_llava_lmms_eval.hf.LlavaHfChat"}
    return [ours, ModelManifest(model_id="avg_llava_hf", **stock)]
