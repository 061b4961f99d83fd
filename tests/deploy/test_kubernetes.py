"""deploy/kubernetes/: rendered by kubectl, checked against Kubernetes' schemas, and consistent."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from deploy_tools import DEPLOY, module, parse_serve, passes, serve_arguments, tool

from vllm_adaspark import ARCHITECTURE, __version__
from vllm_adaspark.methods import settings_class

KUBERNETES = DEPLOY / "kubernetes"
FOLDERS = ("server", "adatp", "multi-node", "monitoring")
VERSIONS = ("1.30", "1.36")  # the oldest and the newest that is checked
# Kinds of operators, which Kubernetes' own schemas do not hold.
CUSTOM = {"LeaderWorkerSet", "PodMonitor", "PrometheusRule"}
KV_HEADS = 8  # of the 72B model that multi-node serves
GROUP = {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "leader"}


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[dict]]:
    """Every folder's objects, by folder."""
    return {
        folder: list(yaml.safe_load_all(passes(tool("kubectl"), "kustomize", KUBERNETES / folder)))
        for folder in FOLDERS
    }


def only(objects: list[dict], kind: str) -> dict:
    (found,) = [item for item in objects if item["kind"] == kind]
    return found


def pods(objects: list[dict]) -> dict[str, dict]:
    """Pod templates by what they are."""
    found = {}
    for item in objects:
        if item["kind"] == "Deployment":
            found["server"] = item["spec"]["template"]
        if item["kind"] == "LeaderWorkerSet":
            group = item["spec"]["leaderWorkerTemplate"]
            found |= {"leader": group["leaderTemplate"], "worker": group["workerTemplate"]}
    return found


def all_pods(rendered) -> dict[str, dict]:
    return pods(rendered["server"]) | pods(rendered["multi-node"])


def container(pod: dict) -> dict:
    (one,) = pod["spec"]["containers"]
    return one


def environment(pod: dict, objects: list[dict]) -> dict[str, str]:
    """What the container gets, secrets as the word "secret"."""
    values = {}
    for entry in container(pod)["env"]:
        source = entry.get("valueFrom", {})
        if "configMapKeyRef" in source:
            reference = source["configMapKeyRef"]
            config_map = only(objects, "ConfigMap")
            assert config_map["metadata"]["name"] == reference["name"]
            values[entry["name"]] = config_map["data"][reference["key"]]
        elif "secretKeyRef" in source:
            values[entry["name"]] = "secret"
        else:
            values[entry["name"]] = entry["value"]
    return values


def budget() -> dict:
    """The PodDisruptionBudget of the replicas, which the chart's own lacks a selector for."""
    return yaml.safe_load((KUBERNETES / "replicas" / "pdb.yaml").read_text())


@pytest.mark.parametrize("version", VERSIONS)
def test_follows_kubernetes_schemas(rendered, version):
    validate = module("kubernetes_validate").validate
    kinds = set()
    for objects in rendered.values():
        for item in objects:
            kinds.add(item["kind"])
            if item["kind"] not in CUSTOM:
                validate(item, version, strict=True)
    validate(budget(), version, strict=True)
    stock = {"Deployment", "Service", "PersistentVolumeClaim", "ConfigMap", "NetworkPolicy"}
    assert kinds >= CUSTOM | stock
    for name, template in all_pods(rendered).items():
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        pod["metadata"] = {**pod["metadata"], "name": name}
        validate(pod, version, strict=True)


def test_the_schema_would_complain(rendered):
    checker = module("kubernetes_validate")
    deployment = json.loads(json.dumps(only(rendered["server"], "Deployment")))
    container(deployment["spec"]["template"])["startupProb"] = {}
    with pytest.raises(checker.ValidationError):
        checker.validate(deployment, VERSIONS[-1], strict=True)


def test_fits_any_namespace(rendered):
    for objects in rendered.values():
        assert not any("namespace" in item["metadata"] for item in objects)


@pytest.mark.parametrize("folder", ["server", "multi-node"])
def test_services_reach_the_pods_that_answer_and_no_others(rendered, folder):
    service = only(rendered[folder], "Service")
    wanted = service["spec"]["selector"].items()
    reached = [pod for pod in all_pods(rendered).values() if wanted <= labels(pod).items()]
    assert len(reached) == 1
    target = service["spec"]["ports"][0]["targetPort"]
    assert target in [port["name"] for port in container(reached[0])["ports"]]


def labels(pod: dict) -> dict[str, str]:
    return pod["metadata"]["labels"]


