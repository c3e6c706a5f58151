"""The wheel, the layers of imports, and a start without heavy packages."""

import ast
import os
import resource
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import yaml

import histoseek

ROOT = Path(__file__).parents[1]
FOLDERS = ("artifacts", "training", "export", "serving", "index", "ui")


def test_every_folder_with_an_init_is_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    inits = [p for folder in FOLDERS for p in (ROOT / folder).rglob("__init__.py")]
    found = [".".join(("histoseek", *p.parent.relative_to(ROOT).parts)) for p in inits]
    assert sorted(listed) == sorted(["histoseek", *found])


def test_one_version_and_licence_everywhere():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cited["version"] == histoseek.__version__
    assert cited["license"] == project["license"]
    assert f"## {histoseek.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_wheel_holds_every_module_and_the_default_encoder(tmp_path):
    copy = tmp_path / "source"
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    for name in tracked:
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path),
        str(copy),
    ]
    subprocess.run(command, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        inside = set(wheel.namelist())
    modules = {
        f"histoseek/{n}"
        for n in tracked
        if n.endswith(".py") and not n.startswith(("tests/", "docs/"))
    }
    assert modules <= inside
    assert {n for n in inside if n.endswith(".py")} == modules
    for extra in (
        "py.typed",
        "ui/assets/page.css",
        "ui/assets/page.js",
        "ui/assets/docs.css",
        "ui/assets/docs.html",
        "ui/assets/report.css",
        "ui/assets/report.html",
        "serving/default_encoder/encoder.onnx",
        "serving/tissue_network/tissue.onnx",
    ):
        assert f"histoseek/{extra}" in inside


def test_torch_is_named_only_in_training_and_export():
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).parts
        if parts[0] in {"training", "export", "tests"} or parts[0].startswith((".", "build")):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(n.split(".")[0] in {"torch", "lightning_fabric"} for n in names), path


def test_stages_without_torch_import_where_torch_is_forbidden(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not installed here')\n")
    code = (
        "import histoseek.serving.embedding.pipeline, histoseek.serving.encoders.open\n"
        "import histoseek.serving.embedding.jobs, histoseek.index.atlas, histoseek.ui.page.app\n"
        "import histoseek.ui.page.view, histoseek.ui.cli.demo\n"
        "import sys; print('torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.stdout.strip() == "False", done.stderr


def test_help_takes_less_than_half_a_second():
    """Of the processor, which other work on the machine does not lengthen."""

    def spent():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    def seconds(*command):
        best = []
        for _ in range(5):
            before = spent()
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            best.append(spent() - before)
        return min(best)

    ours = seconds("-m", "histoseek", "--help")
    assert ours < 0.5, f"--help takes {ours:.2f} s, Python alone {seconds('-c', ''):.2f} s"


def test_without_torch_training_says_how_to_get_it(tmp_path):
    code = (
        "import sys, importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'torch' else real(n, *a)\n"
        "from histoseek.__main__ import main; main(['train', '--list', '--json'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "histoseek[train]" in done.stdout, done.stderr


def test_no_pickle_anywhere():
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).parts
        if parts[0].startswith((".", "build", "tests")):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            assert not {"pickle", "joblib", "dill"} & set(names), path
