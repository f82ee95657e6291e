"""The manifests, rendered as `kubectl apply --kustomize` would and held against the schemas and the program.

Kinds of other projects (ServiceMonitor, ScaledObject, InferencePool, HTTPRoute) have no schema here; what they refer to
is checked.
"""

from __future__ import annotations

import functools
import re
import subprocess
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml

from server.cli.main import app
from server.money.pricing import PriceBook
from server.settings import Settings, load_settings
from tests.deploy.kit import DEPLOY, tool
from tests.kit import ROOT

pytestmark = pytest.mark.process

KUBERNETES = DEPLOY / "kubernetes"
FOLDERS = sorted(path.parent for path in KUBERNETES.rglob("kustomization.yaml"))
SERVERS = [folder for folder in FOLDERS if folder.parent.name != "examples"]
VERSIONS = [f"1.{minor}" for minor in range(28, 38)]
NAMES = {"app.kubernetes.io/name": "dsa-serve"}


@functools.cache
def _rendered(folder: Path) -> str:
    kubectl = tool("kubectl", "kubernetes-client")
    run = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def rendered(folder: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(_rendered(folder)))


def one(folder: Path, kind: str) -> dict[str, Any]:
    (found,) = (
        item
        for item in rendered(folder)
        if item["kind"] == kind and item["metadata"]["name"] != "dsa-serve-ranks"
    )
    return found


