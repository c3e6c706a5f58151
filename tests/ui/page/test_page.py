"""The page in a real browser with a real atlas (LC25000 tiles and a CMU slide): every tab and state."""

import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from loopback import free_port, up
from pages import find, opened, pictures_are_there, shot, tab
from PIL import Image

from histoseek.index.atlas import Atlas

pytestmark = pytest.mark.shared

HELD_OUT = "colon_n"


def test_find_similar(page, browser, tiles):
    shot(page, "empty")
    find(page, tiles / "query.png")
    pictures_are_there(page, "#hits img")
    cards = page.locator("#hits .hs-card")
    assert cards.count() == 12
    first = cards.first.inner_text()
    assert "#1" in first and HELD_OUT in first and "score 0." in first and "cluster" in first
    verdict = page.locator("#verdict").inner_text()
    assert HELD_OUT in verdict and "Nearest labels" in verdict and "belongs to" in verdict
    assert "Research use only" in page.locator(".hs-notice").inner_text()
    shot(page, "find-similar")
    with page.expect_download() as got:
        page.locator("#verdict a", has_text="CSV").click()
    rows = Path(got.value.path()).read_text().splitlines()
    assert rows[0].startswith("rank,score,tile,slide") and len(rows) == 13
    with page.expect_download() as got:
        page.locator("#verdict a", has_text="Report").click()
    html = Path(got.value.path())
    report = browser.new_page(viewport={"width": 1000, "height": 900})
    report.set_content(html.read_text())
    assert report.locator("figure img").count() == 13
    shot(report, "report")
    report.close()


def test_filters_and_how_many(page, tiles):
    page.locator("#filters button").first.click()
    page.get_by_label("Other filter").fill("organ = 'skin'")
    find(page, tiles / "query.png")
    assert set(page.locator("#hits small").filter(has_text="CMU").all_inner_texts())
    assert page.locator("#hits .hs-card", has_text="CMU-1-Small-Region").count() == 12
    page.get_by_label("Other filter").fill("")
    label = page.get_by_label("Label", exact=True).first
    label.click()
    page.get_by_role("option", name="lung_scc").click()
    page.keyboard.press("Escape")
    page.locator("#find").click()
    page.locator("#hits .hs-card", has_text="lung_scc").first.wait_for()
    assert page.locator("#hits .hs-card", has_text="lung_scc").count() == 12
    shot(page, "filters")
    page.get_by_label("Other filter").fill("organ = ")
    page.locator("#find").click()
    page.locator("#verdict [role=alert]", has_text="filter").wait_for()
    shot(page, "error")


def test_a_part_is_searched_for_by_mouse_and_by_keyboard(page, tiles, tmp_path):
    tile = Image.open(tiles / "query.png")
    wide = Image.new("RGB", (448, 224), "white")
    wide.paste(tile, (224, 0))
    wide.save(tmp_path / "wide.png")
    find(page, tmp_path / "wide.png")
    whole = page.locator("#hits .hs-score").first.inner_text()
    box = page.locator(".hs-stage").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.502, box["y"] + 1)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 1, box["y"] + box["height"] - 1, steps=5)
    page.mouse.up()
    page.wait_for_function(
        "(old) => document.querySelector('#hits .hs-score')?.innerText !== old", arg=whole
    )
    assert HELD_OUT in page.locator("#hits .hs-card").first.inner_text()
    assert page.locator(".hs-crop").is_visible()
    shot(page, "crop")
    cropped = page.locator("#hits .hs-score").first.inner_text()
    page.locator(".hs-stage").focus()
    for _ in range(6):
        page.keyboard.press("ArrowLeft")
    page.wait_for_function(
        "(old) => document.querySelector('#hits .hs-score')?.innerText !== old", arg=cropped
    )
    page.locator(".hs-whole").click()
    page.wait_for_function(
        "(old) => document.querySelector('#hits .hs-score')?.innerText === old", arg=whole
    )


def test_more_like_this_and_less_like_that(page, tiles):
    find(page, tiles / "query.png")
    liked = page.locator("#hits [data-like]").nth(1).get_attribute("data-like")
    page.locator("#hits [data-like]").nth(1).click()
    page.locator(f"#basket [data-drop='{liked}']").wait_for()
    assert page.locator(f"#hits [data-tile='{liked}']").count() == 0
    hated = page.locator("#hits [data-unlike]").nth(3).get_attribute("data-unlike")
    page.locator("#hits [data-unlike]").nth(3).click()
    page.locator("#basket", has_text="unlike").wait_for()
    page.locator(f"#hits [data-tile='{hated}']").wait_for(state="detached")
    shot(page, "like-unlike")
    page.locator("#basket [data-clear]").click()
    page.locator("#basket [data-drop]").first.wait_for(state="detached")
    page.locator("#basket [data-image]").click()
    page.locator("#hits", has_text="No query.").wait_for()
    assert page.locator(".hs-stage").is_hidden()


def test_a_hit_is_opened_in_its_context(page, tiles):
    page.locator("#filters button").first.click()
    page.get_by_label("Other filter").fill("organ = 'skin'")
    find(page, tiles / "query.png")
    card = page.locator("#hits [data-open]").first
    card.focus()
    page.keyboard.press("Enter")
    dialog = page.locator("dialog[open]")
    dialog.get_by_text("on the slide").wait_for()
    pictures_are_there(page, "dialog img")
    assert dialog.locator("img").count() == 3 and "P-CMU" in dialog.inner_text()
    shot(page, "in-context")
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0
    assert card.evaluate("e => e === document.activeElement"), "focus goes back"
    card.click()
    dialog.get_by_text("+ More like this").click()
    page.locator("#basket [data-drop]").wait_for()


def test_bad_uploads_are_refused_on_the_page(page, tmp_path, tissue):
    import numpy as np

    deep = Image.fromarray(tissue[..., 0].astype(np.uint16) * 200)
    deep.save(tmp_path / "deep.png")
    (tmp_path / "text.png").write_text("no picture")
    for name, says in (("deep.png", "8 bits"), ("text.png", "not an image")):
        page.set_input_files("#hs-query-file", tmp_path / name)
        page.locator("#verdict [role=alert]", has_text=says).wait_for()
        assert name in page.locator("#verdict").inner_text()
        assert "/tmp" not in page.locator("#verdict").inner_text()


def test_nothing_chosen_says_so(page):
    page.click("#find")
    page.locator("#verdict", has_text="No image yet").wait_for()
    assert page.locator("#hits .hs-card").count() == 0


def test_upload_and_cluster(page, tiles, tmp_path):
    tab(page, "Upload and cluster")
    page.click("#place")
    page.locator("#placed-box", has_text="No image yet").wait_for()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    some = sorted((tiles / "tiles").rglob("*.jpeg"))
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as pack:
        for n in (5, 150, 300):
            pack.write(some[n], f"folder/{n}.jpeg")
    page.set_input_files(
        "#uploads-input", [tiles / "query.png", tmp_path / "broken.png", tmp_path / "more.zip"]
    )
    page.locator("#uploads .hs-files li").nth(2).wait_for()
    page.wait_for_function("!document.querySelector('#uploads .hs-picker-note').textContent")
    page.click("#place")
    page.locator("#placed-note", has_text="4 images assigned").wait_for()
    assert "1 refused" in page.locator("#placed-note").inner_text()
    table = page.locator("#placed").inner_text()
    assert "query.png" in table and "more.zip: 300.jpeg" in table and "refused: broken.png" in table
    page.locator("#map .hs-maplegend li", has_text="new images (4)").wait_for()
    pictures_are_there(page, "#placed img")
    assert page.locator("#placed tbody tr").first.locator("img").count() == 4, (
        "nearest, three examples"
    )
    page.wait_for_timeout(500)
    shot(page, "upload-and-cluster")
    with page.expect_download() as got:
        page.locator("#placed-note a", has_text="CSV").click()
    assert Path(got.value.path()).read_text().count("\n") == 6
    page.get_by_label("Remove broken.png from the list").click()
    page.click("#place")
    page.locator("#placed-note", has_text="0 refused").wait_for()


def drawn_share(page):
    """Shares of the atlas map's width and height that the drawn tiles span."""
    return tuple(
        page.evaluate(
            """() => { const c = document.querySelector('#atlas-map canvas'), w = c.width, h = c.height;
            const seen = c.getContext('2d').getImageData(0, 0, w, h).data, xs = [], ys = [];
            for (let n = 0; n < w * h; n++)
              if (seen[4 * n + 3] > 100) { xs.push(n % w); ys.push(Math.floor(n / w)); }
            const extreme = (all, pick) => all.reduce((a, b) => pick(a, b));
            const span = (all) => extreme(all, Math.max) - extreme(all, Math.min);
            return [span(xs) / w, span(ys) / h]; }"""
        )
    )


def middle(locator):
    """The middle of an element, in pixels of the page."""
    box = locator.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_the_map_its_lasso_and_a_name_for_a_cluster(page, served, atlas):
    tab(page, "Atlas")
    page.locator("#atlas-map .hs-maplegend li").first.wait_for()
    note = page.locator("#atlas-map .hs-map-note").inner_text()
    assert f"All {Atlas(atlas).stats()['tiles']:,} tiles" in note and "trustworthiness" in note
    page.wait_for_timeout(500)
    wide, high = drawn_share(page)
    assert max(wide, high) > 0.85, "the tiles fill the map"
    page.mouse.move(*middle(page.locator("#atlas-map .hs-lasso")))
    page.mouse.wheel(0, -400)
    page.click("#atlas-map [data-map=whole]")
    page.wait_for_timeout(200)
    assert drawn_share(page) == pytest.approx((wide, high), abs=0.01)
    box = page.locator("#atlas-map .hs-lasso").bounding_box()
    corners = [(0.02, 0.02), (0.98, 0.02), (0.98, 0.98), (0.02, 0.98), (0.02, 0.05)]
    for number, (x, y) in enumerate(corners):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=8)
        if number == 0:
            page.mouse.down()
    page.mouse.up()
    page.locator(".hs-lassoed", has_text="tiles selected").wait_for()
    assert re.search(
        r"\d+ tiles selected, \d+ of them shown", page.locator(".hs-lassoed").inner_text()
    )
    pictures_are_there(page, ".hs-lassoed li:nth-child(-n+5) img")
    everything = page.locator(".hs-lassoed [role=status]").inner_text()
    assert everything.startswith(f"{Atlas(atlas).stats()['tiles']:,} tiles selected"), (
        "all are inside"
    )
    page.locator("#atlas-map .hs-maplegend button").first.click()  # hidden tiles are not selected
    page.wait_for_timeout(600)
    for number, (x, y) in enumerate(corners):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=8)
        if number == 0:
            page.mouse.down()
    page.mouse.up()
    page.wait_for_function(
        "(old) => document.querySelector('.hs-lassoed [role=status]').innerText !== old",
        arg=everything,
    )
    page.locator(".hs-lassoed [data-open]").first.click()
    page.locator("dialog[open] img").first.wait_for()
    page.keyboard.press("Escape")
    shot(page, "atlas")
    page.select_option("#hs-colour", "label")
    page.locator("#atlas-map .hs-maplegend li", has_text=HELD_OUT).wait_for()
    page.locator(".hs-lassoed [data-open]").first.click()
    page.locator("dialog[open]").get_by_text("+ More like this").click()
    page.locator("#hits .hs-card").first.wait_for()  # in the first tab, which is shown
    assert page.locator("#basket [data-drop]").is_visible()
    tab(page, "Atlas")
    card = page.locator(".hs-cluster[data-cluster='2']")
    card.get_by_label("Name").fill("<b>stroma</b> & glands")
    card.get_by_label("Description").fill("seen by nobody")
    card.get_by_role("button", name="Save").click()
    card.get_by_text("Saved.").wait_for()
    names = {c["cluster"]: c["name"] for c in Atlas(atlas).clusters("kmeans")}
    assert names[2] == "<b>stroma</b> & glands"
    page.reload()
    page.locator("#find").wait_for()
    tab(page, "Atlas")
    card.get_by_label("Name").wait_for()
    assert card.get_by_label("Name").input_value() == "<b>stroma</b> & glands"
    page.locator("#atlas-map .hs-maplegend li", has_text="<b>stroma</b> & glands").wait_for()


def test_a_map_of_many_tiles_is_drawn_by_density_and_lassoed_whole(browser, served):
    """30,000 made tiles in two groups; their ids are no runs, so each is sent."""
    count = 30_000
    rng = np.random.default_rng(0)
    group = np.arange(count) % 2
    places = rng.normal(np.where(group, 45_000, 20_000)[:, None], 3_000, (count, 2)).astype("<u2")
    about = {
        "revision": 1, "shown": count, "inside": count, "total": count, "by": "cluster.kmeans",
        "names": ["a", "b"], "places": True, "runs": None, "code_bytes": 1, "method": "t-SNE",
        "landmarks": 3000, "trust": 0.9,
    }  # fmt: skip
    text = json.dumps(about).encode()
    text += b" " * (-(len(text) + 4) % 8)
    ids = np.arange(count, dtype="<f8") * 3
    parts = [len(text).to_bytes(4, "little"), text, ids.tobytes(), places.tobytes()]
    body = b"".join([*parts, (group + 1).astype("u1").tobytes()])
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.route("**/v1/map?*", lambda route: route.fulfill(body=body))
    page.goto(served)
    page.locator("#find").wait_for()
    tab(page, "Atlas")
    page.locator("#atlas-map .hs-maplegend li", has_text="b (15,000)").wait_for()
    page.wait_for_timeout(300)
    colours = page.evaluate(
        """() => { const c = document.querySelector('#atlas-map canvas'), found = {};
        const seen = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
        for (let n = 0; n < seen.length; n += 4) if (seen[n + 3] > 200) {
          const key = [seen[n] >> 5, seen[n + 1] >> 5, seen[n + 2] >> 5].join();
          found[key] = (found[key] ?? 0) + 1; }
        return Object.values(found).filter((n) => n > 200).length; }"""
    )
    assert colours >= 2, "two groups in two colours"
    box = page.locator("#atlas-map .hs-lasso").bounding_box()
    for number, (x, y) in enumerate([(0.01, 0.01), (0.99, 0.01), (0.99, 0.99), (0.01, 0.99)]):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=4)
        page.mouse.down() if number == 0 else None
    page.mouse.up()
    page.locator(".hs-lassoed", has_text="30,000 tiles selected").wait_for()
    shown = page.locator(".hs-lassoed [data-open]").evaluate_all(
        "all => all.map((b) => b.dataset.open)"
    )
    assert shown and all(int(tile) % 3 == 0 for tile in shown)
    page.close()


def test_slides_and_cases(page, tiles):
    find(page, tiles / "query.png")
    tab(page, "Slides and cases")
    page.locator("[data-slide='CMU-1-Small-Region']").click()
    page.locator(".hs-detail", has_text="P-CMU").wait_for()
    pictures_are_there(page, ".hs-overview, .hs-slide img")
    assert "clusters.jpg" in page.locator(".hs-overview").get_attribute("src")
    assert "cluster" in page.locator(".hs-legend").inner_text()
    similar = page.locator(".hs-similar").inner_text()
    assert "tiles" in similar and "score" in similar
    page.locator(".hs-pair img").first.scroll_into_view_if_needed()
    shot(page, "slide")
    page.get_by_label("similarity to the last search").click()
    page.locator(".hs-overview[src*=heat]").wait_for()
    assert "similarity to the last search: 0.00" in page.locator(".hs-scale").inner_text()
    pictures_are_there(page, ".hs-overview")
    shot(page, "heat")
    page.get_by_label("cases").click()
    page.get_by_text("Similar cases").wait_for()
    page.locator("#slide-name input, #slide-name textarea").fill("nothing")
    page.get_by_text("No slide of that name.").wait_for()


def test_an_unknown_role_is_said(browser, served):
    page = browser.new_page()
    page.route("**/v1/me", lambda route: route.fulfill(status=503, json={}))
    page.goto(served)
    page.get_by_role("alert").get_by_text("Your role is not known").wait_for()
    page.close()


def test_a_click_as_soon_as_there_is_something_to_click_is_not_lost(page):
    """An event may be sent at any moment, also just when the answer to the one before has come."""
    click = """(wait) => new MutationObserver((changes, observer) => {
        if (!document.querySelector('[data-slide]')) return;
        observer.disconnect();
        setTimeout(() => document.querySelector('[data-slide]').click(), wait);
    }).observe(document.body, {childList: true, subtree: true})"""
    for wait in range(50, 100, 8):
        page.reload()
        page.locator("#find").wait_for()
        page.evaluate(click, wait)
        tab(page, "Slides and cases")
        page.locator(".hs-detail").wait_for()


def test_a_new_slide_is_added_and_searched(page, make_slide, tmp_path, atlas):
    before = Atlas(atlas).stats()["tiles"]
    tab(page, "New slide")
    page.click("#add")
    page.locator("#add-note", has_text="choose a file or enter a path").wait_for()
    page.set_input_files("#new-file-input", make_slide(tmp_path / "fresh.tiff", side=1500, seed=5))
    page.locator("#new-file .hs-files li").wait_for()
    page.get_by_label("Patient").last.fill("P-new")
    page.get_by_text("Which tiles").click()
    page.get_by_text("a network").click()
    shot(page, "which-tiles")
    page.click("#add")
    page.locator("#jobs .hs-done", has_text="fresh").wait_for()
    shot(page, "new-slide")
    after = Atlas(atlas).stats()["tiles"]
    assert after > before
    page.locator(".hs-head", has_text=f"{after:,} tiles").wait_for()
    page.reload()
    page.locator("#find").wait_for()
    tab(page, "Slides and cases")
    page.locator("[data-slide='fresh']", has_text="P-new").click()
    page.locator(".hs-detail", has_text="P-new").wait_for()


def test_about_and_the_measured_recall(page, atlas):
    tab(page, "About")
    table = page.locator("#about")
    table.wait_for()
    assert Atlas(atlas).manifest.sha256 in table.inner_text()
    page.click("#audit")
    page.locator("#audit-note", has_text="Recall@10 1.0000").wait_for()
    shot(page, "about")


def test_a_server_that_is_gone_is_said(browser, own_atlas, tile_folder, histoseek_ui):
    port = free_port()
    process = histoseek_ui(own_atlas, "--port", port)
    up(port, process)
    page = opened(browser, f"http://127.0.0.1:{port}/")
    process.kill()
    process.wait()
    page.set_input_files("#hs-query-file", tile_folder / "cat/00.png")
    page.locator(".hs-picker-note", has_text="could not be sent").first.wait_for()
    page.close()


TABS = [
    "Find similar",
    "Slide viewer",
    "Upload and cluster",
    "Atlas",
    "Slides and cases",
    "New slide",
    "About",
]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_everyone_can_use_it(browser, served, tiles, width, theme):
    """No serious violation by axe-core, nothing wider than the window, in both themes."""
    from axe_playwright_python.sync_playwright import Axe

    page = opened(browser, served, width, theme, bypass_csp=True)
    axe = Axe()
    found = []
    for name in TABS:
        tab(page, name)
        page.wait_for_timeout(400)
        if name == "Find similar":
            check(axe, page, f"{name}, empty", found)
            find(page, tiles / "query.png")
            page.locator("#hits [data-like]").nth(1).click()
            page.locator("#basket [data-drop]").wait_for()
            page.locator("#filters button").first.click()
            pictures_are_there(page, "#hits img")
        elif name == "Slide viewer":
            pictures_are_there(page, ".hs-pane:first-child .leaflet-tile")
            page.locator("[data-part=elsewhere]").uncheck()  # no other slide has been added yet
            page.locator("[data-part=middle]").click()
            page.locator(".hs-vhit").first.click()
            page.locator(".hs-mark [name=label]").fill("tumour")
            page.locator("[data-part=layer]").select_option("cluster")
            page.locator(".hs-vlegend li").first.wait_for()
            page.locator(".hs-marks summary").click()
        elif name == "Upload and cluster":
            page.set_input_files("#uploads-input", tiles / "query.png")
            page.locator("#uploads .hs-files li").wait_for()
            page.wait_for_function(
                "!document.querySelector('#uploads .hs-picker-note').textContent"
            )
            page.click("#place")
            page.locator("#placed-note").wait_for()
        elif name == "Atlas":
            page.locator("#atlas-map .hs-maplegend li").first.wait_for()
            page.locator(".hs-cluster").first.wait_for()
        elif name == "Slides and cases":
            page.locator("[data-slide='CMU-1-Small-Region']").click()
            page.locator(".hs-detail").wait_for()
        page.mouse.move(0, 0)
        page.wait_for_timeout(500)
        check(axe, page, name, found)
        shot(page, f"{name.lower().replace(' ', '-')}-{width}-{theme}")
    tab(page, "Find similar")
    page.locator("#hits [data-open]").first.click()
    page.locator("dialog[open] dl").wait_for()
    check(axe, page, "context", found)
    assert found == []
    page.close()


def check(axe, page, name, found):
    for violation in axe.run(page).response["violations"]:
        if violation["impact"] in {"serious", "critical"}:
            where = [node["html"][:120] for node in violation["nodes"][:3]]
            found.append((name, violation["id"], where))
    wider = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    if wider > 0:
        found.append((name, "wider than the window", wider))
