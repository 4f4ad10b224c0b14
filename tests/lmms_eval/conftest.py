"""The plug-in's package on the path, the micro model, and a stand-in for the harness."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from llava.inference import Assistant, micro_model_path

PLUGIN = Path(__file__).resolve().parents[2] / "lmms-eval"
sys.path.insert(0, str(PLUGIN))


@pytest.fixture(scope="session")
def micro() -> Assistant:
    return Assistant.load(micro_model_path(), device="cpu")


class StandInModel:
    """What the harness's base class gives a model, as far as this plug-in leans on it."""

    is_simple = True

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    @property
    def rank(self):
        return self._rank

    def clean(self):
        pass


@dataclass
class StandInInstance:
    request_type: str
    arguments: tuple
    metadata: dict = field(default_factory=dict)
    task_name: str = "task"

    @property
    def args(self):
        return self.arguments


@dataclass
class StandInResult:
    text: str
    token_counts: dict | None = None


@dataclass(frozen=True)
class StandInManifest:
    model_id: str
    simple_class_path: str
    chat_class_path: str | None = None


def parse(text):
    return dict(part.split("=", 1) for part in text.split(",")) if text else {}


@pytest.fixture
def harness(monkeypatch):
    """The plug-in's model module over the stand-in, and what it told the harness's throughput table."""
    told: list[tuple] = []
    contents = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {"Instance": StandInInstance, "GenerationResult": StandInResult},
        "lmms_eval.api.model": {"lmms": StandInModel},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": StandInManifest},
        "lmms_eval.models.model_utils": {},
        "lmms_eval.models.model_utils.gen_metrics": {"log_metrics": lambda *told_now: told.append(told_now)},
        "lmms_eval.utils": {"simple_parse_args_string": parse},
        "loguru": {"logger": SimpleNamespace(info=lambda *_: None, exception=lambda *_: None)},
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "avg_llava_lmms_eval.model", raising=False)
    monkeypatch.setattr(sys, "argv", ["lmms_eval"])
    module = importlib.import_module("avg_llava_lmms_eval.model")
    yield SimpleNamespace(model=module, told=told, instance=StandInInstance, result=StandInResult)
    sys.modules.pop("avg_llava_lmms_eval.model", None)
