"""What deploy/ holds is valid by its schemas, runs programs and flags that there are, and keeps the language model's port private."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from compose_pydantic import ComposeSpecification
from packaging.specifiers import SpecifierSet

from llava.serve import gradio_web_server, model_worker

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "deploy" / "kubernetes"
KUBERNETES = ("1.30", "1.36")
"""Oldest and newest version that the manifests are checked against."""
PARSERS = {"llava.serve.model_worker": model_worker.build_parser, "llava.serve.gradio_web_server": gradio_web_server.build_parser}


def manifests() -> list[dict[str, Any]]:
    """All objects that kustomization.yaml names."""
    listed = yaml.safe_load((FOLDER / "kustomization.yaml").read_text(encoding="utf-8"))["resources"]
    return [document for name in listed for document in yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8"))]


def of_kind(kind: str) -> dict[str, Any]:
    return {each["metadata"]["name"]: each["spec"] for each in manifests() if each["kind"] == kind}


def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8")))


@pytest.mark.parametrize("version", KUBERNETES)
def test_manifests_are_valid(version: str) -> None:
    for document in manifests():
        kubernetes_validate.validate(document, version, strict=True)


def test_the_validator_finds_a_misspelt_field() -> None:
    (document,) = [each for each in manifests() if each["kind"] == "HorizontalPodAutoscaler"]
    document["spec"]["maxReplica"] = 3
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, KUBERNETES[-1], strict=True)


def test_the_compose_file_is_valid() -> None:
    ComposeSpecification.model_validate(compose())
    with pytest.raises(ValueError, match="comand"):
        ComposeSpecification.model_validate({"services": {"page": {"image": "a", "comand": "b"}}})


def test_every_deployment_has_probes_and_every_replicated_one_a_budget() -> None:
    budgets = of_kind("PodDisruptionBudget")
    for name, spec in of_kind("Deployment").items():
        for container in spec["template"]["spec"]["containers"]:
            assert {"readinessProbe", "livenessProbe"} <= container.keys(), name
        labels = spec["template"]["metadata"]["labels"]
        assert spec["selector"]["matchLabels"] == labels
        assert name == "page" or budgets[name]["selector"]["matchLabels"] == labels


def test_ports_selectors_and_addresses_fit_each_other() -> None:
    deployments, services = of_kind("Deployment"), of_kind("Service")
    assert services.keys() == deployments.keys()
    ports = {}
    for name, spec in deployments.items():
        (container,) = spec["template"]["spec"]["containers"]
        ports[name] = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert services[name]["selector"] == spec["template"]["metadata"]["labels"]
        assert [port["port"] for port in services[name]["ports"]] == list(ports[name].values())
    written = "".join(path.read_text(encoding="utf-8") for path in FOLDER.glob("*.yaml"))
    for host, port in re.findall(r"=http://(\w+):(\d+)", written):
        assert ports[host]["http"] == int(port)


@pytest.mark.parametrize("program", list(PARSERS))
def test_our_programs_take_the_flags_they_are_given(program: str) -> None:
    """A flag that the program does not have would end its container at once."""
    commands = [service["command"] for service in compose()["services"].values()]
    commands += [spec["template"]["spec"]["containers"][0].get("args", []) for spec in of_kind("Deployment").values()]
    found = [command[1:] for command in commands if command and command[0] == program]
    assert len(found) == 2
    for flags in found:
        PARSERS[program]().parse_args(flags)


def test_the_language_models_port_is_private() -> None:
    policies = of_kind("NetworkPolicy")
    assert policies["nothing-else"] == {"podSelector": {}, "policyTypes": ["Ingress"]}  # whatever no other policy allows
    callers = {
        name: [source["podSelector"]["matchLabels"] for rule in policies[name]["ingress"] for source in rule["from"]]
        for name in ("language", "router")
    }
    assert callers == {"language": [{"app": "router"}, {"app.kubernetes.io/name": "prometheus"}], "router": [{"app": "encoder"}]}
    assert not {"NodePort", "LoadBalancer"} & {service.get("type") for service in of_kind("Service").values()}
    language = compose()["services"]["language"]
    assert "ports" not in language and language["networks"] == ["inside", "hub"] and compose()["networks"]["inside"]["internal"]
    # The model is downloaded over a network on which nobody can call it.
    assert [name for name, service in compose()["services"].items() if "hub" in service.get("networks", [])] == ["language"]


def test_autoscaling_reads_the_queue_that_the_adapter_serves() -> None:
    (scaler,) = of_kind("HorizontalPodAutoscaler").values()
    (rule,) = yaml.safe_load((FOLDER / "prometheus-adapter.values.yaml").read_text(encoding="utf-8"))["rules"]["custom"]
    assert scaler["metrics"][0]["pods"]["metric"]["name"] == rule["name"]["as"]
    assert "vllm:num_requests_waiting" in rule["seriesQuery"] and scaler["scaleTargetRef"]["name"] in of_kind("Deployment")


def test_the_image_has_the_vllm_that_the_plug_in_is_for() -> None:
    version = re.search(r"^FROM .*:v([\d.]+)$", (ROOT / "deploy" / "vllm.Containerfile").read_text(encoding="utf-8"), re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]["vllm"]
    assert version is not None and version[1] in SpecifierSet(extras[0].removeprefix("vllm"))
