"""The files in deploy/ pass their validators, and the program has every command in docs/deploy.md."""

import copy
import functools
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from histoseek import __version__

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
GUIDE = ROOT / "docs" / "deploy.md"
TOOLS = Path(sys.executable).parent
COMPOSE = ("compose.yaml", "compose.cpu.yaml", "compose.tensorrt.yaml")
KUSTOMIZATIONS = ("base", "overlays/cpu", "overlays/tensorrt", "tools")
TELEMETRY_OFF = {
    "ORT_DISABLE_TELEMETRY": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
MADE_BY_THE_READER = {"models", "atlas", "slides", "features", ".env"}


class Reset:
    """Stands for Compose's ``!reset``."""


class ComposeLoader(yaml.SafeLoader):
    """YAML with Compose's ``!reset``."""


ComposeLoader.add_constructor("!reset", lambda loader, node: Reset)


def passes(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def compose(*names):
    """Compose files merged by Compose's rules, as far as these files need them."""
    merged = {}
    for name in names:
        merged = merge(merged, yaml.load((DEPLOY / name).read_text(), ComposeLoader))
    return merged


def merge(below, above, key=""):
    if isinstance(below, dict) and isinstance(above, dict):
        both = {k: merge(below.get(k), v, k) for k, v in above.items()}
        return {k: v for k, v in {**below, **both}.items() if v is not Reset}
    if isinstance(below, list) and isinstance(above, list) and key not in {"command", "test"}:
        return below + above
    return above


def with_defaults(text):
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def documents(path):
    return [d for d in yaml.safe_load_all(path.read_text()) if d]


def manifests():
    folder = DEPLOY / "kubernetes"
    files = [p for p in sorted(folder.rglob("*.yaml")) if p.name != "kustomization.yaml"]
    return [(p, d) for p in files for d in documents(p)]


def pods():
    for _, document in manifests():
        if document["kind"] == "Pod":
            yield document["metadata"]["name"], document
        elif document["kind"] in {"Deployment", "Job"}:
            yield document["metadata"]["name"], document["spec"]["template"]


def triton_of(overlay):
    """The Deployment of Triton as a kustomization patches it."""
    folder = DEPLOY / "kubernetes"
    found = [d for _, d in manifests() if d["kind"] == "Deployment"]
    made = copy.deepcopy(next(d for d in found if d["metadata"]["name"] == "triton"))
    for patch in documents(folder / overlay / "kustomization.yaml")[0].get("patches", []):
        assert patch["target"] == {"kind": "Deployment", "name": "triton"}
        for step in yaml.safe_load(patch["patch"]):
            *way, last = [p.replace("~1", "/") for p in step["path"].split("/")[1:]]
            place = made
            for name in way:
                place = place[int(name)] if isinstance(place, list) else place[name]
            if step["op"] == "remove":
                del place[last]
            else:
                assert step["op"] == "add" and last == "-"
                place.append(step["value"])
    return made


# -- the image ------------------------------------------------------------------------------------


def dockerfile():
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.ray"])
def test_hadolint_has_nothing_against_the_dockerfiles(name):
    passes(TOOLS / "hadolint", "--no-color", DEPLOY / name)


def test_the_image_installs_extras_that_exist_and_no_torch():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installs = [line for line in dockerfile() if "pip install" in line]
    assert "'.[cpu,ui,triton,metrics]'" in installs[-1]
    assert "extras = ('cpu', 'ui', 'triton', 'metrics')" in installs[0]
    extras = [project["optional-dependencies"][e] for e in ("cpu", "ui", "triton", "metrics")]
    assert not [d for d in sum(extras, project["dependencies"]) if d.startswith(("torch", "light"))]


def test_the_image_runs_as_a_user_and_reports_to_nobody():
    last_stage = "\n".join(dockerfile()).rpartition("FROM ")[2]
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", last_stage, re.M)
    assert re.search(r"^HEALTHCHECK ", last_stage, re.M)
    environment = dict(re.findall(r"(\w+)=(\S+)", re.search(r"^ENV .*$", last_stage, re.M)[0]))
    assert environment.items() >= TELEMETRY_OFF.items()
    assert not [name for name in environment if re.search("TOKEN|PASSWORD|AUTH|SECRET", name)]


def test_the_build_context_holds_the_package_and_nothing_else():
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    let_in = {rule[1:] for rule in rules if rule.startswith("!")}
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {p.split(".")[1] for p in setuptools["packages"] if "." in p}
    files = {"LICENSE", "README.md", "constraints.txt", "pyproject.toml", "py.typed", "*.py"}
    assert let_in == folders | files
    assert rules[-1] == "**/__pycache__"


def test_images_have_fixed_tags_and_ours_is_this_version():
    stages = [line.split()[1] for line in dockerfile() if line.startswith("FROM ")]
    services = [with_defaults(s["image"]) for s in compose("compose.yaml")["services"].values()]
    containers = [c["image"] for _, pod in pods() for c in pod["spec"]["containers"]]
    for image in [*stages, *services, *containers]:
        name, _, tag = image.partition(":")
        assert tag and tag != "latest", image
        assert name != "histoseek" or tag == __version__, image
    told = re.findall(r"histoseek:(\d[\w.]*)", GUIDE.read_text() + "".join(dockerfile()))
    assert set(told) <= {__version__}


# -- Compose --------------------------------------------------------------------------------------


def test_compose_files_alone_and_merged_keep_the_compose_specification(tmp_path):
    for names in [(n,) for n in COMPOSE] + [COMPOSE[:1] + (n,) for n in COMPOSE[1:]] + [COMPOSE]:
        text = json.dumps(compose(*names), default=lambda reset: None)
        (tmp_path / f"{'+'.join(names)}.json").write_text(text)
    made = sorted(tmp_path.iterdir())
    assert len(made) == 6
    schema = ("--builtin-schema", "vendor.compose-spec")
    passes(sys.executable, "-m", "check_jsonschema", *schema, *made)


def test_every_port_is_open_to_this_machine_only():
    services = compose(*COMPOSE)["services"]
    ports = [p for service in services.values() for p in service.get("ports", [])]
    assert sorted(ports) == [f"127.0.0.1:{n}:{n}" for n in (7860, 8000, 8001, 8002)]
    assert not [s for s in services.values() if "host" in {s.get("network_mode"), s.get("ipc")}]


def test_compose_starts_nothing_without_user_and_password():
    ui = compose("compose.yaml")["services"]["ui"]
    assert re.fullmatch(r"\$\{HISTOSEEK_UI_AUTH:\?.+\}", ui["environment"]["HISTOSEEK_UI_AUTH"])
    assert "env_file" not in ui
    assert "/.env" in (DEPLOY / ".gitignore").read_text().split()


def test_clients_wait_for_triton_and_are_not_root():
    services = compose("compose.yaml")["services"]
    assert "/v2/health/ready" in services["triton"]["healthcheck"]["test"][-1]
    for name in ("ui", "embed"):
        service = services[name]
        assert service["depends_on"] == {"triton": {"condition": "service_healthy"}}
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", with_defaults(service["user"]))
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert services["embed"]["profiles"] == ["embed"]


def test_the_override_for_cpus_takes_away_the_gpu_and_nothing_else():
    plain, cpu = compose("compose.yaml"), compose("compose.yaml", "compose.cpu.yaml")
    reserved = plain["services"]["triton"].pop("deploy")["resources"]["reservations"]["devices"]
    assert reserved == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]
    assert cpu == plain


def test_the_override_for_tensorrt_adds_one_flag():
    plain, tensorrt = compose("compose.yaml"), compose("compose.yaml", "compose.tensorrt.yaml")
    command = plain["services"]["triton"].pop("command")
    wanted = [*command, "--model-config-name=tensorrt"]
    assert tensorrt["services"]["triton"].pop("command") == wanted
    for made in (plain, tensorrt):
        made["services"]["triton"]["healthcheck"].pop("start_period")
    assert tensorrt == plain


def test_triton_is_started_the_same_way_everywhere():
    command = compose("compose.yaml")["services"]["triton"]["command"]
    container = triton_of("base")["spec"]["template"]["spec"]["containers"][0]
    assert container["args"] == command
    assert container["image"] == compose("compose.yaml")["services"]["triton"]["image"]


# -- Kubernetes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.27", kubernetes_validate.latest_version()])
def test_manifests_keep_the_schemas_of_kubernetes(version):
    overlays = [triton_of(name) for name in ("overlays/cpu", "overlays/tensorrt")]
    for document in [d for _, d in manifests()] + overlays:
        kubernetes_validate.validate(document, version, strict=True)


def test_kustomizations_list_what_exists_and_all_of_it():
    folder = DEPLOY / "kubernetes"
    found = {p.parent.relative_to(folder).as_posix() for p in folder.rglob("kustomization.yaml")}
    assert found == set(KUSTOMIZATIONS)
    for name in KUSTOMIZATIONS:
        here = folder / name
        (document,) = documents(here / "kustomization.yaml")
        assert document["kind"] == "Kustomization"
        listed = {(here / r).resolve() for r in document["resources"]}
        beside = {p for p in here.glob("*.yaml") if p.name != "kustomization.yaml"}
        assert {p for p in listed if p.suffix == ".yaml"} == beside
        assert all((p / "kustomization.yaml").is_file() for p in listed - beside)
    assert {p.parent.relative_to(folder).as_posix() for p, _ in manifests()} <= found


def test_triton_asks_for_one_gpu_but_in_the_overlay_without():
    def limits(overlay):
        spec = triton_of(overlay)["spec"]["template"]["spec"]
        return spec["containers"][0]["resources"].get("limits", {})

    assert limits("base") == limits("overlays/tensorrt") == {"nvidia.com/gpu": "1"}
    assert limits("overlays/cpu") == {}


def test_the_overlay_for_tensorrt_adds_one_flag():
    def arguments(overlay):
        return triton_of(overlay)["spec"]["template"]["spec"]["containers"][0]["args"]

    assert arguments("overlays/tensorrt") == [*arguments("base"), "--model-config-name=tensorrt"]


def test_triton_is_probed_at_its_own_health_addresses():
    container = triton_of("base")["spec"]["template"]["spec"]["containers"][0]
    paths = {
        n: container[f"{n}Probe"]["httpGet"]["path"] for n in ("startup", "liveness", "readiness")
    }
    live, ready = "/v2/health/live", "/v2/health/ready"
    assert paths == {"startup": live, "liveness": live, "readiness": ready}


def test_no_pod_runs_as_root_or_gains_rights():
    names = []
    for name, pod in pods():
        names.append(name)
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["runAsUser"] == 1000, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
    assert sorted(names) == ["histoseek-embed", "histoseek-tools", "histoseek-ui", "triton"]


def test_mounts_name_volumes_and_volumes_name_claims():
    claims = {d["metadata"]["name"] for _, d in manifests() if d["kind"] == "PersistentVolumeClaim"}
    for name, pod in pods():
        volumes = {v["name"]: v for v in pod["spec"]["volumes"]}
        mounted = {m["name"] for c in pod["spec"]["containers"] for m in c["volumeMounts"]}
        assert mounted == set(volumes), name
        used = [v["persistentVolumeClaim"] for v in volumes.values() if "emptyDir" not in v]
        assert {u["claimName"] for u in used} <= claims, name


def test_the_secret_is_referred_to_and_never_written_down():
    assert "Secret" not in {d["kind"] for _, d in manifests()}
    ui = next(pod for name, pod in pods() if name == "histoseek-ui")
    (variable,) = ui["spec"]["containers"][0]["env"]
    reference = {"secretKeyRef": {"name": "histoseek-ui", "key": "auth"}}
    assert variable == {"name": "HISTOSEEK_UI_AUTH", "valueFrom": reference}


def test_only_pods_of_histoseek_reach_triton_and_none_the_internet():
    policies = {
        d["metadata"]["name"]: d["spec"] for _, d in manifests() if d["kind"] == "NetworkPolicy"
    }
    both = ["Ingress", "Egress"]
    assert policies.pop("nothing") == {"podSelector": {}, "policyTypes": both}
    peers = [
        peer
        for policy in policies.values()
        for rule in policy.get("ingress", []) + policy.get("egress", [])
        for peer in rule.get("from", []) + rule.get("to", [])
    ]
    ours = [
        {"podSelector": {"matchLabels": {"app.kubernetes.io/name": n}}}
        for n in ("histoseek", "triton")
    ]
    names = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}
    assert len(peers) == 3 and all(peer in [*ours, names] for peer in peers)
    (way_in,) = policies["histoseek-to-triton"]["ingress"]
    assert way_in["from"] == ours[:1]
    for name, pod in pods():
        wanted = "triton" if name == "triton" else "histoseek"
        assert pod["metadata"]["labels"]["app.kubernetes.io/name"] == wanted


