"""The manifests in deploy/kubernetes are valid, and refer only to existing things."""

from __future__ import annotations

import argparse
import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkout import ROOT

from turret.fleet.config import REFUSED, ClusterConfig, FleetConfig
from turret.fleet.serving.ingress import ingress_environment
from turret.server.api.admin import Adapters
from turret.server.api.faults import Failures
from turret.server.api.gate import ServingGate
from turret.server.api.inference import Inference
from turret.server.basics.settings import SettingsError
from turret.server.cli import build_parser
from turret.server.command.flags import Settings, read_file, read_settings
from turret.server.config import Config
from turret.server.http.endpoint import INFERENCE
from turret.server.http.server import routes
from turret.server.metrics import Metrics

FOLDER = ROOT / "deploy" / "kubernetes"
MANIFESTS = sorted(FOLDER.glob("*.yaml"))
VERSION = "1.33"
# Kinds that other projects define; only their pods are checked.
FOREIGN = {
    *("RayService", "PodMonitor", "Gateway", "GRPCRoute", "HTTPRoute", "BackendTrafficPolicy"),
}


def documents(path: Path) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all(path.read_text()) if each is not None]


def find(kind: str, path: Path) -> dict[str, Any]:
    (found,) = [each for each in documents(path) if each["kind"] == kind]
    return found


def pod_templates(document: Any) -> list[dict[str, Any]]:
    """Every pod template in a document, at any depth."""
    if isinstance(document, list):
        return [found for part in document for found in pod_templates(part)]
    if not isinstance(document, dict):
        return []
    if "containers" in document.get("spec", {}) and "metadata" in document:
        return [document]
    return [found for part in document.values() for found in pod_templates(part)]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_are_valid(path: Path) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    for document in documents(path):
        if document["kind"] not in FOREIGN:
            validate(document, VERSION, strict=True)
        for template in pod_templates(document):
            pod = {"apiVersion": "v1", "kind": "Pod", **template}
            pod["metadata"] = {**pod["metadata"], "name": "pod"}
            validate(pod, VERSION, strict=True)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_pods_are_confined(path: Path) -> None:
    for template in (t for d in documents(path) for t in pod_templates(d)):
        security = template["spec"]["securityContext"]
        assert security["runAsNonRoot"]
        assert f"USER {security['runAsUser']}" in (ROOT / "Dockerfile").read_text()
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        before = template["spec"].get("initContainers", [])
        for container in (*before, *template["spec"]["containers"]):
            confined = container["securityContext"]
            assert confined["allowPrivilegeEscalation"] is False
            assert confined["capabilities"] == {"drop": ["ALL"]}


def test_the_fleets_variables_make_a_configuration() -> None:
    data = find("ConfigMap", FOLDER / "rayservice.yaml")["data"]
    mine = {name: value for name, value in data.items() if name.startswith("TURRET_")}
    config = read_settings(argparse.Namespace(), mine, ClusterConfig).config()
    assert config.listen.address == "0.0.0.0:50051"
    assert data["RAY_AUTH_MODE"] == "token"
    ingress = ingress_environment(Path("/tmp/turret-ingress"))
    assert {name: data.get(name) for name in ingress} == ingress


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("TLS_CERT", "c"),
        ("TLS_CLIENT_CA", "c"),
        ("ADMIN_ADDRESS", "10.0.0.1:1"),
        ("PRELOAD", "a=a"),
    ],
)
def test_variables_that_a_fleet_cannot_honour_are_refused(variable: str, value: str) -> None:
    """A replica must not serve in plain text if a key is configured, even without the command."""
    data = find("ConfigMap", FOLDER / "rayservice.yaml")["data"]
    mine = {name: text for name, text in data.items() if name.startswith("TURRET_")}
    mine |= {"TURRET_TLS_KEY": "k", "TURRET_TLS_CERT": "c"} if "TLS" in variable else {}
    mine[f"TURRET_{variable}"] = value
    with pytest.raises(SettingsError) as refused:
        read_settings(argparse.Namespace(), mine, ClusterConfig).config()
    assert REFUSED[variable.lower()].reason in {text.reason for _, text in refused.value.violations}


