"""Slides, features and encoders behind URLs, on a real S3 server on this machine."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from histoseek.artifacts import remote
from histoseek.artifacts.feature_files import read_features
from histoseek.artifacts.files import content_mark, temporary_folder
from histoseek.artifacts.remote import Remote, below
from histoseek.errors import BadInput, MissingPart, StorageFailed
from histoseek.serving.embedding.jobs import find_inputs
from histoseek.serving.embedding.meter import Meter
from histoseek.serving.embedding.results import EmbedOptions, EncoderChoice
from histoseek.serving.embedding.run import run_here
from histoseek.serving.embedding.staging import Staging
from histoseek.stopping import Stopped

OPTIONS = {"overlap_px": 32}


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """A server of moto; s3fs and boto3 find it by the environment."""
    log = tmp_path_factory.mktemp("s3") / "log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with open(log, "w") as stream:
        server = subprocess.Popen(command, stdout=stream, stderr=stream)
    address = f"http://127.0.0.1:{port}"
    settings = {
        "AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    end = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"{address}/moto-api", timeout=1).close()
            break
        except OSError:
            assert server.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)
    yield address
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    server.send_signal(signal.SIGKILL)
    server.wait()


@pytest.fixture
def bucket(s3, request):
    """A fresh bucket: its URL, and a function that uploads."""
    import boto3

    client = boto3.client("s3")
    name = "b" + str(abs(hash(request.node.name)))[:12]
    client.create_bucket(Bucket=name)

    def upload(key, path):
        client.upload_file(str(path), name, key)

    upload.list = lambda: sorted(
        o["Key"] for o in client.list_objects_v2(Bucket=name).get("Contents", [])
    )
    upload.client, upload.name = client, name
    return f"s3://{name}", upload


@pytest.fixture(scope="module")
def slides(make_slide, tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    for number in range(3):
        make_slide(folder / f"case-{number}.tiff", side=600, seed=number)
    return folder


def run(inputs, out, bundle, **options):
    given = find_inputs(inputs)
    choice = EncoderChoice(str(bundle), engine="onnxruntime")
    ran = run_here(given.jobs, choice, out, EmbedOptions(**OPTIONS, **options), lambda *_: None)
    return ran, given


def states(ran):
    return {result.name: result.state for result in ran.results}


def test_slides_in_a_bucket_give_the_same_features(
    bucket, slides, other_bundle, tmp_path, monkeypatch
):
    url, upload = bucket
    for path in slides.iterdir():
        upload(f"cohort/sub/{path.name}", path)
    upload("cohort/notes.txt", __file__)
    upload("cohort/.hidden/x.svs", __file__)
    monkeypatch.setenv("HISTOSEEK_STAGING", str(tmp_path / "staging"))
    ran, given = run([f"{url}/cohort"], tmp_path / "out", other_bundle)
    assert states(ran) == dict.fromkeys(["case-0", "case-1", "case-2"], "done")
    assert {left.path.rsplit("/", 1)[-1] for left in given.left_out} == {"notes.txt", "x.svs"}
    here, _ = run([slides], tmp_path / "here", other_bundle)
    for one, two in zip(ran.results, here.results, strict=True):
        a, b = read_features(Path(one.features)), read_features(Path(two.features))
        assert np.array_equal(a.features, b.features) and np.array_equal(a.coords, b.coords)
        assert a.source == one.source == f"{url}/cohort/sub/{one.name}.tiff"
    assert ran.speed["fetched_bytes"] == sum(p.stat().st_size for p in slides.iterdir())
    assert not list((tmp_path / "staging").iterdir())
    again, _ = run([f"{url}/cohort"], tmp_path / "out", other_bundle)
    assert set(states(again).values()) == {"skipped"} and again.speed["fetched_bytes"] == 0
    for other, kept in (
        ({"assume_mpp": 0.5}, True),  # the files state their scale
        ({"min_tissue": 0.5}, False),
        ({"override_mpp": 0.3}, False),
        ({"override_mpp": 0.3}, True),
        ({}, False),
        ({"override_mpp": 0.3}, False),
    ):
        changed, _ = run([f"{url}/cohort"], tmp_path / "out", other_bundle, **other)
        assert (changed.speed["fetched_bytes"] == 0) == kept, other
    upload("cohort/sub/case-1.tiff", slides / "case-2.tiff")
    changed, _ = run([f"{url}/cohort"], tmp_path / "out", other_bundle, override_mpp=0.3)
    assert states(changed) == {"case-0": "skipped", "case-1": "done", "case-2": "skipped"}


def test_features_are_uploaded_and_found_again(bucket, slides, other_bundle, cli_process, tmp_path):
    url, upload = bucket
    words = ["embed", slides, "--out", f"{url}/features", "--encoder", other_bundle, "--json"]
    for state in ("done", "skipped"):
        done = cli_process(*words)
        report = json.loads(done.stdout)
        assert done.returncode == 0 and report["states"] == {state: 3}, done.stderr
        names = [key for key in upload.list() if key.startswith("features/")]
        assert sum(name.endswith(".h5") for name in names) == 3 and "features/run.json" in names
        assert sum(name.startswith("features/overlays/") for name in names) == 3
        assert sum(name.startswith("features/status/") for name in names) == 3
        assert all(r["features"].startswith(f"{url}/features/") for r in report["results"])
    record = json.loads(
        upload.client.get_object(Bucket=upload.name, Key="features/run.json")["Body"].read()
    )
    assert record == report
    local = tmp_path / "copy.h5"
    Remote(report["results"][0]["features"]).fetch(local)
    assert read_features(local).encoder == "other"


@pytest.mark.alone  # a cluster on this machine needs all of its cores
def test_from_a_bucket_to_a_bucket_on_a_cluster(bucket, slides, other_bundle, cli_process):
    url, upload = bucket
    for path in slides.iterdir():
        upload(f"slides/{path.name}", path)
    done = cli_process(
        "embed",
        f"{url}/slides",
        "--out",
        f"{url}/out",
        "--ray",
        "local",
        "--encoder",
        other_bundle,
        "--json",
    )
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["states"] == {"done": 3}, done.stderr
    assert sum(key.endswith(".h5") for key in upload.list()) == 3


def test_an_encoder_an_atlas_and_its_features_behind_urls(
    bucket, slides, other_bundle, cli_process, tmp_path
):
    url, upload = bucket
    for path in other_bundle.rglob("*"):
        if path.is_file():
            upload(f"encoder/{path.relative_to(other_bundle).as_posix()}", path)
    cache = {**os.environ, "HISTOSEEK_CACHE": str(tmp_path / "cache")}

    def cli(*words, code=0):
        done = cli_process(*words, "--json", env=cache)
        assert done.returncode == code, done.stdout + done.stderr
        return json.loads(done.stdout)

    features, atlas, copy = f"{url}/features", tmp_path / "atlas", f"{url}/snapshots/1"
    embedded = cli("embed", slides, "--out", features, "--encoder", f"{url}/encoder")
    assert embedded["states"] == {"done": 3} and embedded["encoder"]["name"] == "other"
    (cached,) = (tmp_path / "cache/encoders").iterdir()
    cli("index", "create", atlas, "--encoder", f"{url}/encoder")
    added = cli("index", "add", atlas, features)
    assert sorted(one["slide"] for one in added["added"]) == ["case-0", "case-1", "case-2"]
    assert {one["state"] for one in cli("index", "add", atlas, features)["added"]} == {"unchanged"}
    tiles = cli("index", "stats", atlas)["tiles"]
    assert cli("index", "snapshot", atlas, "--out", copy)["snapshot"] == copy
    assert (
        "is not empty" in cli("index", "snapshot", atlas, "--out", copy, code=1)["error"]["message"]
    )
    again = tmp_path / "again"
    restored = cli("index", "restore", copy, again)
    assert restored["kept"] is None and cli("index", "stats", again)["tiles"] == tiles
    assert cli("index", "verify", again)["ok"]
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"cache", "atlas", "again"}  # no local copies
    upload.client.delete_object(Bucket=upload.name, Key="snapshots/1/atlas.db")
    assert (
        f"{copy}" in cli("index", "restore", copy, tmp_path / "third", code=1)["error"]["message"]
    )
    assert not (tmp_path / "third").exists()
    for wrong in (f"{url}/features", f"{url}/nothing"):
        says = cli("embed", slides, "--out", tmp_path / "x", "--encoder", wrong, code=1)["error"][
            "message"
        ]
        assert f"{wrong} is not an encoder bundle" in says
    cached.joinpath("encoder.onnx").write_bytes(b"damaged")
    damaged = cli("embed", slides, "--out", tmp_path / "x", "--encoder", f"{url}/encoder", code=1)
    assert "encoder.onnx" in damaged["error"]["message"]


def test_what_cannot_be_read_is_named_by_its_url(bucket, slides, other_bundle, tmp_path):
    url, upload = bucket
    upload("slides/good.tiff", slides / "case-0.tiff")
    bad = tmp_path / "bad.svs"
    bad.write_bytes(b"no slide")
    upload("slides/bad.svs", bad)
    upload("dicom/a.dcm", bad)
    ran, _ = run([f"{url}/slides"], tmp_path / "out", other_bundle)
    assert states(ran) == {"good": "done", "bad": "failed"}
    (failed,) = [result for result in ran.results if result.state == "failed"]
    assert (
        failed.reason.startswith(f"{url}/slides/bad.svs")
        and "histoseek-slides" not in failed.reason
    )
    for wrong, says in (
        (f"{url}/nothing", "does not exist or is empty"),
        (f"{url}/dicom", "a DICOM slide is a series of files"),
        (f"{url}/dicom/a.dcm", "a DICOM slide is a series of files"),
        ("s9://bucket/slides", "s9"),
    ):
        with pytest.raises(BadInput, match=says):
            find_inputs([wrong])


def test_a_missing_bucket_for_features_is_said_before_anything_is_read(
    bucket, slides, other_bundle, cli_json
):
    url, _ = bucket
    out = f"{url}-missing/features"
    failed = cli_json("embed", slides, "--out", out, "--encoder", other_bundle, expect=1)
    said = failed["error"]["message"]
    assert out in said and "cannot be written" in said and "case-0" not in said


def test_a_slide_that_vanishes_after_it_was_listed_fails_alone(
    bucket, slides, other_bundle, tmp_path
):
    url, upload = bucket
    for path in slides.iterdir():
        upload(f"slides/{path.name}", path)
    jobs = find_inputs([f"{url}/slides"]).jobs
    upload.client.delete_object(Bucket=upload.name, Key="slides/case-1.tiff")
    choice = EncoderChoice(str(other_bundle), engine="onnxruntime")
    ran = run_here(jobs, choice, tmp_path / "out", EmbedOptions(**OPTIONS), lambda *_: None)
    assert states(ran) == {"case-0": "done", "case-1": "failed", "case-2": "done"}
    assert "case-1.tiff does not exist" in ran.results[1].reason


class Faulty(BaseHTTPRequestHandler):
    """Passes requests on to the S3 server, but answers some with errors, or cuts the answer short."""

    protocol_version = "HTTP/1.1"
    backend = ("127.0.0.1", 0)
    faults: dict[str, int] = {}
    lock = threading.Lock()

    def log_message(self, *_):
        pass

    def handle_any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.fault()
        if fault == "error":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        link = HTTPConnection(*self.backend, timeout=30)
        link.request(
            self.command, self.path, body, {k: v for k, v in self.headers.items() if k != "Host"}
        )
        answer = link.getresponse()
        content = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in {
                "transfer-encoding",
                "connection",
                "content-length",
                "date",
                "server",
            }:
                self.send_header(name, value)
        length = answer.getheader("Content-Length") or len(content)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content if fault != "cut" else content[: len(content) // 2])
        self.close_connection = self.close_connection or fault == "cut"

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

    def fault(self):
        with self.lock:
            for name, left in self.faults.items():
                kind, method, part = name.split(" ")
                if left and method == self.command and part in self.path:
                    self.faults[name] -= 1
                    return kind
        return ""


@pytest.fixture
def faulty(s3, monkeypatch):
    """The S3 server behind a proxy with faults: by ``kind method part-of-path``, how often."""
    Faulty.backend = ("127.0.0.1", int(s3.rsplit(":", 1)[1]))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Faulty)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(remote, "WAITS_S", (0.01, 0.02, 0.05))
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    yield Faulty.faults
    Faulty.faults.clear()
    s3fs.S3FileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()


def test_errors_in_between_are_repeated(bucket, faulty, slides, other_bundle, tmp_path):
    url, upload = bucket
    for path in slides.iterdir():
        upload(f"slides/{path.name}", path)
    jobs = find_inputs([f"{url}/slides"]).jobs
    faulty.update({"error GET case-0.tiff": 2, "cut GET case-1.tiff": 1, "error PUT case-2.h5": 2})
    choice = EncoderChoice(str(other_bundle), engine="onnxruntime")
    ran = run_here(jobs, choice, f"{url}/out", EmbedOptions(**OPTIONS), lambda *_: None)
    assert set(states(ran).values()) == {"done"}, [result.reason for result in ran.results]
    assert not any(faulty.values())
    here, _ = run([slides], tmp_path / "here", other_bundle)
    for one, two in zip(ran.results, here.results, strict=True):
        Remote(one.features).fetch(tmp_path / "copy.h5")
        copy = read_features(tmp_path / "copy.h5")
        assert np.array_equal(copy.features, read_features(Path(two.features)).features)


def test_errors_that_stay_are_reported(bucket, faulty, slides, other_bundle, tmp_path):
    url, upload = bucket
    for path in slides.iterdir():
        upload(f"slides/{path.name}", path)
    jobs = find_inputs([f"{url}/slides"]).jobs
    choice = EncoderChoice(str(other_bundle), engine="onnxruntime")
    faulty["error GET case-1.tiff"] = 10**6
    ran = run_here(jobs, choice, tmp_path / "out", EmbedOptions(**OPTIONS), lambda *_: None)
    assert states(ran) == {"case-0": "done", "case-1": "failed", "case-2": "done"}
    assert "case-1.tiff cannot be read after 4 attempts" in ran.results[1].reason
    faulty.clear()
    faulty["error PUT case-1.h5"] = 10**6
    ended = []
    with pytest.raises(StorageFailed, match=r"case-1\.h5 cannot be written after 4 attempts"):
        run_here(
            jobs, choice, f"{url}/out", EmbedOptions(**OPTIONS), lambda *_: None, results=ended
        )
    assert [result.name for result in ended] == ["case-0"]
    assert [key for key in upload.list() if key.endswith(".h5")] == [
        f"out/20x_96px_32px_overlap/features_other/case-{n}.h5" for n in (0,)
    ]
    faulty.clear()
    ran = run_here(jobs, choice, f"{url}/out", EmbedOptions(**OPTIONS), lambda *_: None)
    assert states(ran) == {"case-0": "skipped", "case-1": "done", "case-2": "done"}


def test_a_copy_that_fails_leaves_its_room_to_others(slides, other_bundle, tmp_path, monkeypatch):
    jobs = find_inputs([slides.as_uri()]).jobs
    size = max(part.size for job in jobs for part in job.parts)
    (tmp_path / "gone").mkdir()
    real = Remote.fetch

    def fetch(self, to, halted=None):
        if "case-1" not in self.url:
            raise BadInput(f"{self.url} cannot be read")
        real(self, to)

    monkeypatch.setattr(Remote, "fetch", fetch)
    monkeypatch.setenv("HISTOSEEK_STAGING", str(tmp_path / "staging"))
    ran, _ = run([slides.as_uri()], tmp_path / "out", other_bundle, staging_gb=1.5 * size / 1e9)
    assert states(ran) == {"case-0": "failed", "case-1": "done", "case-2": "failed"}
    assert not list((tmp_path / "staging").iterdir())


def test_the_same_slide_in_two_folders_is_embedded_twice(slides, other_bundle, tmp_path):
    for folder in ("a", "z"):
        (tmp_path / "d" / folder).mkdir(parents=True)
        shutil.copy(slides / "case-0.tiff", tmp_path / "d" / folder)
    for state in ("done", "skipped"):
        ran, _ = run([(tmp_path / "d").as_uri()], tmp_path / "out", other_bundle)
        assert list(states(ran).values()) == [state, state]
        assert len({result.features for result in ran.results}) == 2
        for result in ran.results:
            assert read_features(Path(result.features)).source == result.source


def test_a_scale_of_a_print_is_looked_at_again_when_one_is_assumed(
    make_slide, other_bundle, tmp_path
):
    (tmp_path / "slides").mkdir()
    make_slide(tmp_path / "slides" / "print.tiff", side=600, mpp=20)
    url = (tmp_path / "slides").as_uri()
    for options, state in (({}, "done"), ({}, "skipped"), ({"assume_mpp": 10.0}, "done")):
        ran, _ = run([url], tmp_path / "out", other_bundle, mpp=20.0, **options)
        assert states(ran) == {"print": state}, (options, ran.results[0].reason)


def test_a_slide_without_regions_fails_as_on_a_disk(slides, other_bundle, tmp_path):
    run([slides.as_uri()], tmp_path / "out", other_bundle)
    (tmp_path / "regions").mkdir()
    ran, _ = run([slides.as_uri()], tmp_path / "out", other_bundle, regions=tmp_path / "regions")
    assert {(r.state, "has no regions for case" in r.reason) for r in ran.results} == {
        ("failed", True)
    }


def test_features_at_a_file_url_are_added_and_named_by_it(slides, other_bundle, cli, tmp_path):
    out = tmp_path / ".work" / "features"
    run([slides], out, other_bundle)
    (out / "20x_96px_32px_overlap/features_other/broken.h5").write_bytes(b"no features")
    cli("index", "create", tmp_path / "atlas", "--encoder", other_bundle, check=True)
    done = cli("index", "add", tmp_path / "atlas", out.as_uri(), "--json")
    added = json.loads(done.stdout)["added"]
    assert sorted(one["state"] for one in added) == ["added", "added", "added", "failed"]
    assert all(one["file"].startswith(f"{out.as_uri()}/20x") for one in added)
    (failed,) = [one for one in added if one["state"] == "failed"]
    assert "histoseek-features" not in json.dumps(failed)
    assert "no .h5 files" in cli("index", "add", tmp_path / "atlas", slides.as_uri()).stderr


def test_names_that_lead_out_of_a_folder_are_refused():
    assert str(below("s3://b/x/a b/c%20.h5", "s3://b/x/")) == "a b/c%20.h5"
    for url in ("s3://b/x/../../etc/passwd", "s3://b/x", "s3://other/y"):
        with pytest.raises(BadInput, match="leads out of"):
            below(url, "s3://b/x")


def test_a_full_disk_while_copying_is_a_storage_error(slides, other_bundle, tmp_path, monkeypatch):
    from fsspec.implementations.local import LocalFileSystem

    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LocalFileSystem, "get_file", full)
    with pytest.raises(StorageFailed, match="no space left"):
        run([slides.as_uri()], tmp_path / "out", other_bundle)


def test_a_copy_ends_soon_when_asked_to(bucket, tmp_path):
    url, upload = bucket
    path = tmp_path / "large.bin"
    path.write_bytes(os.urandom(40 * 2**20))
    upload("large.bin", path)
    asked = []

    def halted():
        asked.append(len(asked))
        return len(asked) > 2

    with pytest.raises(Stopped):
        Remote(f"{url}/large.bin").fetch(tmp_path / "copy" / "large.bin", halted)
    assert len(asked) == 3 and not list((tmp_path / "copy").iterdir())


def test_folders_of_killed_processes_are_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("HISTOSEEK_STAGING", str(tmp_path))
    code = (
        "import os, signal; from histoseek.artifacts.files import temporary_folder\n"
        "with temporary_folder('slides') as folder:\n"
        "    (folder / 'x').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    other = tmp_path / "histoseek-slides-another.machine-999999-x"
    other.mkdir()
    assert len(list(tmp_path.iterdir())) == 2
    with temporary_folder("slides") as one, temporary_folder("slides") as two:
        assert sorted(tmp_path.iterdir()) == sorted([other, one, two])
    assert list(tmp_path.iterdir()) == [other]
    monkeypatch.setenv("HISTOSEEK_STAGING", str(Path(__file__) / "x"))
    with pytest.raises(StorageFailed, match="test_remote"), temporary_folder("slides"):
        pass


def test_what_a_pack_leaves_out_is_named_by_its_url(other_bundle, tile_folder, tmp_path):
    import tarfile

    (tile_folder / "notes.txt").write_text("x")
    with tarfile.open(tmp_path / "tiles.tar", "w") as pack:
        pack.add(tile_folder, "tiles")
    ran, _ = run([(tmp_path / "tiles.tar").as_uri()], tmp_path / "out", other_bundle)
    assert states(ran) == {"tiles": "done"}
    left_out = ran.results[0].left_out
    assert left_out and all(left["path"].startswith("file://") for left in left_out)


def test_copies_stay_within_the_limit_and_in_order(bucket, slides, tmp_path, monkeypatch):
    url, upload = bucket
    for path in slides.iterdir():
        upload(f"slides/{path.name}", path)
    monkeypatch.setenv("HISTOSEEK_STAGING", str(tmp_path / "staging"))
    jobs = find_inputs([f"{url}/slides"]).jobs
    size = max(part.size for job in jobs for part in job.parts)
    staging, copied = Staging(1.5 * size / 1e9, Meter()), []

    def copy(number):
        copied.append((number, staging.copy(jobs[number], number)))

    threads = [threading.Thread(target=copy, args=(n,), daemon=True) for n in (2, 1, 0)]
    for thread in threads:
        thread.start()
    for number in range(3):
        end = time.monotonic() + 20
        while len(copied) <= number and time.monotonic() < end:
            time.sleep(0.01)
        assert [n for n, _ in copied] == list(range(number + 1))
        time.sleep(0.1)
        assert len(copied) == number + 1  # the next one waits for room
        assert (
            copied[number][1].source.read_bytes() == (slides / f"case-{number}.tiff").read_bytes()
        )
        staging.free(jobs[number], number)
    staging.close()
    assert not list((tmp_path / "staging").iterdir())


def test_a_copy_that_does_not_fit_on_the_disk_is_refused(
    bucket, slides, other_bundle, tmp_path, monkeypatch
):
    url, upload = bucket
    upload("case.tiff", slides / "case-0.tiff")
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=10))
    with pytest.raises(
        StorageFailed, match=r"no space for a local copy of s3://.*HISTOSEEK_STAGING"
    ):
        run([f"{url}/case.tiff"], tmp_path / "out", other_bundle)


def test_a_mark_from_two_ranges_is_that_of_the_file(bucket, tmp_path):
    url, upload = bucket
    for size in (0, 10, 2**20, 2**20 + 1, 3 * 2**20):
        path = tmp_path / f"{size}.bin"
        path.write_bytes(os.urandom(size))
        upload(path.name, path)
        assert Remote(f"{url}/{path.name}").content_mark() == content_mark(path)


@pytest.mark.parametrize(
    ("scheme", "remedy"), [("s3", "; run: pip install 'histoseek[s3]'"), ("gs", "")]
)
def test_a_missing_package_of_a_store_is_named(monkeypatch, scheme, remedy):
    def missing(_):
        raise ImportError("install it")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(MissingPart) as caught:
        Remote(f"{scheme}://a/b")
    assert str(caught.value) == f"{scheme}://a/b: install it{remedy}"
