"""The slide viewer in a real browser: regions, hits in place, layers, annotations."""

import json

import pytest
from loopback import free_port, up
from pages import opened, pictures_are_there, shot, tab

from histoseek.artifacts.geojson import area_of
from histoseek.index.atlas import Atlas
from histoseek.serving.embedding.jobs import find_jobs
from histoseek.serving.embedding.pipeline import embed_jobs
from histoseek.serving.embedding.results import EmbedOptions
from histoseek.serving.encoders.onnx import OnnxEncoder
from histoseek.serving.slides.geojson import read_annotations

pytestmark = pytest.mark.shared


def test_a_region_of_a_slide_is_searched_and_a_hit_opens_beside_it(page):
    tab(page, "Slide viewer")
    pictures_are_there(page, ".hs-pane:first-child .leaflet-tile")
    assert page.locator(".hs-pane h3").first.inner_text() == "CMU-1-Small-Region"
    piece = page.locator(".hs-pane:first-child .leaflet-tile").first
    shown = "i => [i.style.width, getComputedStyle(i).mixBlendMode]"
    assert piece.evaluate(shown) == ["257px", "normal"], "pieces overlap, so that no lines show"
    assert "×" in page.locator(".hs-scalebar").first.inner_text()
    shown = page.locator(".hs-slidemap").first
    shown.focus()
    page.keyboard.press("+")
    page.wait_for_timeout(400)
    page.get_by_label("other slides only").uncheck()  # the atlas has no other slide
    page.locator(".hs-tool[data-tool=box]").click()
    frame = shown.bounding_box()
    x, y = frame["x"] + frame["width"] / 2, frame["y"] + frame["height"] / 2
    page.mouse.move(x - 110, y - 90)
    page.mouse.down()
    page.mouse.move(x, y, steps=3)
    page.mouse.move(x + 110, y + 110, steps=3)
    page.mouse.up()
    page.locator(".hs-vhit").first.wait_for()
    assert "of the region" in page.locator(".hs-vnote").inner_text()
    assert "this slide" in page.locator(".hs-vhit").first.inner_text()
    pictures_are_there(page, ".hs-vhits li:first-child img")
    page.locator(".hs-vhit", has_text="this slide").first.click()
    pictures_are_there(page, ".hs-pane:last-child .leaflet-tile")
    page.locator("[data-part=layer]").select_option("score")
    page.locator(".hs-vlegend li").first.wait_for()
    assert page.locator("canvas.hs-painted").count() == 2
    page.locator("[data-part=layer]").select_option("label")
    page.wait_for_timeout(300)
    assert page.locator(".hs-vlegend li").count() == 0, "the slide has no label"
    page.locator("[data-part=layer]").select_option("tissue")
    page.locator(".hs-vlegend", has_text="mm²").wait_for()
    shot(page, "viewer-tissue")
    page.locator("[data-part=layer]").select_option("cluster")
    page.locator(".hs-vlegend li", has_text="cluster").first.wait_for()
    shot(page, "slide-viewer")
    page.locator("[data-part=alone]").click()
    assert page.locator(".hs-pane").last.is_hidden()
    page.locator("[data-part=middle]").click()
    page.locator(".hs-vnote", has_text="one tile around its middle").wait_for()


def test_a_hit_is_shown_on_its_slide(page):
    tab(page, "Slides and cases")
    page.locator("[data-slide='CMU-1-Small-Region']").click()
    page.locator("[data-view]").click()
    pictures_are_there(page, ".hs-pane:first-child .leaflet-tile")
    tab(page, "Slides and cases")
    page.locator(".hs-pair [data-open]").first.click()
    page.locator("dialog[open]").get_by_role("button", name="Open in the slide viewer").click()
    page.locator("dialog[open]").wait_for(state="hidden")
    pictures_are_there(page, ".hs-pane:first-child .leaflet-tile")
    assert page.locator(".hs-pane h3").first.inner_text() == "CMU-1-Small-Region"
    # The tile of 224 px is some 140 px wide on the screen.
    page.locator(".hs-pane:first-child .hs-scalebar", has_text=" · 10×").wait_for()


def draw(page):
    """Draw a box around the middle of the left slide, and wait for the form to annotate it."""
    draw_region(page)
    page.locator(".hs-mark").wait_for()


def draw_region(page, dx=110, dy=110):
    page.locator(".hs-tool[data-tool=box]").click()
    frame = page.locator(".hs-slidemap").first.bounding_box()
    x, y = frame["x"] + frame["width"] / 2, frame["y"] + frame["height"] / 2
    page.mouse.move(x - dx, y - dy)
    page.mouse.down()
    page.mouse.move(x + dx, y + dy, steps=4)
    page.mouse.up()


def test_a_region_is_annotated_found_changed_and_given_to_qupath(page, atlas, tmp_path):
    tab(page, "Slide viewer")
    pictures_are_there(page, ".hs-pane:first-child .leaflet-tile")
    draw(page)
    form, note = page.locator(".hs-mark"), page.locator(".hs-marknote")
    form.get_by_role("button", name="Save annotation").click()
    note.get_by_text("a label or a note").wait_for()
    form.get_by_label("Label").fill("it's tumour")
    form.get_by_label("Note").fill("check the margin")
    form.get_by_role("button", name="Save annotation").click()
    note.get_by_text("annotation.label = 'it''s tumour'").wait_for()
    page.get_by_text("Annotations of this slide (1)").click()
    listed = page.locator(".hs-marks li")
    assert listed.inner_text() == "it's tumour check the margin"
    shot(page, "annotations")

    with page.expect_download() as got:
        page.get_by_role("link", name="Save for QuPath").click()
    assert got.value.suggested_filename == "CMU-1-Small-Region.geojson"
    (feature,) = json.loads(got.value.path().read_text())["features"]
    assert feature["properties"]["classification"]["name"] == "it's tumour"
    ring = feature["geometry"]["coordinates"][0]
    assert len(ring) == 5 and ring[0] == ring[-1]
    assert read_annotations(got.value.path())  # as `embed --regions` reads it
    stored = Atlas(atlas).annotations()
    assert [item.note for item in stored] == ["check the margin"]
    (hits,) = Atlas(atlas).search(
        tiles=[int(Atlas(atlas).view().columns.ids([0])[0])], where="annotation.label like 'it%'"
    )
    assert hits and {hit.slide for hit in hits} == {"CMU-1-Small-Region"}

    tab(page, "Find similar")
    page.locator("#filters button").first.click()
    page.get_by_label("In an annotation with the label").click()
    page.get_by_role("option", name="it's tumour").wait_for()
    tab(page, "Slide viewer")

    page.locator(".hs-tool[data-tool=move]").click()
    frame = page.locator(".hs-slidemap").first.bounding_box()
    page.mouse.click(frame["x"] + frame["width"] / 2, frame["y"] + frame["height"] / 2)
    form.wait_for()
    form.get_by_role("button", name="Search this region").click()
    page.locator(".hs-vnote").get_by_text("of the region").wait_for()
    form.get_by_label("Label").fill("stroma")
    form.get_by_role("button", name="Save annotation").click()
    page.locator(".hs-marks li", has_text="stroma").wait_for()

    page.locator(".hs-marks li button", has_text="stroma").click()
    form.get_by_role("button", name="Redraw").click()
    page.get_by_role("button", name="Search the middle").click()  # this is no outline
    page.locator(".hs-vnote").get_by_text("one tile around its middle").wait_for()
    assert form.get_by_label("Label").input_value() == ""
    page.locator(".hs-marks li button", has_text="stroma").click()
    form.get_by_role("button", name="Redraw").click()
    hits = page.locator(".hs-vhits").inner_html()
    draw_region(page, 90, 90)
    note.get_by_text("keep its new outline").wait_for()
    draw_region(page, 60, 40)  # the second attempt corrects the first
    assert form.get_by_label("Label").input_value() == "stroma"
    assert page.locator(".hs-vhits").inner_html() == hits, "a new outline is no question"
    form.get_by_role("button", name="Save annotation").click()
    note.get_by_text("Saved.").wait_for()
    (smaller,) = Atlas(atlas).annotations()
    assert smaller.id == feature["id"] and smaller.label == "stroma"
    assert area_of(smaller.rings[0]) < 0.9 * area_of(stored[0].rings[0])
    page.locator(".hs-tool[data-tool=move]").click()

    feature["id"] = "0b2e6a4c-6d1f-4e7f-9d0e-0a4b5c6d7e8f"
    cell = {**feature, "properties": {"objectType": "cell"}}
    (tmp_path / "more.geojson").write_text(json.dumps([feature, cell]))
    page.set_input_files(".hs-marks input", tmp_path / "more.geojson")
    note.get_by_text("1 annotations added").wait_for()
    assert "1 x cell" in note.inner_text()
    page.get_by_text("Annotations of this slide (2)").wait_for()
    (tmp_path / "bad.geojson").write_text("no json")
    page.set_input_files(".hs-marks input", tmp_path / "bad.geojson")
    note.get_by_text("bad.geojson is not GeoJSON").wait_for()

    page.once("dialog", lambda dialog: dialog.accept())
    page.locator(".hs-marks li button", has_text="stroma").click()
    form.get_by_role("button", name="Delete").click()
    page.get_by_text("Annotations of this slide (1)").wait_for()
    page.locator("[data-part=marks]").uncheck()
    assert [item.label for item in Atlas(atlas).annotations()] == ["it's tumour"]


def test_a_label_is_text_and_a_point_inside_an_annotation_is_a_new_one(page, atlas):
    tab(page, "Slide viewer")
    pictures_are_there(page, ".hs-pane:first-child .leaflet-tile")
    draw(page)
    form, note = page.locator(".hs-mark"), page.locator(".hs-marknote")
    label = "<img src=x onerror=document.body.dataset.run='1'>"
    form.get_by_label("Label").fill(label)
    form.get_by_role("button", name="Save annotation").click()
    note.get_by_text("Saved.").wait_for()
    before = len(Atlas(atlas).annotations("CMU-1-Small-Region"))
    page.locator(".hs-tool[data-tool=move]").click()
    frame = page.locator(".hs-slidemap").first.bounding_box()
    middle = frame["x"] + frame["width"] / 2, frame["y"] + frame["height"] / 2
    page.mouse.move(*middle)
    page.mouse.move(middle[0] + 5, middle[1] + 5)
    assert page.locator(".leaflet-tooltip").inner_text() == label
    assert page.evaluate("document.body.dataset.run") is None
    page.locator(".hs-tool[data-tool=point]").click()
    page.mouse.click(*middle)
    page.locator(".hs-vnote").get_by_text("one tile around its middle").wait_for()
    assert form.get_by_label("Label").input_value() == ""
    form.get_by_label("Label").fill("gland")
    form.get_by_role("button", name="Save annotation").click()
    note.get_by_text("Saved.").wait_for()
    labels = [item.label for item in Atlas(atlas).annotations("CMU-1-Small-Region")]
    assert len(labels) == before + 1 and label in labels and "gland" in labels


def test_a_reader_looks_at_annotations_and_changes_none(browser, served):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.route("**/v1/me", lambda route: route.fulfill(json={"user": "rita", "role": "reader"}))
    page.goto(served)
    page.locator("#find").wait_for()
    tab(page, "Slide viewer")
    pictures_are_there(page, ".hs-pane:first-child .leaflet-tile")
    draw_region(page)
    page.locator(".hs-vhit").first.wait_for()
    form = page.locator(".hs-mark")
    assert form.is_hidden(), "there is nothing that a reader could save"
    page.locator(".hs-marks summary").click()
    page.locator(".hs-marks li button").first.click()
    form.wait_for()
    assert form.get_by_role("button", name="Save annotation").is_hidden()
    assert form.get_by_role("button", name="Delete").is_hidden()
    assert form.get_by_role("button", name="Search this region").is_visible()
    assert page.locator(".hs-marks input").is_hidden()
    page.close()


def test_words_are_searched_and_shown_as_heat(
    browser, text_bundle, make_slide, tmp_path, histoseek_ui
):
    """An encoder with a text network of random weights, on two slides."""
    slides = [make_slide(tmp_path / f"case-{n}.tiff", side=1400, seed=n) for n in (1, 2)]
    encoder = OnnxEncoder(text_bundle / "bundle")
    done = embed_jobs(find_jobs(slides), encoder, tmp_path / "f", EmbedOptions(), lambda *_: None)
    encoder.close()
    made = Atlas.create(tmp_path / "atlas", text_bundle / "bundle")
    made.add([tmp_path / "f" / result.features for result in done])
    port = free_port()
    up(port, histoseek_ui(made.path, "--port", port))
    page = opened(browser, f"http://127.0.0.1:{port}/")
    tab(page, "Slide viewer")
    pictures_are_there(page, ".hs-pane:first-child .leaflet-tile")
    page.get_by_label("Words", exact=True).last.fill("signet ring cells")
    page.get_by_role("button", name="Search", exact=True).click()
    page.locator(".hs-vhit").first.wait_for()
    assert "does not prove that a tile shows" in page.locator(".hs-vnote").inner_text()
    page.locator(".hs-vlegend li").first.wait_for()
    assert page.locator("canvas.hs-painted").count() == 1
    assert "case-2" in page.locator(".hs-vhit").first.inner_text()
    page.close()
