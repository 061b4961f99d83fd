"""Check objects against a schema of another project, which this repository does not carry.

    kubectl kustomize deploy/kubernetes/multi-node | python deploy/test/upstream.py CRD.yaml
    python deploy/test/upstream.py values.schema.json < deploy/kubernetes/replicas/values.yaml

The schema is a CustomResourceDefinition (of LeaderWorkerSet: kubernetes-sigs/lws, config/crd/bases;
of the Prometheus operator: example/prometheus-operator-crd), which checks the objects of its kind:
keys that it does not know are errors. Or it is a JSON schema (of the chart: vllm-project/
production-stack, helm/values.schema.json), where such keys are only told: a chart may read them.
"""

import sys
from pathlib import Path

import jsonschema
import yaml


def strict(schema):
    """The schema with every object closed, except those that say or imply that they are open."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    properties = schema.get("properties")
    names = isinstance(properties, dict) and schema.get("type") == "object"
    if names and properties and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


def wrong(objects, schema) -> list[str]:
    checker = jsonschema.Draft202012Validator(schema)
    errors = [error for item in objects for error in checker.iter_errors(item)]
    return [f"{error.json_path}: {error.message[:300]}" for error in errors]


def main() -> None:
    schema = yaml.safe_load(Path(sys.argv[1]).read_text())
    objects = [item for item in yaml.safe_load_all(sys.stdin) if item]
    if schema.get("kind") == "CustomResourceDefinition":
        kind = schema["spec"]["names"]["kind"]
        versions = {item["name"]: item["schema"] for item in schema["spec"]["versions"]}
        objects = [item for item in objects if item["kind"] == kind]
        version = objects[0]["apiVersion"].partition("/")[2] if objects else "missing"
        if version not in versions:
            sys.exit(f"{sys.argv[1]}: no {kind} of a version it knows: {', '.join(versions)}")
        schema = versions[version]["openAPIV3Schema"]
        # Of metadata a definition says only that it is an object.
        schema["properties"]["metadata"] = {"type": "object"}
        schema = strict(schema)
    else:
        for message in set(wrong(objects, strict(schema))) - set(wrong(objects, schema)):
            print(f"note: {message}")
    errors = wrong(objects, schema)
    if errors:
        sys.exit("\n".join(errors))
    print(f"{len(objects)} checked against {sys.argv[1]}")


if __name__ == "__main__":
    main()
