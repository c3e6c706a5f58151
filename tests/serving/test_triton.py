"""The encoder on a Triton server: tests with the real server, including every kind of failure."""

import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest

from histoseek.artifacts.feature_files import read_features
from histoseek.artifacts.files import sha256_file
from histoseek.artifacts.manifest import read_manifest
from histoseek.artifacts.tileset_files import open_tiles
from histoseek.artifacts.tilesets import sample_tiles
from histoseek.errors import BadInput, Mismatch, Unavailable
from histoseek.export.options import TritonOptions
from histoseek.export.triton import write_repository
from histoseek.serving.embedding.jobs import find_jobs
from histoseek.serving.embedding.pipeline import embed_jobs
from histoseek.serving.embedding.results import EmbedOptions
from histoseek.serving.encoders.onnx import OnnxEncoder
from histoseek.serving.encoders.open import DEFAULT_BUNDLE, open_encoder
from histoseek.serving.encoders.triton_address import parse_address

MODEL = "other"


@pytest.fixture
def repository(tmp_path, other_bundle):
    """Write a repository; ``parameters`` make the stand-in backend slow or failing."""

    def write(folder=tmp_path / "models", bundle=other_bundle, parameters=(), **options):
        write_repository([bundle], folder, TritonOptions(**options))
        config = folder / MODEL / "config.pbtxt"
        lines = [
            f'parameters {{ key: "{k}" value: {{ string_value: "{v}" }} }}\n' for k, v in parameters
        ]
        config.write_text(config.read_text() + "".join(lines))
        return folder

    return write


@pytest.fixture(scope="module")
def tiles(tile_folder):
    return sample_tiles(open_tiles(tile_folder), 96, 40)


@pytest.fixture
def slides(make_slide, tmp_path):
    (tmp_path / "slides").mkdir()
    return [make_slide(tmp_path / f"slides/case-{n}.tiff", side=900, seed=n) for n in range(5)]


def embed(slides, encoder, out, progress=lambda *_: None, **options):
    return embed_jobs(find_jobs(slides), encoder, out, EmbedOptions(**options), progress)


def exported_anew(bundle, folder):
    """The same encoder in another file: another sha256, the same embeddings."""
    shutil.copytree(bundle, folder)
    model = onnx.load(folder / "encoder.onnx")
    model.doc_string = "a later export"
    onnx.save(model, folder / "encoder.onnx")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"] = sha256_file(folder / "encoder.onnx")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def shuffled(path):
    """A graph of the same shape whose weights are in disorder."""
    model, rng = onnx.load(path), np.random.default_rng(0)
    for weight in model.graph.initializer:
        if len(weight.raw_data) > 2000:
            values = rng.permutation(onnx.numpy_helper.to_array(weight).ravel())
            changed = values.reshape(tuple(weight.dims))
            weight.CopyFrom(onnx.numpy_helper.from_array(changed, weight.name))
    return model


def check_all_there(out, slides, bundle, **options):
    """Every slide has its file once, with the embeddings that the bundle gives in process."""
    local = OnnxEncoder(bundle, batch=8)
    results = embed(slides, local, out.parent / "in process", **options)
    for result in results:
        right = read_features(Path(result.features))
        (path,) = out.rglob(f"{right.name}.h5")
        found = read_features(path)
        assert np.array_equal(found.coords, right.coords)
        assert np.abs(found.features - right.features).max() < 1e-5
    assert len(list(out.rglob("*.h5"))) == len(slides)
    assert not list(out.rglob("*.histoseek-tmp"))


