"""Check that a release works. Run by `make release-check`; the results are in dist/.

Builds the source archive, and from it the wheel. Runs the demo from the wheel, outside the source folder.
Writes a bill of materials (CycloneDX) and the licences of all packages that `pip install
'histoseek[cpu,ui]'` installs. Installs the wheel with each extra in an empty environment and imports the
packages of that extra.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
TOOLS = ["cyclonedx-bom==7.5.0", "pip-licenses==5.5.5", "twine==7.0.0"]
SHIPPED = "cpu,ui"
"""The extras that the demo and the page need, whose dependencies are reported."""
IMPORTS = {
    "": "histoseek.__main__, histoseek.serving.slides.slide, histoseek.artifacts.tilesets",
    "cpu": "histoseek.serving.encoders.protocol, histoseek.index.atlas",
    "cpu,ui": "histoseek.ui.page.app, histoseek.ui.server, histoseek.index.search.layout",
    "cpu,train": "histoseek.training.commands, histoseek.training.recipes, histoseek.export.bundle",
    "cpu,openvino": "openvino, histoseek.serving.encoders.engines",
    "triton": "tritonclient.grpc, histoseek.export.triton",
    "docs": "mkdocs, material, mkdocstrings",
    "cpu,ray": "ray, fsspec",
    "s3": "s3fs, histoseek.artifacts.remote",
    "dicomweb": "requests, histoseek.artifacts.dicomweb",
    "zarr": "zarr, histoseek.serving.slides.zarr_source",
    "czi": "pylibCZIrw.czi, histoseek.serving.slides.czi_source",
    "metrics": "prometheus_client",
    "cpu,milvus": "pymilvus, histoseek.index.exchange.milvus",
    "cpu,bridges": "anndata, zarr, pyarrow, histoseek.index.exchange.exports",
}
ONLY_RESOLVED = ("gpu",)
"""Extras of several GB for machines with a GPU: only that pip finds versions is checked."""
COPYLEFT = ("GPL", "AGPL")
KNOWN_COPYLEFT = {
    "openslide-bin": "LGPL-2.1: OpenSlide, linked dynamically",
    "openslide-python": "LGPL-2.1, imported and not changed",
    "tqdm": "MPL-2.0 and MIT",
}


def run(*words, cwd=None, **options):
    """Run a command, showing what it printed if it fails."""
    words = [str(word) for word in words]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, **options)
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed ({done.returncode}):\n{done.stdout}\n{done.stderr}")
    return done.stdout


def environment(folder):
    """Make an empty virtual environment; returns its Python."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def install(python, *what):
    """Install with the versions that the tests run with."""
    run(
        python, "-m", "pip", "install", "-q", "--disable-pip-version-check",
        "-c", ROOT / "constraints.txt", *what,
    )  # fmt: skip


def build():
    """Build from what git knows, not from what lies about; the wheel comes out of the source archive."""
    DIST.mkdir(exist_ok=True)
    for old in (*DIST.glob("histoseek-*.whl"), *DIST.glob("histoseek-*.tar.gz")):
        old.unlink()
    with tempfile.TemporaryDirectory() as temp:
        for name in run("git", "ls-files", cwd=ROOT).split():
            target = Path(temp) / "source" / name
            if (ROOT / name).is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes((ROOT / name).read_bytes())
        run(
            sys.executable, "-m", "build", "--no-isolation", "--outdir", DIST, Path(temp) / "source"
        )
    (wheel,), (source,) = DIST.glob("histoseek-*.whl"), DIST.glob("histoseek-*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    with tarfile.open(source) as archive:
        names += archive.getnames()
    private = [n for n in names if "shared/" in n or n.endswith((".venv", ".svs", ".h5"))]
    assert not private, f"what must not be shipped: {private}"
    return wheel, source


def check_version(wheel):
    """One version everywhere: the package, CITATION.cff, the change log, the wheel's name."""
    version = wheel.name.split("-")[1]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    assert cited == version, f"CITATION.cff says {cited}, the wheel {version}"
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(), f"no section for {version}"
    return version


def check_extras(wheel, temp):
    """Install each extra where nothing else is, and import what it is for."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named = {name for key in IMPORTS for name in key.split(",")} | set(ONLY_RESOLVED)
    missing = set(extras) - named - {"dev"}
    assert not missing, f"extras that are not checked: {missing}"
    for number, (extra, modules) in enumerate(IMPORTS.items()):
        python = environment(temp / f"extra-{number}")
        install(python, f"{wheel}[{extra}]" if extra else wheel)
        run(python, "-m", "pip", "check")
        run(python, "-c", f"import {modules}", cwd=temp)
        has_torch = (
            subprocess.run([python, "-c", "import torch"], capture_output=True).returncode == 0
        )
        assert has_torch == ("train" in extra), f"extra {extra!r}: torch is {has_torch and 'in'}"
        print(f"extra {extra or '(none)'}: installed, imports {modules}", flush=True)
    for extra in ONLY_RESOLVED:
        run(sys.executable, "-m", "pip", "install", "--dry-run", "-q", "--no-deps", *extras[extra])
        print(f"extra {extra}: versions found, not installed", flush=True)


def check_demo(wheel, temp):
    """Run the demo from the wheel in a folder with nothing of ours; returns the environment's Python."""
    python = environment(temp / "demo")
    install(python, f"{wheel}[{SHIPPED}]")
    program = python.parent / "histoseek"
    told = json.loads(run(program, "demo", "--no-ui", "--json", "--dir", temp / "shown", cwd=temp))
    assert told["hits"], told
    run(program, "doctor", cwd=temp)
    print(f"demo: {len(told['hits'])} hits, from {wheel.name}", flush=True)
    return python


def report_dependencies(python, temp):
    """Write the bill of materials and the licences; refuse a copyleft licence that nobody has looked at."""
    tools = environment(temp / "tools")
    run(tools, "-m", "pip", "install", "-q", *TOOLS)
    bom = DIST / "sbom.cdx.json"
    run(tools.parent / "cyclonedx-py", "environment", python, "--of", "JSON", "-o", bom)
    command = [tools.parent / "pip-licenses", "--python", python, "--from=mixed"]
    rows = json.loads(run(*command, "--format=json"))
    (DIST / "licences.md").write_text(run(*command, "--format=markdown", "--with-urls"))
    strict = {
        r["Name"]: r["License"] for r in rows if any(word in r["License"] for word in COPYLEFT)
    }
    unseen = set(strict) - set(KNOWN_COPYLEFT)
    assert not unseen, (
        f"copyleft licences that nobody has looked at: { {n: strict[n] for n in unseen} }"
    )
    print(
        f"licences: {len(rows)} packages, {len(strict)} under an LGPL, {bom.name} written",
        flush=True,
    )
    return tools


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--skip-extras", action="store_true", help="build, demo and reports only")
    options = parser.parse_args()
    os.environ.pop("PYTHONPATH", None)
    wheel, source = build()
    print(
        f"{wheel.name} {wheel.stat().st_size:,} bytes, {source.name} {source.stat().st_size:,} bytes"
    )
    version = check_version(wheel)
    with tempfile.TemporaryDirectory() as name:
        temp = Path(name)
        python = check_demo(wheel, temp)
        tools = report_dependencies(python, temp)
        run(tools, "-m", "twine", "check", "--strict", wheel, source)
        if not options.skip_extras:
            check_extras(wheel, temp)
    print(f"histoseek {version} can be released: {DIST}")


if __name__ == "__main__":
    main()