def test_monitor_scrapes_every_pod_that_answers(rendered):
    monitor = only(rendered["monitoring"], "PodMonitor")["spec"]
    wanted = monitor["selector"]["matchLabels"].items()
    found = {name for name, pod in all_pods(rendered).items() if wanted <= labels(pod).items()}
    assert found == {"server", "leader"}
    assert [end["port"] for end in monitor["podMetricsEndpoints"]] == ["http"]


@pytest.mark.parametrize("folder", ["server", "multi-node"])
def test_pods_are_reached_on_their_http_port_by_those_who_may(rendered, folder):
    """/metrics and /health ask for no key."""
    policy = only(rendered[folder], "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    mine = policy["podSelector"]["matchLabels"].items()
    held = {name for name, pod in all_pods(rendered).items() if mine <= labels(pod).items()}
    assert held == set(pods(rendered[folder]))
    *among, outside = policy["ingress"]
    assert outside["ports"] == [{"port": "http"}]
    assert {"podSelector": {}} in outside["from"]
    assert all(peer.get("namespaceSelector") != {} for peer in outside["from"])
    # The ranks of a group reach each other, and only each other, on every port.
    assert among == ([{"from": [{"podSelector": policy["podSelector"]}]}] if len(held) > 1 else [])


def test_deployment_selects_its_own_pods_and_claims_a_volume_that_exists(rendered):
    deployment = only(rendered["server"], "Deployment")["spec"]
    assert deployment["selector"]["matchLabels"].items() <= labels(deployment["template"]).items()
    claim = only(rendered["server"], "PersistentVolumeClaim")["metadata"]["name"]
    volumes = deployment["template"]["spec"]["volumes"]
    assert {"name": "cache", "persistentVolumeClaim": {"claimName": claim}} in volumes


def test_pods_are_confined_and_share_memory(rendered):
    for name, pod in all_pods(rendered).items():
        spec, one = pod["spec"], container(pod)
        assert spec["securityContext"]["runAsNonRoot"], name
        assert spec["automountServiceAccountToken"] is False, name
        assert one["securityContext"]["allowPrivilegeEscalation"] is False, name
        assert one["image"] == f"vllm-adaspark:{__version__}", name
        gpus = one["resources"]["requests"]["nvidia.com/gpu"]
        assert one["resources"]["limits"]["nvidia.com/gpu"] == gpus, name
        mounts = {mount["mountPath"]: mount["name"] for mount in one["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory", name
        # `make image-test` sees that the server writes nowhere else.
        assert one["securityContext"]["readOnlyRootFilesystem"] is True, name
        assert {"/cache", "/home/vllm", "/tmp"} <= mounts.keys(), name


def test_a_single_server_is_not_moved_for_tidiness(rendered):
    """It is away for minutes then; a drain may still move it, which a budget would forbid."""
    for name, pod in all_pods(rendered).items():
        notes = pod["metadata"]["annotations"]
        assert notes["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false", name
        assert notes["karpenter.sh/do-not-disrupt"] == "true", name
    found = {item["kind"] for objects in rendered.values() for item in objects}
    assert "PodDisruptionBudget" not in found


def test_adatp_fetches_its_encoder_with_the_servers_image(rendered):
    (server,) = pods(rendered["adatp"]).values()
    (first,) = server["spec"]["initContainers"]
    one, usual = container(server), container(pods(rendered["server"])["server"])
    assert first["image"] == one["image"]
    assert first["securityContext"] == one["securityContext"]
    folder = json.loads(environment(server, rendered["adatp"])["ADASPARK"])["encoder"]
    assert folder in first["command"] and folder.startswith("/cache/")
    assert [mount for mount in first["volumeMounts"] if mount["name"] == "cache"]
    # Else it is the server, as it is.
    env = [entry for entry in one["env"] if entry["name"] not in ("METHOD", "ADASPARK")]
    assert env == [entry for entry in usual["env"] if entry["name"] != "ADASPARK"]
    assert one | {"env": None} == usual | {"env": None}


@pytest.mark.parametrize("name", ["server", "leader"])
def test_probes_give_time_to_load_and_to_finish(rendered, name):
    pod = all_pods(rendered)[name]
    one = container(pod)
    ports = [port["name"] for port in one["ports"]]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert one[probe]["httpGet"]["path"] == "/health"
        assert one[probe]["httpGet"]["port"] in ports
    start = one["startupProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] >= 3600
    args = serve_arguments(*expanded(one), MODEL="m")
    wait = int(one["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["spec"]["terminationGracePeriodSeconds"] > args.shutdown_timeout + wait


def expanded(one: dict) -> list[str]:
    return [re.sub(r"\$\((\w+)\)", lambda match: GROUP[match[1]], arg) for arg in one["args"]]


@pytest.mark.parametrize("folder", ["server", "adatp", "multi-node"])
def test_settings_and_arguments_are_what_vllm_accepts(rendered, folder):
    objects = rendered[folder]
    for pod in pods(objects).values():
        env = environment(pod, objects)
        args = serve_arguments(*expanded(container(pod)), **env)
        method = args.additional_config.get("method", "adaspark")
        assert method == env.get("METHOD", "adaspark")
        settings = settings_class(method)().override(args.additional_config["adaspark"])
        assert settings.to_dict().items() >= json.loads(env["ADASPARK"]).items()
        assert args.hf_overrides == {"architectures": [ARCHITECTURE]}


def test_ranks_fill_the_nodes_and_agree(rendered):
    objects = rendered["multi-node"]
    size = only(objects, "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]["size"]
    assert str(size) == GROUP["LWS_GROUP_SIZE"]
    ranks = {}
    for name, pod in pods(objects).items():
        args = serve_arguments(*expanded(container(pod)), **environment(pod, objects))
        gpus = int(container(pod)["resources"]["limits"]["nvidia.com/gpu"])
        assert args.tensor_parallel_size == size * gpus <= KV_HEADS
        assert args.pipeline_parallel_size == 1, "never ran in an engine"
        assert (args.nnodes, args.node_rank, args.master_addr) == (size, 1, "leader")
        ranks[name] = vars(args)
    differ = {key for key, value in ranks["leader"].items() if ranks["worker"][key] != value}
    assert differ <= {"headless", "shutdown_timeout"}
    assert (ranks["leader"]["headless"], ranks["worker"]["headless"]) == (False, True)


def test_the_api_key_is_required_wherever_http_is_answered(rendered):
    for name, pod in all_pods(rendered).items():
        keys = {entry["name"]: entry.get("valueFrom") for entry in container(pod)["env"]}
        if name == "worker":
            assert "VLLM_API_KEY" not in keys
        else:
            assert not keys["VLLM_API_KEY"]["secretKeyRef"].get("optional")


# What the chart vllm-stack 0.1.12 reads of the keys used, from its values.schema.json.
ENGINE_KEYS = {
    *("runtimeClassName", "vllmApiKey", "modelSpec", "securityContext"),
    *("containerSecurityContext", "startupProbe", "serviceMonitor"),
}
MODEL_KEYS = {
    *("name", "repository", "tag", "modelURL", "replicaCount", "requestCPU", "requestMemory"),
    *("requestGPU", "vllmConfig", "shmSize", "env"),
}
VLLM_KEYS = {"enablePrefixCaching", "maxModelLen", "tensorParallelSize", "extraArgs"}
ROUTER_KEYS = {"tag", "routingLogic", "prefixMinMatchLength", "resources"}


def test_replicas_start_what_vllm_accepts_behind_a_prefix_aware_router():
    values = yaml.safe_load((KUBERNETES / "replicas" / "values.yaml").read_text())
    engine, router = values["servingEngineSpec"], values["routerSpec"]
    (model,) = engine["modelSpec"]
    assert engine.keys() <= ENGINE_KEYS and router.keys() <= ROUTER_KEYS
    assert model.keys() <= MODEL_KEYS and model["vllmConfig"].keys() <= VLLM_KEYS
    assert router["routingLogic"] == "prefixaware" and model["replicaCount"] > 1
    assert model["tag"] == __version__

    # As the chart writes the command.
    args = parse_serve([model["modelURL"], *model["vllmConfig"]["extraArgs"]])
    assert args.hf_overrides == {"architectures": [ARCHITECTURE]}
    settings_class("adaspark")().override(args.additional_config["adaspark"])
    assert args.shutdown_timeout < 30  # the chart leaves Kubernetes' own grace period
    env = {entry["name"]: entry.get("value") for entry in model["env"]}
    assert env["VLLM_PLUGINS"] == "adaspark,adaspark_http"
    # How the chart labels its pods, by the model's and the release's name.
    selected = {"model": model["name"], "helm-release-name": "adaspark"}
    assert budget()["spec"]["selector"]["matchLabels"] == selected
    assert budget()["spec"]["maxUnavailable"] < model["replicaCount"]