@pytest.mark.parametrize("options", ["", "?shm=1", "?in_flight=1"])
def test_embeddings_are_the_bundles_whatever_the_way(
    repository, triton, other_bundle, tiles, options
):
    server = triton(repository(max_batch=16))
    encoder = open_encoder(server.url(MODEL, options), read_manifest(other_bundle))
    expected = OnnxEncoder(other_bundle, batch=8).embed(tiles)
    assert np.abs(encoder.embed(tiles) - expected).max() < 1e-6
    assert encoder.batch == 16
    wanted = "system shared memory" if "shm" in options else "grpc"
    assert encoder.describe()["transport"] == wanted and not encoder.notes
    many = np.tile(tiles, (5, 1, 1, 1))  # more than one request in flight at a time
    assert np.abs(encoder.embed(many) - np.tile(expected, (5, 1))).max() < 1e-6
    encoder.close()
    left = [name for name in os.listdir("/dev/shm") if name.startswith(f"histoseek-{os.getpid()}")]
    assert not left


def test_a_server_that_is_not_there_is_named_after_the_deadline():
    started = time.monotonic()
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:9.*run the same command again"):
        open_encoder("triton://127.0.0.1:9/any?deadline=1")
    assert time.monotonic() - started < 15


def test_a_missing_model_names_those_that_are_there(repository, triton):
    server = triton(repository(max_batch=4))
    with pytest.raises(BadInput, match="models that are ready: other"):
        open_encoder(server.url("nothing"))
    with pytest.raises(BadInput, match="this model is not ready"):
        open_encoder(server.url(MODEL, "@7"))


def test_another_encoder_behind_the_name_is_refused(repository, triton, other_bundle):
    folder = repository(max_batch=4)
    model = shuffled(folder / MODEL / "1/model.onnx")
    server = triton(folder)
    with pytest.raises(Mismatch, match="is not histoseek-he-small-3"):
        open_encoder(server.url(MODEL), read_manifest(DEFAULT_BUNDLE))
    server.stop()
    onnx.save(model, folder / MODEL / "1/model.onnx")  # same name, same shape, other weights
    server.start()
    with pytest.raises(Mismatch, match="was replaced"):
        open_encoder(server.url(MODEL), read_manifest(other_bundle))


def test_a_model_that_says_nothing_of_its_encoder_is_refused(repository, triton):
    folder = repository(max_batch=4)
    config = folder / MODEL / "config.pbtxt"
    lines = [line for line in config.read_text().splitlines() if "histoseek_manifest" not in line]
    config.write_text("\n".join(lines))
    with pytest.raises(Mismatch, match="histoseek triton repository"):
        open_encoder(triton(folder).url(MODEL))


@pytest.mark.parametrize("options", ["", "&shm=1"])
def test_a_server_killed_and_restarted_in_mid_run_costs_nothing(
    repository, triton, other_bundle, slides, tmp_path, options
):
    folder = repository(max_batch=8, parameters=[("test_delay_s", "0.02")])
    server = triton(folder)
    encoder = open_encoder(server.url(MODEL, f"?deadline=60{options}"))
    again = threading.Event()

    def restart():
        server.kill()
        time.sleep(1.0)
        server.start()

    def progress(done, total, text):
        if done > 8 and not again.is_set():
            again.set()
            threads.append(threading.Thread(target=restart))
            threads[0].start()

    threads = []
    results = embed(slides, encoder, tmp_path / "out", progress, overlap_px=48)
    threads[0].join()
    assert [r.state for r in results] == ["done"] * 5
    check_all_there(tmp_path / "out", slides, other_bundle, overlap_px=48)
    encoder.close()


def test_a_server_that_comes_back_with_another_encoder_is_not_believed(
    repository, triton, other_bundle, tiles, tmp_path
):
    server = triton(repository(max_batch=8))
    encoder = open_encoder(server.url(MODEL, "?deadline=30"))
    assert encoder.embed(tiles).shape == (40, 16)
    server.kill()
    changed = exported_anew(other_bundle, tmp_path / "changed")
    server.repository = repository(tmp_path / "others", changed, max_batch=8)
    server.start()
    with pytest.raises(Mismatch, match="now serves encoder other|is not other"):
        encoder.embed(tiles)
    encoder.close()


