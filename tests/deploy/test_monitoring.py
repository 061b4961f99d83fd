"""Prometheus' configuration and rules, and Grafana's files: checked by promtool, and consistent."""

from __future__ import annotations

import importlib.util
import json
import re

import pytest
import yaml
from deploy_tools import DEPLOY, passes, run, tool

PROMETHEUS = DEPLOY / "prometheus"
RULES = PROMETHEUS / "rules.yml"
DASHBOARD = DEPLOY / "grafana" / "adaspark.json"
# What Grafana fills in before it asks.
VARIABLES = {"$__rate_interval": "5m", "$__interval": "1m", "$__range": "1h"}


@pytest.fixture(scope="module")
def series() -> set[str]:
    """Every series of ours that the server can expose."""
    from vllm_adaspark.server.metrics import families

    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "gauge": [""]}
    names = {
        family.name + suffix for family in families("m", {}) for suffix in suffixes[family.type]
    }
    return names | {"vllm_adaspark:up"}


def queries() -> list[str]:
    """Every PromQL expression of the dashboard."""

    def walk(node):
        if isinstance(node, dict):
            if isinstance(node.get("expr"), str):
                yield node["expr"]
            for value in node.values():
                yield from walk(value)
        elif isinstance(node, list):
            for value in node:
                yield from walk(value)

    return list(walk(json.loads(DASHBOARD.read_text())["panels"]))


def panels() -> list[dict]:
    found = json.loads(DASHBOARD.read_text())["panels"]
    return found + [inner for panel in found for inner in panel.get("panels", [])]


def test_rules_and_configuration_pass_promtool():
    passes(tool("promtool"), "check", "rules", RULES)
    passes(tool("promtool"), "check", "config", PROMETHEUS / "prometheus.yml")


def test_rules_fire_when_they_should():
    passes(tool("promtool"), "test", "rules", DEPLOY / "test" / "rules_test.yml")


def test_every_alert_has_a_test():
    groups = yaml.safe_load(RULES.read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    tests = yaml.safe_load((DEPLOY / "test" / "rules_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    tested = {case["alertname"] for case in cases if case["exp_alerts"]}
    assert {rule["alert"] for rule in rules if "alert" in rule} == tested


def test_the_operator_gets_the_same_rules():
    spec = importlib.util.spec_from_file_location(
        "make_rules", DEPLOY / "kubernetes" / "make_rules.py"
    )
    make_rules = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_rules)
    text = make_rules.TARGET.read_text()
    assert text == make_rules.wrapped(RULES.read_text()), "run deploy/kubernetes/make_rules.py"
    assert yaml.safe_load(text)["spec"] == yaml.safe_load(RULES.read_text())


def test_dashboard_queries_are_promql(tmp_path):
    def rules_file(expressions: list[str]):
        path = tmp_path / "rules.yml"
        rules = [{"record": f"panel:{n}", "expr": text} for n, text in enumerate(expressions)]
        path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
        return path

    filled = []
    for text in queries():
        for variable, value in VARIABLES.items():
            text = text.replace(variable, value)
        filled.append(re.sub(r"\$\{?\w+(:\w+)?\}?", "x", text))
    assert len(filled) >= 5
    passes(tool("promtool"), "check", "rules", rules_file(filled))
    assert run(tool("promtool"), "check", "rules", rules_file([filled[0] + ")"])).returncode != 0


def test_rules_and_dashboard_use_series_that_exist(series):
    recorded = set(re.findall(r"record:\s*(\S+)", RULES.read_text()))
    used = set(re.findall(r"vllm_adaspark:\w+", RULES.read_text() + "\n".join(queries())))
    assert used and used <= series | recorded, used - series - recorded


def test_dashboard_is_whole():
    board = json.loads(DASHBOARD.read_text())
    assert board["title"] and board["uid"] and board["schemaVersion"] >= 30
    assert board.get("id") is None  # Grafana numbers it
    ids = [panel["id"] for panel in panels()]
    assert len(ids) == len(set(ids))
    for panel in panels():
        place = panel["gridPos"]
        assert panel["title"] and panel["type"]
        assert place["w"] > 0 and place["h"] > 0 and place["x"] + place["w"] <= 24
        if panel["type"] not in ("row", "text"):
            assert panel["targets"] and all(target["expr"] for target in panel["targets"])


def test_dashboard_finds_its_data_source():
    folder = DEPLOY / "grafana" / "provisioning" / "datasources"
    (source,) = yaml.safe_load((folder / "prometheus.yaml").read_text())["datasources"]
    variables = {
        f"${{{item['name']}}}" for item in json.loads(DASHBOARD.read_text())["templating"]["list"]
    }
    for panel in panels():
        for place in [panel, *panel.get("targets", [])]:
            used = place.get("datasource") or {"type": "prometheus", "uid": source["uid"]}
            assert used["type"] == source["type"]
            assert used["uid"] in variables | {source["uid"]}, panel["title"]


def test_grafana_looks_where_compose_puts_the_dashboard():
    provider = DEPLOY / "grafana" / "provisioning" / "dashboards" / "adaspark.yaml"
    folder = yaml.safe_load(provider.read_text())["providers"][0]["options"]["path"]
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["grafana"]
    assert f"./grafana/adaspark.json:{folder}/adaspark.json:ro" in service["volumes"]