# -- KubeRay --------------------------------------------------------------------------------------

GROUP = {
    "type": "object",
    "additionalProperties": False,
    "required": ["rayStartParams", "template"],
    "properties": {
        "groupName": {"type": "string"},
        "replicas": {"type": "integer", "minimum": 0},
        "minReplicas": {"type": "integer", "minimum": 0},
        "maxReplicas": {"type": "integer", "minimum": 0},
        "rayStartParams": {"type": "object", "additionalProperties": {"type": "string"}},
        "template": {"type": "object", "required": ["metadata", "spec"]},
    },
}
RAY_CLUSTER = {
    "type": "object",
    "additionalProperties": False,
    "required": ["rayVersion", "headGroupSpec", "workerGroupSpecs"],
    "properties": {
        "rayVersion": {"type": "string"},
        "enableInTreeAutoscaling": {"type": "boolean"},
        "autoscalerOptions": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "upscalingMode": {"enum": ["Default", "Conservative", "Aggressive"]},
                "idleTimeoutSeconds": {"type": "integer", "minimum": 0},
            },
        },
        "headGroupSpec": GROUP,
        "workerGroupSpecs": {
            "type": "array",
            "items": {**GROUP, "required": [*GROUP["required"], "groupName"]},
        },
    },
}
RAY_JOB = {
    "type": "object",
    "additionalProperties": False,
    "required": ["entrypoint", "rayClusterSpec"],
    "properties": {
        "entrypoint": {"type": "string"},
        "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        "backoffLimit": {"type": "integer", "minimum": 0},
        "shutdownAfterJobFinishes": {"type": "boolean"},
        "ttlSecondsAfterFinished": {"type": "integer", "minimum": 0},
        "rayClusterSpec": RAY_CLUSTER,
    },
}
"""The fields of ray.io/v1 that our files use, after KubeRay's API reference; others are refused."""