def test_a_full_queue_is_waited_for(repository, triton, other_bundle, tiles):
    folder = repository(
        max_batch=2, queue=1, instances=1, delay_us=0, parameters=[("test_delay_s", "0.05")]
    )
    server = triton(folder)
    encoder = open_encoder(server.url(MODEL, "?in_flight=16&deadline=60"))
    seen = []
    retry = encoder._retry

    def counted(call):
        def once():
            seen.append(None)
            return call()

        return retry(once)

    encoder._retry = counted
    expected = OnnxEncoder(other_bundle, batch=8).embed(np.tile(tiles, (4, 1, 1, 1)))
    found = encoder.embed(np.tile(tiles, (4, 1, 1, 1)))
    assert np.abs(found - expected).max() < 1e-6
    assert len(seen) > 80  # 80 requests, and some of them more than once
    encoder.close()


def test_requests_that_take_too_long_end_the_run_and_keep_what_is_done(
    repository, triton, slides, tmp_path
):
    server = triton(repository(max_batch=64))
    out = tmp_path / "out"
    encoder = open_encoder(server.url(MODEL))
    embed(slides[:2], encoder, out)
    encoder.close()
    server.stop()
    repository(max_batch=64, parameters=[("test_delay_s", "1.5")])
    server.start()
    encoder = open_encoder(server.url(MODEL, "?timeout=5&deadline=1"))
    object.__setattr__(encoder.address, "timeout_s", 0.3)  # the start-up check may take longer
    with pytest.raises(Unavailable, match="DEADLINE_EXCEEDED.*finished slides are kept"):
        embed(slides, encoder, out)
    assert sorted(p.stem for p in out.rglob("*.h5")) == ["case-0", "case-1"]
    assert not list(out.rglob("*.histoseek-tmp"))


def test_what_the_server_refuses_fails_its_slide_and_no_other(
    repository, triton, slides, tmp_path, cli
):
    server = triton(repository(max_batch=64))
    encoder = open_encoder(server.url(MODEL))
    embed(slides[:1], encoder, tmp_path / "out")
    real, calls = encoder._infer, []

    def refuse_once(slot, tiles):
        calls.append(len(tiles))
        if len(calls) == 1:  # a request that no server takes: more tiles than a batch
            tiles = np.concatenate([tiles] * 65)
        return real(slot, tiles)

    encoder._infer = refuse_once
    results = embed(slides, encoder, tmp_path / "out", jobs=1)
    states = [r.state for r in results]
    assert sorted(states) == ["done"] * 3 + ["failed"] + ["skipped"]
    (failed,) = [r for r in results if r.state == "failed"]
    assert "refused the tiles" in failed.reason and "INVALID_ARGUMENT" in failed.reason
    encoder.close()


def test_a_server_that_fails_inside_is_recorded_and_the_exit_code_tells(
    repository, triton, make_slide, slides, tmp_path, cli
):
    server = triton(repository(max_batch=16, parameters=[("test_fail", "no room on the device")]))
    black = make_slide(tmp_path / "slides/black.tiff", pixels=np.zeros((400, 400, 3), np.uint8))
    done = cli(
        "embed", black, slides[0], "--out", tmp_path / "out", "--min-tissue", 0,
        "--encoder", server.url(MODEL), "--json",
    )  # fmt: skip
    assert done.returncode == 1
    results = {r["name"]: r for r in json.loads(done.stdout)["results"]}
    assert results["case-0"]["state"] == "done" and results["black"]["state"] == "failed"
    assert "no room on the device" in results["black"]["reason"]


