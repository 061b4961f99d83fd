"""deploy/compose.yaml: valid, closed to the outside, pinned, and what it starts can start."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from deploy_tools import DEPLOY, module, serve_arguments

from vllm_adaspark import __version__

FILE = DEPLOY / "compose.yaml"
SERVERS = {"gpu": "server", "cpu": "server-cpu"}


def compose(file=FILE, **env: str) -> dict:
    """A file as compose reads it: merge keys merged, then variables filled in."""

    def filled(value):
        if isinstance(value, dict):
            return {key: filled(item) for key, item in value.items()}
        if isinstance(value, list):
            return [filled(item) for item in value]
        if not isinstance(value, str):
            return value
        text = re.sub(r"\$\{(\w+)(?::[-?]([^}]*))?\}", lambda m: env.get(m[1]) or m[2] or "", value)
        return int(text) if text != value and text.isdigit() else text

    return filled(yaml.safe_load(file.read_text()))


def check(content: dict) -> None:
    """Raises ValueError where the compose specification does not allow it."""
    module("compose_spec").PyCompose.from_json(json.dumps(content)).validate()


@pytest.fixture
def services() -> dict:
    return compose()["services"]


def test_follows_the_compose_specification():
    check(compose())
    check(compose(MODEL="m", ADASPARK='{"p_attn": 0.8}', GPUS="2", PORT="9000", HF_TOKEN="t"))


@pytest.mark.parametrize("wrong", ["portz", "networks", "secrets"])
def test_the_checker_would_complain(wrong):
    content = compose()
    content["services"]["server"][wrong] = ["nowhere"]
    with pytest.raises(ValueError):
        check(content)


def test_each_profile_has_one_server_that_prometheus_finds(services):
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    target = config["scrape_configs"][0]["static_configs"][0]["targets"][0]
    for profile, name in SERVERS.items():
        chosen = {key for key, value in services.items() if profile in value["profiles"]}
        assert chosen == {name, "prometheus", "grafana"}
        assert services[name]["networks"]["default"]["aliases"] == [target.split(":")[0]]
        assert services[name]["ports"][0].endswith(":" + target.split(":")[1])


def test_a_wrong_setting_does_not_restart_for_ever(services):
    """The entry script exits with 2 at once; Docker cannot tell that from a crash."""
    assert {services[name]["restart"] for name in SERVERS.values()} == {"no"}
    policy = services["server"]["deploy"]["restart_policy"]
    assert policy["condition"] == "on-failure" and 1 <= policy["max_attempts"] <= 5


def test_ports_are_on_loopback(services):
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert len(ports) == 4
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_images_are_pinned(services):
    for name, service in services.items():
        tag = service["image"].rpartition(":")[2]
        assert re.match(r"v?\d+\.\d+\.\d+", tag), name
        if name in SERVERS.values():
            assert tag.startswith(__version__)


def test_files_named_exist(services):
    for service in services.values():
        if "build" in service:
            assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (DEPLOY / source).exists(), source


@pytest.mark.parametrize("name", SERVERS.values())
def test_the_server_may_write_where_it_must_and_nowhere_else(name, services):
    service = services[name]
    assert service["read_only"] is True
    places = {place.split(":")[0] for place in service["tmpfs"]}
    places |= {volume.split(":")[1] for volume in service["volumes"]}
    assert places == {"/tmp", "/home/vllm", "/cache"}  # what `make image-test` finds written


def test_only_the_gpu_server_reserves_gpus(services):
    devices = services["server"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices[0]["capabilities"] == ["gpu"]
    assert not any("deploy" in service for name, service in services.items() if name != "server")


def test_every_service_has_a_health_check(services):
    for name, service in services.items():
        assert name in SERVERS.values() or service["healthcheck"]["test"][0] == "CMD", name


@pytest.mark.parametrize("name", SERVERS.values())
def test_the_server_reads_its_key_and_takes_its_arguments(name, services, tmp_path):
    service = services[name]
    env = {key: str(value or "") for key, value in service["environment"].items()}
    assert env["VLLM_API_KEY_FILE"] == f"/run/secrets/{service['secrets'][0]}"
    assert compose()["secrets"][service["secrets"][0]] == {"environment": "VLLM_API_KEY"}
    key = tmp_path / "key"
    key.write_text("k")
    args = serve_arguments(*service["command"], **env | {"VLLM_API_KEY_FILE": str(key)})
    assert args.model_tag.startswith("Qwen/Qwen2.5-VL-")
    # Docker kills what is still there after the grace period.
    assert args.shutdown_timeout < int(service["stop_grace_period"].removesuffix("s"))


def test_settings_come_from_the_callers_environment():
    service = compose(MODEL="m", ADASPARK='{"p_attn": 0.8}')["services"]["server"]
    env = {key: str(value or "") for key, value in service["environment"].items()}
    args = serve_arguments(**env | {"VLLM_API_KEY_FILE": ""})
    assert (args.model_tag, args.additional_config) == ("m", {"adaspark": {"p_attn": 0.8}})


def test_adatp_is_laid_over_either_server(services, tmp_path):
    key = tmp_path / "key"
    key.write_text("k")
    laid = compose(DEPLOY / "compose.adatp.yaml", ENCODER=str(tmp_path))["services"]
    assert laid.keys() == set(SERVERS.values())
    for name, over in laid.items():
        check({"services": {name: services[name] | over}} | volumes_of(compose()))
        env = {k: str(v or "") for k, v in services[name]["environment"].items()}
        args = serve_arguments(
            *services[name]["command"],
            **env | over["environment"] | {"VLLM_API_KEY_FILE": str(key)},
        )
        assert args.additional_config["method"] == "adatp"
        source, inside, mode = over["volumes"][0].split(":")
        assert (source, mode) == (str(tmp_path), "ro")
        assert args.additional_config["adaspark"]["encoder"] == inside


def volumes_of(content: dict) -> dict:
    return {key: content[key] for key in ("volumes", "networks", "secrets")}