def kuberay():
    """The two documents of KubeRay: the specification of the cluster, and of the job."""
    (cluster,), (job,) = (documents(DEPLOY / "kuberay" / f"{n}.yaml") for n in ("cluster", "embed"))
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    return cluster["spec"], job["spec"]


def test_kuberays_files_have_only_its_fields():
    cluster, job = kuberay()
    jsonschema.validate(cluster, RAY_CLUSTER)
    jsonschema.validate(job, RAY_JOB)
    assert job["rayClusterSpec"] == cluster
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**job, "entryPoint": "x"}, RAY_JOB)


@pytest.mark.parametrize("version", ["1.27", kubernetes_validate.latest_version()])
def test_rays_pods_keep_the_schemas_of_kubernetes(version):
    for document in documents(DEPLOY / "kuberay" / "base.yaml"):
        kubernetes_validate.validate(document, version, strict=True)
    cluster, _ = kuberay()
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        template = group["template"]
        pod = {
            "apiVersion": "v1", "kind": "Pod", "spec": template["spec"],
            "metadata": {"name": "ray", **template["metadata"]},
        }  # fmt: skip
        kubernetes_validate.validate(pod, version, strict=True)
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        (container,) = template["spec"]["containers"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert {m["name"] for m in container["volumeMounts"]} == {
            v["name"] for v in template["spec"]["volumes"]
        }
    names = {group.get("groupName", "head"): group for group in groups}
    limits = {
        name: group["template"]["spec"]["containers"][0]["resources"]["limits"].get(
            "nvidia.com/gpu"
        )
        for name, group in names.items()
    }
    assert limits == {"head": None, "cpu": None, "gpu": "1"}
    assert all(
        g["minReplicas"] <= g["replicas"] <= g["maxReplicas"]
        for n, g in names.items()
        if n != "head"
    )


def test_ray_has_one_version():
    cluster, _ = kuberay()
    (pinned,) = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    text = (DEPLOY / "Dockerfile.ray").read_text()
    assert cluster["rayVersion"] == pinned
    assert set(re.findall(r"rayproject/ray:([\d.]+)-py311", text)) == {pinned}


def test_yamllint_has_nothing_against_any_file():
    config = DEPLOY / ".yamllint.yaml"
    passes(sys.executable, "-m", "yamllint", "--strict", "-c", config, DEPLOY)


# -- what people type -----------------------------------------------------------------------------


def typed():
    """The indented lines of the guide, continued lines joined."""
    lines = [m[1] for m in re.finditer(r"^(?: {4}|\t)+ *(.+)$", GUIDE.read_text(), re.M)]
    return "\n".join(lines).replace("\\\n", " ").splitlines()


def written():
    """Every histoseek command of the guide, of the Compose files and of the Kubernetes files."""
    for line in typed():
        found = re.search(r"^(?:\w+=\S+ )?histoseek (.+)$|-- histoseek (.+)$", line)
        if found:
            yield shlex.split(found[1] or found[2], comments=True)
    yield shlex.split(kuberay()[1]["entrypoint"])[1:]
    for name in ("ui", "embed"):
        yield compose("compose.yaml")["services"][name]["command"]
    yield from (
        c["args"]
        for name, pod in pods()
        for c in pod["spec"]["containers"]
        if name != "triton" and "args" in c
    )


@functools.cache
def help_of(*verb):
    command = [sys.executable, "-m", "histoseek", *verb, "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""


def unknown_in(words):
    """What the program does not know of a command: its verb, or options."""
    verb = words[:1]
    if "COMMAND" in help_of(*verb).partition("\n\n")[0]:
        verb = words[:2]
    known = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", help_of(*verb)))
    options = {word.partition("=")[0] for word in words if word.startswith("-")}
    return sorted(options - known) if help_of(*verb) else verb


def test_every_command_that_is_written_down_exists_with_its_options():
    commands = list(written())
    assert len(commands) > 20
    unknown = {" ".join(words): found for words in commands if (found := unknown_in(words))}
    assert not unknown, json.dumps(unknown, indent=2)


def test_a_wrong_verb_or_option_would_be_found():
    assert unknown_in(["embedd", "slides"]) == ["embedd"]
    assert unknown_in(["index", "make", "atlas"]) == ["index", "make"]
    assert unknown_in(["embed", "slides", "--out", "x", "--fast=1"]) == ["--fast"]


def test_every_file_that_the_guide_names_is_there():
    text = GUIDE.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (GUIDE.parent / link).exists(), link
    for name in re.findall(r"deploy/([\w./-]*\w)", text):
        made = Path(name).parts[0] in MADE_BY_THE_READER
        assert made or (DEPLOY / name).exists(), name


def test_the_guide_links_within_itself_to_headings_that_it_has():
    text = GUIDE.read_text()
    headings = {
        re.sub(r"[^\w -]", "", h).lower().replace(" ", "-")
        for h in re.findall(r"^#+ (.+)$", text, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings
