"""The manifests build, follow the Kubernetes schemas, and keep the promises made of them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")


@pytest.fixture(scope="module")
def manifests() -> list[dict[str, Any]]:
    command = ["kubectl", "kustomize", str(ROOT / "k8s" / "base")]
    built = subprocess.run(command, capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(built.stdout))


def of_kind(manifests: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    return {manifest["metadata"]["name"]: manifest for manifest in manifests if manifest["kind"] == kind}


def test_manifests_follow_the_schemas(manifests: list[dict[str, Any]]) -> None:
    assert len(manifests) == 4
    for manifest in manifests:
        kubernetes_validate.validate(manifest, "1.33", strict=True)


def test_a_typo_would_be_found(manifests: list[dict[str, Any]]) -> None:
    deployment = of_kind(manifests, "Deployment")["weft-backend"]
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    container["livenesProbe"] = container["livenessProbe"]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, "1.33", strict=True)
    del container["livenesProbe"]


@pytest.mark.parametrize("name", ["weft-backend", "weft-frontend"])
def test_pods_are_locked_down_and_probed(manifests: list[dict[str, Any]], name: str) -> None:
    pod = of_kind(manifests, "Deployment")[name]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
    assert container["livenessProbe"]["grpc"]["service"] == "live"
    assert container["readinessProbe"]["grpc"]["service"] == "ready"


@pytest.mark.parametrize("name", ["weft-backend", "weft-frontend"])
def test_services_find_their_pods(manifests: list[dict[str, Any]], name: str) -> None:
    service, deployment = of_kind(manifests, "Service")[name], of_kind(manifests, "Deployment")[name]
    template = deployment["spec"]["template"]
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    ports = {port["name"] for port in template["spec"]["containers"][0]["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports


@pytest.mark.parametrize("name", ["backend", "frontend"])
def test_the_images_start_with_the_arguments_given(manifests: list[dict[str, Any]], name: str) -> None:
    """The flags in the manifest are flags of the command that the image runs, and the image copies what exists."""
    dockerfile = (ROOT / name / "Dockerfile").read_text()
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.MULTILINE):
        assert all((ROOT / source).exists() for source in sources.split())
    help_text = subprocess.run(
        [sys.executable, "-m", f"weft_{name}", "--help"], capture_output=True, text=True, check=True
    ).stdout
    container = of_kind(manifests, "Deployment")[f"weft-{name}"]["spec"]["template"]["spec"]["containers"][0]
    for argument in container["args"]:
        assert argument.split("=")[0] in help_text
