"""The command group `index`, used by a person or a program: output, exit codes, one JSON document."""

import numpy as np
import pytest
from atlases import DIM, features, filled, grouped
from PIL import Image


@pytest.fixture(scope="module")
def place(tmp_path_factory, tissue):
    folder = tmp_path_factory.mktemp("commands")
    filled(folder, slides=6, count=150)
    for name, corner in (("a", 0), ("b", 128), ("c", 256)):
        Image.fromarray(tissue[corner : corner + 224, :224]).save(folder / f"{name}.png")
    (folder / "bad.png").write_bytes(b"no picture")
    return folder


def test_search_with_filters_tiles_and_several_examples(place, cli_answers, cli):
    atlas = place / "atlas"
    hits = cli_answers(
        "index", "search", atlas, place / "a.png", "-k", 4, "--where", "organ = 'colon'"
    )
    assert len(hits[0]) == 4 and {h["label"] for h in hits[0]} == {"a"}
    tile = hits[0][0]["tile"]
    like = cli_answers("index", "search", atlas, "--tile", tile, "--without", "patient", "-k", 3)
    assert hits[0][0]["patient"] not in {h["patient"] for h in like[0]}
    one = cli_answers("index", "search", atlas, place / "a.png", "--tile", tile, "--together",
                   "--unlike", place / "c.png", "--unlike", 700, "--per-slide", "-k", 5)  # fmt: skip
    assert len(one) == 1 and len({h["slide"] for h in one[0]}) == 5
    least = hits[0][2]["score"] - 1e-6  # JSON has six digits of it
    near = cli_answers("index", "search", atlas, place / "a.png", "-k", 1000, "--least", least)
    assert all(h["score"] >= least for h in near[0]) and len(near[0]) >= 3
    mixed = cli_answers("index", "search", atlas, place / "bad.png", place / "b.png", expect=1)
    assert "error" in mixed[0] and len(mixed[1]) == 10
    words = "--tile", tile, "--unlike", 7, "--leave-out", "patient", "--least", least
    (both,) = cli_answers("index", "search", atlas, *words, "-k", 4)
    assert hits[0][0]["patient"] not in {h["patient"] for h in both}
    assert [h["rank"] for h in both] == list(range(1, len(both) + 1))
    text = cli("index", "search", atlas, place / "a.png", "-k", 2)
    assert "slide-" in text.stdout and text.returncode == 0


@pytest.mark.parametrize(
    "words, said",
    [
        (["search"], "no query was given"),
        (["search", "--tile", "999999"], "has no tile 999999"),
        (["search", "--tile", "1", "--without", "hospital"], "tile, slide, patient"),
        (["search", "{a}", "--leave-out", "slide"], "is for --tile only"),
        (["fit", "--k", "100000"], "too few for k = 100000; expected at least 100001"),
        (
            ["search", "--tile", "1", "--engine", "milvus://x"],
            "searches one atlas with images and texts only",
        ),
        (["search", "{a}", "--where", "organ ="], "cannot be read at character"),
        (["search", "{a}", "--where", "grade = 1"], "unknown field 'grade'"),
        (["search", "{a}", "--engine", "http://x"], "is not a Milvus address"),
        (["search", "{bad}", "--together"], "bad.png"),
        (["similar", "nope"], "unknown slide 'nope'"),
        (["similar", "slide-0", "--by", "hospital"], "patient, slide"),
        (["remove", "nope"], "unknown slide 'nope'"),
        (["relabel", "--metadata", "{bad}.csv"], "cannot be read"),
        (["tune", "--recall", "2"], "expected 0.5 to 1"),
        (["tune", "--memory-mb", "0.001"], "too few to compress"),
        (["name", "0", "x", "--clusters", "none"], "no clusters yet"),
        (["drift"], "no clusters yet"),
        (["evaluate", "--label", "grade"], "unknown column 'grade'"),
        (["leakage", "--split", "grade"], "unknown column 'grade'"),
        (["export", "--out", "{a}"], "exists already"),
        (["export", "--out", "x.npz", "--like", "3"], "--to geojson"),
        (["push", "ftp://x"], "is not a Milvus address"),
        (["import", "{empty}", "--encoder", "uni"], "has no .h5 files"),
        (["snapshot", "--out", "{atlas}/inside"], "is inside the atlas"),
    ],
)
def test_what_is_refused_is_refused_in_words(place, cli, words, said):
    (place / "empty").mkdir(exist_ok=True)
    known = {"a": place / "a.png", "bad": place / "bad.png", "empty": place / "empty",
             "atlas": place / "atlas"}  # fmt: skip
    command, *rest = (word.format(**known) for word in words)
    done = cli("index", command, place / "atlas", *rest)
    assert done.returncode == 1 and said in " ".join(done.stderr.split()), done.stderr + done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("share", [0.0, 0.9])
def test_an_image_that_is_no_tissue_is_named_unless_the_atlas_has_none(
    place, cli, monkeypatch, share
):
    from histoseek.index.atlas import Atlas

    monkeypatch.setattr(Atlas, "out_of_distribution_share", lambda _: share)
    Image.new("RGB", (300, 300), "white").save(place / "white.png")
    for more in ((), ("--mpp", 0.5)):
        said = cli("index", "search", place / "atlas", place / "white.png", *more).stdout
        assert ("unlike the stained tissue" in " ".join(said.split())) == (share == 0)


def test_clusters_are_fitted_shown_named_and_watched(place, cli_json, cli_answers, cli):
    atlas = place / "atlas"
    curve = cli_json("index", "curve", atlas)["curve"]
    assert [row["k"] for row in curve][:3] == [2, 3, 4] and 0 <= curve[0]["stability"] <= 1
    fitted = cli_json("index", "fit", atlas, "--method", "kmeans", "--k", 4)
    assert sum(fitted["sizes"].values()) == 900
    cli("index", "name", atlas, 2, "stroma", "--description", "pink", check=True)
    rows = cli_json("index", "clusters", atlas, "--examples", 2)
    assert rows[2]["name"] == "stroma" and len(rows[2]["examples"]) == 2
    (placed,) = cli_answers("index", "assign", atlas, place / "a.png")
    assert placed["name"] == ("stroma" if placed["cluster"] == 2 else "")
    assert placed["foreign"] is True, "the gate takes this stain for no tissue"
    assert cli_json("index", "drift", atlas)["drifted"] is False
    for command in (["curve"], ["clusters"], ["drift"], ["stats"]):
        text = cli("index", command[0], atlas)
        assert text.returncode == 0 and text.stdout.strip(), command
    strange = features(place / "strange.h5", 300, 9)
    cli("index", "add", atlas, strange, check=True)
    assert cli_json("index", "drift", atlas, expect=1)["drifted"] is True
    cli("index", "remove", atlas, "strange", check=True)


def test_labels_snapshot_tune_audit_and_repair(place, cli_json, cli):
    atlas = place / "atlas"
    (place / "new.csv").write_text("slide,label,stage\nslide-5,c,III\n")
    assert cli_json("index", "relabel", atlas, "--metadata", place / "new.csv") == {
        "changed": 1, "slides_without_row": [f"slide-{n}" for n in range(5)], "notes": []
    }  # fmt: skip
    assert cli_json("index", "stats", atlas)["labels"]["c"] == 150
    cli("index", "snapshot", atlas, "--out", place / "copy", check=True)
    cli("index", "remove", atlas, "slide-4", "slide-5", check=True)
    report = cli_json("index", "audit", atlas, "--queries", 50, "--where", "label = 'a'")
    assert report["recall"] == 1 and report["tiles"] == 600
    assert cli_json("index", "tune", atlas, "--recall", 1)["plan"]["kind"] == "flat"
    next((atlas).glob("index-*.faiss")).unlink()
    broken = cli_json("index", "verify", atlas, expect=1)
    assert len(broken["problems"]) == 1
    mended = cli_json("index", "verify", atlas, "--repair")
    assert mended["ok"] and mended["repaired"] == ["the index was rebuilt"]
    back = cli_json("index", "restore", place / "copy", atlas)
    assert back["kept"].endswith("atlas.before-restore-1")
    assert cli_json("index", "stats", atlas)["slides"] == 6
    for words in (["audit", "--queries", "20"], ["tune"], ["verify"]):
        text = cli("index", words[0], atlas, *words[1:])
        assert text.returncode == 0 and text.stdout.strip()


def test_similar_duplicates_and_leaks(place, cli_json, cli_answers, cli):
    atlas = place / "atlas"
    found = cli_answers("index", "similar", atlas, "slide-0", "-k", 3)
    assert [f["rank"] for f in found] == [1, 2, 3] and "slide-1" not in {f["name"] for f in found}
    assert found[0]["evidence"][0]["match"]["slide"] == found[0]["name"]
    assert "most similar tile at" in cli("index", "similar", atlas, "P1", "--by", "patient").stdout
    new = features(place / "new-case.h5", 50, 3)
    assert len(cli_answers("index", "similar", atlas, "--features", new, "-k", 4)) == 4
    assert cli("index", "similar", atlas).returncode == 1
    assert cli_json("index", "duplicates", atlas)["groups"] == 0
    report = cli_json("index", "leakage", atlas, "--split", "organ", expect=1)
    assert report["parts"][0]["patients_in_both"] == 3  # each patient has a slide of either organ
    assert "LEAK" in cli("index", "leakage", atlas, "--split", "organ").stdout
    assert "0 groups" in cli("index", "duplicates", atlas, "--least", "0.9999").stdout


def test_exports_and_imports_from_the_command_line(place, cli_json, cli):
    atlas = place / "atlas"
    done = cli_json(
        "index", "export", atlas, "--out", place / "lung.npz", "--where", "organ = 'lung'"
    )
    assert done["tiles"] == 450
    with np.load(place / "lung.npz") as stored:
        organs = stored["names_organ"][stored["codes_organ"]]
        assert set(organs.tolist()) == {"lung"} and stored["vectors"].shape == (450, DIM)
    import h5py

    (place / "foreign").mkdir()
    for number in range(2):
        with h5py.File(place / f"foreign/f{number}.h5", "w") as out:
            out["features"] = grouped(np.random.default_rng(number), 30)
            out["coords"] = np.zeros((30, 2), np.int32)
    (place / "foreign.csv").write_text("slide,label\nf0,x\nf9,y\n")
    report = cli_json("index", "import", place / "uni", place / "foreign", "--encoder", "uni",
                      "--metadata", place / "foreign.csv")  # fmt: skip
    assert report["ok"] and report["metadata_of_other_slides"] == ["f9"]
    assert (
        "unchanged"
        in cli("index", "import", place / "uni", place / "foreign", "--encoder", "uni").stdout
    )
    assert cli_json("index", "stats", place / "uni")["tiles"] == 60


def test_an_empty_atlas_and_empty_answers_are_said(tmp_path, cli):
    atlas = filled(tmp_path, slides=2, count=40)
    atlas.fit("kmeans", k=3)
    cli("index", "create", tmp_path / "empty", check=True)
    done = cli("index", "evaluate", tmp_path / "empty", "--label", "label")
    assert done.returncode == 1 and "has no tiles yet" in done.stderr
    done = cli("index", "search", atlas.path, "--tile", 1, "--where", "organ = 'colom'", check=True)
    assert "no tile passes --where" in done.stdout
    done = cli("index", "search", atlas.path, "--tile", 1, "--where", "")
    assert done.returncode == 1 and "the filter is empty" in done.stderr
    done = cli("index", "audit", atlas.path, "--where", "organ = 'colon'", check=True)
    assert "tiles that pass organ = 'colon'" in done.stdout and "40" in done.stdout
    done = cli("index", "drift", atlas.path, check=True)
    assert "no tiles were added after the fit" in done.stdout
