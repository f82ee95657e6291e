"""Rules, dashboard and guide, on paper; tests/e2e/test_prometheus.py has the real scrape."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.deploy.kit import DEPLOY, tool

pytestmark = pytest.mark.process


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dashboard", DEPLOY / "grafana" / "dashboard.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text("utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_the_rules_pass_their_unit_tests() -> None:
    promtool = tool("promtool", "prometheus")
    for command in (["check", "rules", "rules.yml"], ["test", "rules", "rules_test.yml"]):
        run = subprocess.run(
            [promtool, *command], cwd=DEPLOY / "prometheus", capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stdout + run.stderr


def test_every_rule_has_a_unit_test() -> None:
    tests = (DEPLOY / "prometheus" / "rules_test.yml").read_text("utf-8")
    for rule in rules():
        name = rule.get("alert") or rule["record"]
        wanted = f"alertname: {name}" if "alert" in rule else f"expr: {name}"
        assert wanted in tests, name


def test_every_alert_has_its_place_in_the_guide() -> None:
    guide = (DEPLOY / "README.md").read_text("utf-8")
    anchors = {re.sub(r"[^a-z0-9 -]", "", line.lower()).replace(" ", "-")
               for line in re.findall(r"^#+ (.+)$", guide, re.MULTILINE)}  # fmt: skip
    for rule in rules():
        if "alert" in rule:
            file, _, anchor = rule["annotations"]["runbook_url"].partition("#")
            assert file == "deploy/README.md"
            assert anchor == rule["alert"].lower()
            assert anchor in anchors


def test_the_committed_dashboard_is_the_generated_one() -> None:
    module = generator()
    assert module.FILE.read_text("utf-8") == module.text(), "run python deploy/grafana/dashboard.py"