def test_each_replicas_metrics_can_be_read() -> None:
    path = FOLDER / "rayservice.yaml"
    (worker,) = find("RayService", path)["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = worker["template"]["spec"]["containers"]
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    (endpoint,) = find("PodMonitor", path)["spec"]["podMetricsEndpoints"]
    # The head has no metrics.
    selected = find("PodMonitor", path)["spec"]["selector"]["matchLabels"]
    assert selected["ray.io/node-type"] == "worker"
    address = find("ConfigMap", path)["data"]["TURRET_METRICS_ADDRESS"]
    assert address.endswith(f":{ports[endpoint['port']]}")
    (_, _, metrics) = find("NetworkPolicy", path)["spec"]["ingress"]
    assert metrics["ports"] == [{"port": ports[endpoint["port"]], "protocol": "TCP"}]


def test_what_a_manifest_asks_for_is_made() -> None:
    """Volumes and secrets are in the file, or in the commands at its top."""
    for path in MANIFESTS:
        text = path.read_text()
        claims = set(re.findall(r"claimName: ([\w-]+)", text))
        made = {
            each["metadata"]["name"]
            for each in documents(path)
            if each["kind"] == "PersistentVolumeClaim"
        }
        assert claims <= made
        secrets = set(re.findall(r"secretName: ([\w-]+)", text))
        secrets |= set(re.findall(r"credentials: \{name: ([\w-]+)", text))
        secrets |= set(re.findall(r"secretKeyRef: \{name: ([\w-]+)", text))
        secrets |= set(re.findall(r"kind: Secret, name: ([\w-]+)", text))
        commands = re.findall(r"^#   kubectl create secret \w+ ([\w-]+)", text, re.MULTILINE)
        assert secrets <= set(commands), path.name


def test_the_gateway_leads_to_what_tokens_of_inference_may_ask_for() -> None:
    path = FOLDER / "envoy-gateway.yaml"
    (rule,) = find("HTTPRoute", path)["spec"]["rules"]
    led = [match["path"]["value"] for match in rule["matches"]]
    served = routes(
        Inference(ServingGate()),
        Adapters(ServingGate()),
        metrics=Metrics(),
        failures=Failures(),
        has_admin=True,
    )
    paths = [route.path for route in served if route.service == INFERENCE]
    assert len(paths) >= 11
    assert [each for each in paths if not each.startswith(tuple(led))] == []
    # Envoy can ask for gRPC's health where the server speaks HTTP/2 alone.
    checks = {
        target["kind"]: policy["spec"]["healthCheck"]["active"]["type"]
        for policy in documents(path)
        if policy["kind"] == "BackendTrafficPolicy"
        for target in policy["spec"]["targetRefs"]
    }
    assert checks == {"GRPCRoute": "GRPC", "HTTPRoute": "HTTP"}


def test_the_serve_config_names_things_that_exist() -> None:
    service = find("RayService", FOLDER / "rayservice.yaml")
    serve = yaml.safe_load(service["spec"]["serveConfigV2"])
    for name in serve["grpc_options"]["grpc_servicer_functions"]:
        module, _, function = name.rpartition(".")
        assert callable(getattr(importlib.import_module(module), function))
    (application,) = serve["applications"]
    FleetConfig(**application["args"])
    module, _, name = application["import_path"].partition(":")
    path = ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
    assert f"def {name}(" in path.read_text()
    schema = pytest.importorskip("ray.serve.schema")
    schema.ServeDeploySchema(**serve)


def test_the_single_servers_file_makes_a_configuration(tmp_path: Path) -> None:
    data = find("ConfigMap", FOLDER / "statefulset.yaml")["data"]["turret.toml"]
    path = tmp_path / "turret.toml"
    path.write_text(data)
    config = Settings(Config, (read_file(path),)).config()
    assert config.listen.http_address == "0.0.0.0:8000"
    container = find("StatefulSet", FOLDER / "statefulset.yaml")["spec"]["template"]["spec"]
    (server,) = container["containers"]
    assert build_parser("serve").parse_args(server["args"]).config
    grace = container["terminationGracePeriodSeconds"]
    assert grace > config.lifecycle.grace_seconds
    ports = {each["name"]: each["containerPort"] for each in server["ports"]}
    for name, address in (
        ("grpc", config.listen.address),
        ("http", config.listen.http_address),
        ("metrics", config.listen.metrics_address),
    ):
        assert address is not None
        assert address.endswith(f":{ports[name]}")


def test_routers_read_series_that_exist() -> None:
    text = find("ConfigMap", FOLDER / "llm-d.yaml")["data"]["config.yaml"]
    asked = set(re.findall(r"turret_\w+", text))
    assert asked <= {family.name for family in Metrics().registry.collect()}
    assert len(asked) == 3
    assert json.dumps(yaml.safe_load(text))


def test_the_header_is_the_clients() -> None:
    from turret.clients.calls.settings import ROUTING_KEY

    policies = documents(FOLDER / "envoy-gateway.yaml")
    hashed = [each["spec"]["loadBalancer"] for each in policies if "Backend" in each["kind"]]
    assert [each["consistentHash"]["header"]["name"] for each in hashed] == [ROUTING_KEY] * 2
    assert (
        f"hdr({ROUTING_KEY})" in ingress_environment(Path())["RAY_SERVE_HAPROXY_BALANCE_ALGORITHM"]
    )