def template(folder: Path, role: str = "leader") -> dict[str, Any]:
    """The pod template of a folder's server; over many nodes the leader is the server."""
    if folder.name != "many-nodes":
        found: dict[str, Any] = one(folder, "Deployment")["spec"]["template"]
        return found
    group: dict[str, Any] = one(folder, "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
    made: dict[str, Any] = group[f"{role}Template"]
    return made


def pod(folder: Path) -> dict[str, Any]:
    spec: dict[str, Any] = template(folder)["spec"]
    return spec


def container(folder: Path) -> dict[str, Any]:
    (server,) = pod(folder)["containers"]
    assert isinstance(server, dict)
    return server


def commands() -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """Where, arguments of `dsa` and environment of everything in deploy/ that starts the server."""
    for folder in SERVERS:
        server = container(folder)
        yield folder.name, server["args"], {pair["name"]: pair["value"] for pair in server["env"]}
    compose = yaml.safe_load((DEPLOY / "compose.yml").read_text("utf-8"))
    for name, service in compose["services"].items():
        if name.startswith("server"):
            yield name, service["command"], service["environment"]


def filled_in(argument: str) -> str:
    """An argument as the kubelet would pass it, with variables of the LeaderWorkerSet controller."""
    for name, value in {"LWS_GROUP_SIZE": "2", "LWS_LEADER_ADDRESS": "dsa-group-0.dsa-group.default"}.items():
        argument = argument.replace(f"$({name})", value)
    assert "$(" not in argument
    return argument


def parsed(arguments: list[str]) -> dict[str, Any]:
    """The settings that `dsa` would read from its arguments; what it does not know is an error."""
    command, *rest = map(filled_in, arguments)
    assert command == "serve"
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    parameters: dict[str, Any] = serve.make_context("serve", rest).params
    return {name: value for name, value in parameters.items() if name != "config" and value is not None}


def option(arguments: list[str], name: str) -> str:
    return str(parsed(arguments)[name])


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_it_is_valid_in_every_version_that_is_named(folder: Path) -> None:
    assert f"Kubernetes {VERSIONS[0]} to {VERSIONS[-1]}" in " ".join(
        (DEPLOY / "README.md").read_text().split()
    )
    own = [
        item
        for item in rendered(folder)
        if re.fullmatch(r"v1|apps/v1|(policy|networking\.k8s\.io)/v1", item["apiVersion"])
    ]
    assert own or folder not in SERVERS
    for version in VERSIONS:
        for item in own:
            kubernetes_validate.validate(item, version, strict=True)


def test_the_schemas_see_a_mistake() -> None:
    broken = one(KUBERNETES / "base", "Deployment")
    broken["spec"]["template"]["spec"]["containers"][0]["livenessprobe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSIONS[-1], strict=True)


def test_every_flag_and_variable_is_one_of_the_server() -> None:
    found = list(commands())
    assert len(found) == len(SERVERS) + 2
    for where, arguments, environ in found:
        assert load_settings(parsed(arguments), environ) != Settings(), where
        for name in environ:
            assert (
                name in ("HOME", "DSA_CACHE")
                or name.removeprefix("DSA_").lower() in Settings.__struct_fields__
            )


def test_a_flag_that_is_not_there_is_found() -> None:
    with pytest.raises(Exception, match="No such option: --replicas"):
        parsed(["serve", "--replicas", "2"])


@pytest.mark.parametrize("folder", SERVERS, ids=lambda folder: folder.name)
def test_a_drain_fits_the_grace_period(folder: Path) -> None:
    server = container(folder)
    (_, wait) = server["lifecycle"]["preStop"]["exec"]["command"]
    drain = float(option(server["args"], "drain_seconds"))
    # Two seconds for connections, twice five for the engine, five for the last traces, at most.
    assert float(wait) + drain + 17 <= pod(folder)["terminationGracePeriodSeconds"]


def test_a_drain_fits_composes_grace_period() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yml").read_text("utf-8"))["services"]
    for name in ("server-cpu", "server-gpu"):
        drain = float(option(services[name]["command"], "drain_seconds"))
        assert drain + 17 <= seconds(services[name]["stop_grace_period"])


@pytest.mark.parametrize("folder", SERVERS, ids=lambda folder: folder.name)
def test_it_runs_with_few_rights(folder: Path) -> None:
    security, server = pod(folder)["securityContext"], container(folder)
    assert security["runAsNonRoot"] is True
    assert f"--uid {security['runAsUser']} " in (ROOT / "Dockerfile").read_text("utf-8")
    assert server["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
    }  # fmt: skip
    assert pod(folder)["automountServiceAccountToken"] is False
    written = {mount["mountPath"] for mount in server["volumeMounts"]}
    assert {pair["value"] for pair in server["env"]} <= written
    assert server["resources"]["limits"]["memory"]


@pytest.mark.parametrize("folder", SERVERS, ids=lambda folder: folder.name)
def test_everything_points_at_the_same_pods(folder: Path) -> None:
    labels = template(folder)["metadata"]["labels"]
    role = {"dsa-serve/role": "leader"} if folder.name == "many-nodes" else {}
    assert labels == NAMES | role
    assert one(folder, "Service")["spec"]["selector"] == labels
    assert one(folder, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == NAMES
    assert one(folder, "ServiceMonitor")["spec"]["selector"]["matchLabels"] == NAMES
    assert one(folder, "Service")["metadata"]["labels"] == NAMES
    network = one(folder, "NetworkPolicy")["spec"]
    assert network["podSelector"]["matchLabels"] == NAMES
    clients = [peer.get("podSelector") or peer["namespaceSelector"] for peer in network["ingress"][0]["from"]]
    assert all("app.kubernetes.io/name" not in peer["matchLabels"] for peer in clients)
    claims = {
        volume["persistentVolumeClaim"]["claimName"]
        for volume in pod(folder)["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert claims == {
        item["metadata"]["name"] for item in rendered(folder) if item["kind"] == "PersistentVolumeClaim"
    }
    server = container(folder)
    assert str(server["ports"][0]["containerPort"]) == option(server["args"], "port")
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert server[probe]["httpGet"]["port"] == server["ports"][0]["name"]
    (endpoint,) = one(folder, "ServiceMonitor")["spec"]["endpoints"]
    assert endpoint["port"] == one(folder, "Service")["spec"]["ports"][0]["name"]
    routes = {route.rstrip("/") for route in ("/health/live", "/health/ready", "/metrics")}
    assert {
        server[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")
    } | {endpoint["path"]} == routes


def test_the_ledger_is_on_a_disk_of_one_node_and_prices_follow_edits() -> None:
    for folder in SERVERS:
        volumes = {volume["name"]: volume for volume in pod(folder)["volumes"]}
        mounts = {mount["mountPath"]: mount for mount in container(folder)["volumeMounts"]}
        arguments = container(folder)["args"]
        ledger = mounts[str(Path(option(arguments, "ledger")).parent)]
        assert not ledger.get("readOnly")
        volume = volumes[ledger["name"]]
        if folder.name == "autoscaling":  # replicas on several nodes share no SQLite file
            assert "emptyDir" in volume
            assert "persistentVolumeClaim" not in volume
        else:
            (claim,) = (
                item
                for item in rendered(folder)
                if item["kind"] == "PersistentVolumeClaim"
                and item["metadata"]["name"] == volume["persistentVolumeClaim"]["claimName"]
            )
            assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
        table = Path(option(arguments, "prices"))
        mount = mounts[str(table.parent)]
        assert mount["readOnly"] is True
        assert "subPath" not in mount  # the kubelet does not update those
        config = one(folder, "ConfigMap")
        assert volumes[mount["name"]]["configMap"]["name"] == config["metadata"]["name"]
        assert config["data"].keys() == {table.name}


def test_compose_can_write_its_ledger() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yml").read_text("utf-8"))["services"]
    for name in ("server-cpu", "server-gpu"):
        targets = {volume.split(":")[1]: volume for volume in services[name]["volumes"]}
        folder = str(Path(option(services[name]["command"], "ledger")).parent)
        assert not targets[folder].endswith(":ro")
        # A named volume takes its owner from the image's folder.
        (owned,) = re.findall(r"chown dsa (.+)", (ROOT / "Dockerfile").read_text("utf-8"))
        assert folder in owned.split()
        table = Path(option(services[name]["command"], "prices"))
        assert targets[str(table.parent)] == f"./prices:{table.parent}:ro"


def test_the_shipped_price_table_prices_what_is_served() -> None:
    for _, arguments, environ in commands():
        settings = load_settings(parsed(arguments), environ)
        config = settings.server("any")
        machine = None if config.machine_price is None else Decimal(config.machine_price)
        book = PriceBook(DEPLOY / "prices" / "prices.yaml", config.model_name, machine)
        assert book.table.machine_hour > 0


def test_the_gpu_is_asked_for_and_used() -> None:
    for name in ("gpu", "autoscaling"):
        server = container(KUBERNETES / "overlays" / name)
        assert server["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert option(server["args"], "device") == "cuda"


def test_replicas_follow_the_queue() -> None:
    folder = KUBERNETES / "overlays" / "autoscaling"
    scaled, deployment = one(folder, "ScaledObject")["spec"], one(folder, "Deployment")
    assert scaled["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"]
    assert deployment["spec"]["strategy"]["type"] == "RollingUpdate"
    (trigger,) = scaled["triggers"]
    assert trigger["metadata"]["query"] == 'sum(dsa_requests_waiting{job="dsa-serve"})'
    claim = one(folder, "PersistentVolumeClaim")
    assert (claim["metadata"]["name"], claim["spec"]["accessModes"]) == ("dsa-models", ["ReadWriteMany"])


def test_nodes_of_a_group_join_and_are_sized_alike() -> None:
    """LeaderWorkerSet is another project's: what its CRD (v1) requires and allows is held by hand."""
    folder = KUBERNETES / "overlays" / "many-nodes"
    group = one(folder, "LeaderWorkerSet")
    assert group["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
    assert group["spec"].keys() <= {
        "replicas", "leaderWorkerTemplate", "rolloutStrategy", "startupPolicy", "networkConfig"
    }  # fmt: skip
    both = group["spec"]["leaderWorkerTemplate"]
    assert both.keys() == {"size", "restartPolicy", "leaderTemplate", "workerTemplate"}
    assert both["restartPolicy"] in ("RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None")
    assert not any(item["kind"] == "Deployment" for item in rendered(folder))
    # The controller makes a headless Service of the group's name.
    assert group["metadata"]["name"] not in {
        item["metadata"]["name"] for item in rendered(folder) if item["kind"] == "Service"
    }
    leader, worker = (template(folder, role) for role in ("leader", "worker"))
    serving, working = leader["spec"]["containers"][0], worker["spec"]["containers"][0]
    for made in (leader, worker):
        assert made["metadata"]["labels"].items() >= NAMES.items()
        # The schema has no kind for a template alone: a pod is one with a name.
        for version in VERSIONS:
            kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", **made}, version, strict=True)
    for same in ("securityContext", "tolerations", "automountServiceAccountToken"):
        assert leader["spec"][same] == worker["spec"][same]
    assert leader["spec"]["terminationGracePeriodSeconds"] <= worker["spec"]["terminationGracePeriodSeconds"]
    for same in ("image", "securityContext", "env", "resources"):
        assert serving[same] == working[same]
    assert set(group["spec"]) >= {"leaderWorkerTemplate"}
    arguments = serving["args"]
    each = int(serving["resources"]["limits"]["nvidia.com/gpu"])
    assert int(option(arguments, "tensor_parallel")) == both["size"] * each
    assert serving["args"][1] == working["args"][1]
    command = typer.main.get_command(app).commands["worker"]  # type: ignore[attr-defined]
    given = command.make_context("worker", [filled_in(one) for one in working["args"][1:]]).params
    assert given["leader"] == option(arguments, "leader")
    assert f":{serving['ports'][1]['containerPort']}" in given["leader"]
    places = {mount["mountPath"] for mount in working["volumeMounts"]}
    assert places == {"/models", "/tmp", "/dev/shm", "/etc/dsa-node"}
    # Both have the same secret, in a file that others cannot read.
    assert str(given["node_secret_file"]) == option(arguments, "node_secret_file") == "/etc/dsa-node/secret"
    for made in (leader, worker):
        (secret,) = (volume["secret"] for volume in made["spec"]["volumes"] if "secret" in volume)
        assert secret == {"secretName": "dsa-node-secret", "defaultMode": 0o440}
    assert {pair["value"] for pair in working["env"]} <= places
    # Ranks talk to one another on ports that they choose, and nobody else may.
    (ranks,) = (item["spec"] for item in rendered(folder) if item["metadata"]["name"] == "dsa-serve-ranks")
    peers = [{"podSelector": {"matchLabels": NAMES}}]
    assert ranks["podSelector"]["matchLabels"] == NAMES
    assert ranks["ingress"] == [{"from": peers}]
    assert ranks["egress"] == [{"to": peers}]
    outside = one(folder, "NetworkPolicy")["spec"]["ingress"]
    assert [rule["ports"] for rule in outside] == [[{"port": 8000}]]
    claim = next(item for item in rendered(folder) if item["metadata"]["name"] == "dsa-models")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_pool_selects_the_server() -> None:
    folder = KUBERNETES / "examples" / "inference-pool"
    pool, route = one(folder, "InferencePool"), one(folder, "HTTPRoute")
    assert pool["spec"]["selector"]["matchLabels"] == NAMES
    assert pool["spec"]["targetPorts"] == [{"number": 8000}]
    (backend,) = route["spec"]["rules"][0]["backendRefs"]
    assert (backend["kind"], backend["name"]) == ("InferencePool", pool["metadata"]["name"])
    assert pool["apiVersion"].startswith(backend["group"])


def test_what_compose_mounts_is_there() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yml").read_text("utf-8"))["services"]
    mounts = [volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])]
    folders = [mount for mount in mounts if mount.startswith(".")]
    assert len(set(folders)) == 4
    for folder in folders:
        assert any((DEPLOY / folder).iterdir()), folder
    targets = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text("utf-8"))
    (target,) = targets["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target == "server:8000"
    for name in ("server-cpu", "server-gpu"):
        assert services[name]["networks"]["default"]["aliases"] == ["server"]
        assert services[name]["profiles"] == [name.removeprefix("server-")]
