"""docs/tutorial.md, command by command, in one shell."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from loopback import free_port
from PIL import Image

from histoseek.serving.slides.slide import open_slide

TUTORIAL = Path(__file__).parents[1] / "docs" / "tutorial.md"
WAIT = "for n in $(seq 100); do curl -fsS http://127.0.0.1:{port}/health && break; sleep 0.3; done"
STOP = "kill -INT %1; wait %1 || true"


@pytest.mark.shared
def test_every_command_of_the_tutorial_works(tmp_path, cmu_slide, make_slide):
    text = TUTORIAL.read_text()
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / cmu_slide.name).symlink_to(cmu_slide)
    for seed in (2, 3):
        make_slide(tmp_path / "slides" / f"case-{seed}.tiff", side=1500, seed=seed)
    (table,) = re.findall(r"(?:^    .+\n)+", text[text.index("cases.csv") :], re.M)[:1]
    (tmp_path / "cases.csv").write_text(re.sub("^    ", "", table, flags=re.M))
    with open_slide(cmu_slide) as slide:
        Image.fromarray(slide.read_tile(600, 900, 224, 224)).rotate(90).save(
            tmp_path / "region.png"
        )
    port = free_port()
    blocks = [
        b.strip().replace("7860", str(port)) for b in re.findall(r"```sh\n(.*?)```", text, re.S)
    ]
    assert len(blocks) == 9
    serving = next(n for n, block in enumerate(blocks) if block.endswith("&"))
    asking = blocks.pop(serving + 1)
    blocks[serving] += f"\n{WAIT.format(port=port)}\n{asking} > answer.json\n{STOP}"
    program = tmp_path / "bin" / "histoseek"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m histoseek "$@"\n')
    program.chmod(0o755)
    script = "\n".join(["set -em", *blocks])
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert answer["hits"][0]["slide"] == cmu_slide.stem
    assert (tmp_path / "backup").is_dir() and len(list((tmp_path / "features").rglob("*.h5"))) == 3
    assert "connective tissue" in done.stdout