def test_without_room_for_shared_memory_tiles_go_by_grpc_and_it_is_said(
    repository, triton, slides, tmp_path, cli_process
):
    """A limit on file size makes /dev/shm refuse the region, as a full one does."""
    server = triton(repository(max_batch=64))
    limit = 400_000
    done = cli_process(
        "embed", slides[0], "--out", tmp_path / "out", "--json",
        "--encoder", server.url(MODEL, "?shm=1"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    told = json.loads(done.stdout)["encoder"]
    assert told["transport"] == "grpc" and "shared memory cannot be used" in told["notes"][0]


def test_a_server_without_shared_memory_of_its_own_is_named(
    repository, triton, slides, tmp_path, cli
):
    """The python backend's region cannot grow: the server answers with its own failure."""
    limit = 3_000_000
    server = triton(
        repository(max_batch=64),
        extra=["--backend-config=python,shm-default-byte-size=1048576"],
        preexec=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    url = server.url(MODEL, "?deadline=3&timeout=10")
    done = cli("embed", *slides, "--out", tmp_path / "out", "--overlap", 60, "--encoder", url)
    assert done.returncode == 1
    assert "Triton at 127.0.0.1" in done.stderr + done.stdout
    assert len(list((tmp_path / "out").rglob("*.histoseek-tmp"))) == 0


def test_ctrl_c_stops_cleanly_and_the_run_can_be_taken_up(
    repository, triton, other_bundle, slides, tmp_path
):
    server = triton(repository(max_batch=4, parameters=[("test_delay_s", "0.1")]))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "histoseek", "embed", *map(str, slides), "--out", str(out)]
    command += ["--encoder", server.url(MODEL), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not list(out.rglob("*.h5")) and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and "repeat the command" in said, said
    done = {p.stem for p in out.rglob("*.h5")}
    assert 1 <= len(done) < 5 and not list(out.rglob("*.histoseek-tmp"))
    finished = subprocess.run(command, capture_output=True, text=True, timeout=200)
    states = {r["name"]: r["state"] for r in json.loads(finished.stdout)["results"]}
    assert {n for n, s in states.items() if s == "skipped"} == done
    assert set(states.values()) == {"skipped", "done"}
    check_all_there(out, slides, other_bundle)


def test_tls_and_a_token(repository, triton, tmp_path, monkeypatch, tiles):
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
         "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    server = triton(
        repository(max_batch=16),
        extra=["--grpc-use-ssl=true", f"--grpc-server-cert={certificate}",
               f"--grpc-server-key={key}"],
    )  # fmt: skip
    url = server.url(MODEL, "?deadline=2").replace("triton://", "tritons://")
    with pytest.raises(Unavailable):  # nobody vouches for the certificate
        open_encoder(url)
    monkeypatch.setenv("HISTOSEEK_TRITON_CA", str(certificate))
    monkeypatch.setenv("HISTOSEEK_TRITON_TOKEN", "secret")
    encoder = open_encoder(url)
    assert encoder.embed(tiles).shape == (40, 16)
    assert encoder._headers == {"authorization": "Bearer secret"}
    encoder.close()
    monkeypatch.setenv("HISTOSEEK_TRITON_CA", str(tmp_path / "nothing.pem"))
    with pytest.raises(BadInput, match="HISTOSEEK_TRITON_CA"):
        open_encoder(url)
    with pytest.raises(BadInput, match="not encrypted"):
        open_encoder("triton://triton.example:8001/m")


@pytest.mark.parametrize(
    "spec",
    [
        "triton://host/model", "triton://host:8001", "triton://host:8001/", "http://host:8001/m",
        "triton://host:99999/m", "triton://host:8001/m@x", "triton://host:8001/../m",
        "triton://host:8001/m?shm=2", "triton://host:8001/m?fast=1", "triton://u:p@host:8001/m",
        "triton://host:8001/m?timeout=-1", "triton://host:8001/m?in_flight=0",
    ],
)  # fmt: skip
def test_an_address_that_is_none_is_refused_with_what_was_expected(spec):
    with pytest.raises(BadInput, match="expected"):
        parse_address(spec)


def test_an_address_says_everything():
    found = parse_address("tritons://[::1]:8001/m-1.x@12?shm=1&timeout=2.5&deadline=9&in_flight=7")
    assert (found.host, found.model, found.version) == ("[::1]:8001", "m-1.x", "12")
    assert found.tls and found.is_loopback and found.shm == "system"
    assert (found.timeout_s, found.deadline_s, found.in_flight) == (2.5, 9, 7)


def test_a_batch_over_the_servers_limit_is_refused(repository, triton):
    server = triton(repository(max_batch=4))
    with pytest.raises(BadInput, match="at most 4 tiles"):
        open_encoder(server.url(MODEL), batch=5)


@pytest.mark.parametrize("options", ["", "?shm=1"])
@pytest.mark.parametrize("how", ["interrupt", "away"])
def test_a_large_slide_in_the_middle_is_left_at_once(
    repository, triton, make_slide, tmp_path, options, how, monkeypatch
):
    """More workers than slots, more pieces than workers: nobody may wait for a slot for ever."""
    server = triton(repository(max_batch=16, parameters=[("test_delay_s", "0.2")]))
    slide = make_slide(tmp_path / "large.tiff", side=2400)
    sign = "&" if options else "?"
    encoder = open_encoder(server.url(MODEL, f"{options}{sign}deadline=2"))
    whole, calls = encoder.embed, itertools.count()

    def embed_some(tiles):
        if how == "away" and next(calls) == 2:  # most of the slide is still to be embedded
            server.kill()
        return whole(tiles)

    def progress(done, total, text):
        if how == "interrupt" and done > 60:
            raise KeyboardInterrupt

    monkeypatch.setattr(encoder, "embed", embed_some)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt if how == "interrupt" else Unavailable):
        embed([slide], encoder, tmp_path / "out", progress)
    assert time.monotonic() - started < 40
    assert not list((tmp_path / "out").rglob("*.h5"))
    left = [name for name in os.listdir("/dev/shm") if name.startswith(f"histoseek-{os.getpid()}")]
    assert not left
    with pytest.raises(Unavailable, match="closed"):
        encoder.embed(np.zeros((1, 96, 96, 3), np.uint8))


def test_a_model_exchanged_while_the_server_was_away_is_noticed(repository, triton, tiles):
    folder = repository(max_batch=16)
    server = triton(folder)
    encoder = open_encoder(server.url(MODEL, "?deadline=30"))
    encoder.embed(tiles)
    server.kill()
    model = shuffled(folder / MODEL / "1/model.onnx")
    onnx.save(model, folder / MODEL / "1/model.onnx")
    seen = threading.Thread(target=server.start)
    seen.start()
    with pytest.raises(Mismatch, match="was replaced"):
        encoder.embed(tiles)
    seen.join()
    encoder.close()


def test_a_request_that_timed_out_in_shared_memory_is_tried_again_in_fresh_memory(
    repository, triton, other_bundle, tiles
):
    server = triton(repository(max_batch=64, instances=1, parameters=[("test_delay_s", "0.6")]))
    encoder = open_encoder(server.url(MODEL, "?shm=1&deadline=60"))
    slow = encoder.address.timeout_s
    object.__setattr__(encoder.address, "timeout_s", 0.3)
    timer = threading.Timer(2.0, object.__setattr__, (encoder.address, "timeout_s", slow))
    timer.start()
    found = encoder.embed(tiles)
    assert np.abs(found - OnnxEncoder(other_bundle, batch=8).embed(tiles)).max() < 1e-6
    assert encoder.describe()["transport"] == "system shared memory"
    timer.join()
    encoder.close()


def test_a_newer_version_does_not_disturb_a_run(repository, triton, other_bundle, tiles, tmp_path):
    folder = repository(max_batch=16)
    server = triton(folder, extra=["--model-control-mode=poll", "--repository-poll-secs=1"])
    encoder = open_encoder(server.url(MODEL))
    expected = encoder.embed(tiles)
    changed = exported_anew(other_bundle, tmp_path / "changed")
    (written,) = write_repository([changed], folder, TritonOptions(max_batch=16))
    assert written.version == 2
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            later = open_encoder(server.url(MODEL, "?deadline=5"))
        except Unavailable:
            continue
        later.close()
        if later.version == "2":
            break
    assert later.version == "2"
    assert np.array_equal(encoder.embed(tiles), expected) and encoder.version == "1"
    encoder.close()
