"""Annotations over HTTP: GeoJSON in and out, who stored them, and what is refused."""

import base64
import json

import pytest

from histoseek.errors import NotFound
from histoseek.ui.access.policy import Access

HERE = "/v1/slides/case-1/annotations"
RING = [[100, 100], [900, 100], [900, 900], [100, 900], [100, 100]]


def feature(label="tumour", ring=RING, **more):
    geometry = {"type": "Polygon", "coordinates": [ring]}
    properties = {"objectType": "annotation", "classification": {"name": label}}
    return {"type": "Feature", "geometry": geometry, "properties": properties, **more}


def collection(*features):
    return {"type": "FeatureCollection", "features": list(features)}


def login(user):
    return {"authorization": "Basic " + base64.b64encode(f"{user}:sesame".encode()).decode()}


def test_annotations_are_stored_with_who_did_it_and_searched(serve, own_atlas):
    access = Access({"ann": "sesame", "bob": "sesame"}, roles={"bob": "reader"})
    one = serve(own_atlas, access)
    client, ann, bob = one.client, login("ann"), login("bob")
    assert client.get(HERE, headers=bob).json() == {**collection(), "frame_unknown": False}
    assert client.post(HERE, json=collection(feature()), headers=bob).status_code == 403
    stored = client.post(HERE, json=collection(feature(), feature("stroma")), headers=ann).json()
    assert len(stored["added"]) == 2 and stored["skipped"] == {}
    first, second = client.get(HERE, headers=bob).json()["features"]
    assert first["properties"]["author"] == "ann" and first["geometry"]["coordinates"] == [RING]
    assert second["properties"]["classification"]["name"] == "stroma"
    asked = {"like": [1], "k": 60, "where": "annotation.label = 'tumour'"}
    hits = client.post("/v1/search", json=asked, headers=bob).json()["hits"]
    assert hits and {hit["slide"] for hit in hits} == {"case-1"}
    inside = [100 <= hit[key] + hit["size_px_level0"] / 2 <= 900 for hit in hits for key in "xy"]
    assert all(inside)
    changed = client.post(HERE, json=collection({**second, "id": first["id"]}), headers=ann)
    assert changed.json()["changed"] == [first["id"]]
    assert client.delete(f"/v1/annotations/{second['id']}", headers=bob).status_code == 403
    assert client.delete(f"/v1/annotations/{second['id']}", headers=ann).status_code == 200
    assert len(client.get(HERE, headers=ann).json()["features"]) == 1
    lines = [line for line in one.lines() if "annot" in line["action"]]
    assert [line["action"] for line in lines] == ["annotate", "annotate", "remove_annotation"]
    assert {line["user"] for line in lines} == {"ann"} and lines[0]["labels"] == [
        "stroma",
        "tumour",
    ]
    gone = client.delete("/v1/slides/case-1", headers=ann).json()
    assert gone["annotations"] == 1


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (collection(feature(ring=[[0, 0], [1, 1]])), 422, "cannot be read"),
        (collection(feature(ring=[[0, 0], [1, 1], [2, 2]])), 422, "has no area"),
        (collection(feature(ring=[[0, 0], [2e9, 0], [0, 9]])), 422, "corner beyond"),
        (collection(feature(ring=[[10**400, 0], [0, 9], [9, 0]])), 422, ""),
        (collection(feature(ring=[["a", 0], [0, 9], [9, 0]])), 422, "cannot be read"),
        (collection(feature("x" * 201)), 422, "at most 200"),
        (collection({"type": "Feature", "geometry": {"type": "Polygon"}}), 422, "cannot be read"),
        ({"type": "FeatureCollection"}, 422, "features"),
        (collection(feature("\ud800")), 422, ""),
        (collection(feature(id="\ud800")), 422, ""),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused(body, status, message, client):
    kind = {"content-type": "application/json"}
    reply = client.post(HERE, content=json.dumps(body), headers=kind)
    assert reply.status_code == status and message in reply.json()["error"]["message"]
    assert client.get(HERE).json()["features"] == []


def test_what_is_no_region_is_named(client):
    point = {"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 2]}}
    cell = feature()
    cell["properties"]["objectType"] = "cell"
    former = {**feature(), "id": "PathCellObject"}
    del former["properties"]["objectType"]
    odd, empty = feature(), feature()
    odd["properties"]["objectType"] = []
    empty["geometry"]["coordinates"] = []
    body = collection(point, cell, {"type": "Feature"}, former, odd, empty)
    assert client.post(HERE, json=body).json()["skipped"] == {
        "Point, which has no area": 1, "cell, not an annotation": 2, "nothing, which has no area": 1,
        "[], not an annotation": 1, "Polygon, which has no area": 1,
    }  # fmt: skip


def test_qupaths_frame_is_that_of_the_slide_or_said_to_be_unknown(serve, own_atlas, monkeypatch):
    """If the features do not state the scanned area, the slide's file does."""
    one = serve(own_atlas)
    about = one.session.viewer.pyramid("case-1")
    monkeypatch.setattr("histoseek.ui.api.viewer_routes.origin", lambda *_: None)
    monkeypatch.setattr(one.session.viewer, "pyramid", lambda _: about._replace(left=100, top=40))
    assert not one.client.post(f"{HERE}?frame=qupath", json=collection(feature())).json()[
        "frame_unknown"
    ]
    (stored,) = one.session.atlas.annotations("case-1")
    assert stored.polygons[0][0][0].tolist() == [200, 140]
    seen = one.client.get(f"{HERE}?frame=qupath").json()
    assert seen["features"][0]["geometry"]["coordinates"] == [RING] and not seen["frame_unknown"]

    def gone(_):
        raise NotFound("its file was moved")

    monkeypatch.setattr(one.session.viewer, "pyramid", gone)
    assert one.client.get(f"{HERE}?frame=qupath").json()["frame_unknown"]
    assert one.client.post(f"{HERE}?frame=qupath", json=collection(feature())).json()[
        "frame_unknown"
    ]


def test_only_slides_have_annotations(client):
    assert client.get("/v1/slides/none/annotations").status_code == 404
    assert client.post("/v1/slides/none/annotations", json=collection(feature())).status_code == 404
    assert client.delete("/v1/annotations/none").status_code == 404
    sets = [s["name"] for s in client.get("/v1/slides").json()["slides"] if s["kind"] != "slide"]
    refused = client.post(f"/v1/slides/{sets[0]}/annotations", json=collection(feature()))
    assert refused.status_code == 404 and "set of ready tiles" in refused.text


def test_an_annotation_without_an_id_is_stored_once(serve, own_atlas):
    client = serve(own_atlas).client
    for name in ("added", "unchanged"):
        answer = client.post(HERE, json=collection(feature(), feature("b", id=0))).json()
        assert len(answer[name]) == 2, answer
