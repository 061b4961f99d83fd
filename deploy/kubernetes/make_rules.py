"""Wrap deploy/prometheus/rules.yml in the object that the Prometheus operator reads.

    python deploy/kubernetes/make_rules.py      # writes monitoring/rules.yaml

Kustomize cannot do it, and the rules should have one source. A test compares the two.
"""

from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent / "prometheus" / "rules.yml"
TARGET = HERE / "monitoring" / "rules.yaml"
HEAD = """\
# Made by make_rules.py from deploy/prometheus/rules.yml: change that file, not this one.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: adaspark
  labels:
    app.kubernetes.io/name: vllm-adaspark
spec:
"""


def wrapped(rules: str) -> str:
    """The text of the object around the text of a rule file."""
    lines = [line for line in rules.splitlines() if not line.startswith("#")]
    body = "\n".join(f"  {line}" if line.strip() else "" for line in lines)
    return f"{HEAD}{body.rstrip()}\n"


if __name__ == "__main__":
    TARGET.write_text(wrapped(SOURCE.read_text()))
    print(TARGET)
