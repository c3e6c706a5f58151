/* The slide viewer: look at slides, draw a region to search for, see hits and layers in place. */
"use strict";
(() => {
  const hs = window.histoseek, el = hs.el;  // page.js is loaded before
  const path = (slide) => `v1/slides/${encodeURIComponent(slide)}`;
  const quoted = (text) => `'${text.replace(/'/g, "''")}'`;
  const MAX_ZOOM = 3;  // level-0 pixels are shown up to 8 times as large
  const DRAWN = { color: "#c2410c", weight: 3, fillOpacity: 0.08 };

  async function json(url, options, left = 5) {
    const answer = await fetch(url, options);
    if (answer.status === 429 && left) {  // another change is being written
      await new Promise((done) => setTimeout(done, 600));
      return json(url, options, left - 1);
    }
    const body = await answer.json().catch(() => null);
    if (!answer.ok) throw new Error(body?.error?.message ?? `the server answered ${answer.status}`);
    return body;
  }

  const library = (() => {
    let loading = null;
    return () => (loading ??= new Promise((done, failed) => {
      document.head.append(
        el("link", { rel: "stylesheet", href: "page-assets/leaflet.css" }),
        el("script", { src: "page-assets/leaflet.js", onload: () => { extend(); done(); },
          onerror: () => { loading = null; failed(new Error("the library Leaflet could not be loaded; reload the page")); } }));
    }));
  })();

  /* Coordinates are level-0 pixels, y downwards; zoom 0 shows one of them per pixel of the screen. */
  let crs = null, Painted = null;
  function extend() {
    crs = L.extend({}, L.CRS.Simple, { transformation: new L.Transformation(1, 0, 1, 0) });
    Painted = L.ImageOverlay.extend({
      _initImage() {
        this._image = this._url;
        L.DomUtil.addClass(this._image, "leaflet-image-layer leaflet-zoom-animated hs-painted");
      },
    });
  }
  const place = (x, y) => L.latLng(y, x);
  /* At most 500 corners, in whole pixels. */
  const thinned = (corners) => {
    const every = Math.ceil(corners.length / 500);
    return corners.filter((_, n) => n % every === 0).map(([x, y]) => [Math.round(x), Math.round(y)]);
  };

  function nice(longest) {
    const power = 10 ** Math.floor(Math.log10(longest));
    return [5, 2, 1].map((n) => n * power).find((n) => n <= longest) ?? power;
  }

  /* A slide on a map, with scale bar, layer and marks. */
  class Pane {
    constructor(section, moved) {
      this.section = section;
      this.title = section.querySelector("h3");
      this.scale = section.querySelector(".hs-scalebar");
      this.map = L.map(section.querySelector(".hs-slidemap"), {
        crs, zoomSnap: 0.25, zoomAnimation: false, attributionControl: false, doubleClickZoom: true,
        maxZoom: MAX_ZOOM, wheelPxPerZoomLevel: 120, renderer: L.canvas({ padding: 1 }),
      });
      this.marks = L.layerGroup().addTo(this.map);
      this.map.on("zoomend", () => { this.drawScale(); moved(this); });
      this.about = null;
      new ResizeObserver(() => this.map.invalidateSize()).observe(section);
    }

    async show(slide, at = null) {
      if (this.about?.slide !== slide) {
        const about = await json(`${path(slide)}/pyramid`);
        this.about = about;
        this.pieces?.remove();
        this.annotations?.remove();
        this.layer?.remove();
        this.layer = null;
        this.marks.clearLayers();
        const bounds = L.latLngBounds(place(0, 0), place(about.width, about.height));
        const url = (point) => `${path(slide)}/tiles/${point.z + about.max_zoom}/${point.x}/${point.y}.jpg`;
        const layer = L.tileLayer("", {
          tileSize: about.piece_px, bounds, noWrap: true, minNativeZoom: -about.max_zoom, maxNativeZoom: 0,
          minZoom: -about.max_zoom - 1, maxZoom: MAX_ZOOM,
        });
        layer.getTileUrl = (point) => url({ x: point.x, y: point.y, z: layer._getZoomForUrl() });
        layer._getZoomForUrl = () => Math.max(-about.max_zoom, Math.min(0, layer._tileZoom));
        /* A pixel of overlap, so that no lines show between pieces at zooms where their edges are between pixels. */
        layer.on("tileloadstart", ({ tile }) => { tile.style.width = tile.style.height = `${about.piece_px + 1}px`; });
        layer.on("tileerror", () => { this.title.dataset.problem = "some pieces cannot be read"; });
        this.map.setMinZoom(-about.max_zoom - 1);
        this.map.setMaxBounds(bounds.pad(0.5));
        this.pieces = layer.addTo(this.map);
        this.title.textContent = slide;
        this.changed?.(this);
        if (!at) this.map.fitBounds(bounds, { animate: false });
      }
      if (at) {
        const box = L.rectangle([place(at.x, at.y), place(at.x + at.side, at.y + at.side)], { ...DRAWN, fill: false });
        this.marks.clearLayers();
        this.marks.addLayer(box);
        const zoom = Math.min(0, Math.round(Math.log2(140 / at.side)));
        this.map.setView(place(at.x + at.side / 2, at.y + at.side / 2), zoom, { animate: false });
      }
      this.drawScale();
    }

    /* µm per pixel of the screen; null if the slide's scale is unknown. */
    get resolution() {
      return this.about?.mpp ? this.about.mpp / 2 ** this.map.getZoom() : null;
    }

    drawScale() {
      if (!this.about) return;
      const um = this.resolution;
      if (!um) { this.scale.textContent = "scale unknown"; this.scale.style.width = "auto"; return; }
      const length = nice(120 * um);
      this.scale.style.width = `${length / um}px`;
      const text = length >= 1000 ? `${length / 1000} mm` : `${+length.toPrecision(2)} µm`;
      this.scale.textContent = `${text} · ${+(10 / um).toPrecision(2)}×`;
    }

    /* Paint the tiles by cluster, label, score or as a grid; or paint the tissue. */
    async paint(kind, { clustering, result, opacity }) {
      const mine = (this.painting = (this.painting ?? 0) + 1);
      this.layer?.remove();
      this.layer = null;
      if (kind === "none" || !this.about || (kind === "score" && !result)) return null;
      const query = new URLSearchParams({ by: kind });
      if (clustering) query.set("clustering", clustering);
      if (result) query.set("result", result);
      const answer = await fetch(`${path(this.about.slide)}/grid?${query}`);
      if (!answer.ok) throw new Error((await answer.json().catch(() => null))?.error?.message ?? `the server answered ${answer.status}`);
      const buffer = await answer.arrayBuffer();
      if (mine !== this.painting) return null;
      const length = new DataView(buffer).getUint32(0, true);
      const about = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
      const n = about.tiles, at = 4 + length;
      const places = new Int32Array(buffer, at, 2 * n), colours = new Uint8Array(buffer, at + 8 * n, 4 * n);
      const step = Math.max(about.step, Math.max(this.about.width, this.about.height) / 4096);
      const canvas = el("canvas", { width: Math.ceil(this.about.width / step), height: Math.ceil(this.about.height / step) });
      const brush = canvas.getContext("2d"), side = Math.max(1, Math.round(about.side / step));
      for (let i = 0; i < n; i++) {
        brush.fillStyle = `rgba(${colours[4 * i]},${colours[4 * i + 1]},${colours[4 * i + 2]},${colours[4 * i + 3] / 255})`;
        const [x, y] = [places[2 * i] / step, places[2 * i + 1] / step];
        if (kind === "grid") {
          brush.strokeRect(Math.round(x) + 0.5, Math.round(y) + 0.5, side - 1, side - 1);
        } else brush.fillRect(Math.round(x), Math.round(y), side, side);
      }
      const bounds = L.latLngBounds(place(0, 0), place(canvas.width * step, canvas.height * step));
      this.layer = new Painted(canvas, bounds, { opacity, interactive: false }).addTo(this.map);
      return about;
    }
  }

  /* The tab's element is made when the tab is first opened: until then, keep what it is to show. */
  let wanted = null;
  hs.showSlide = (slide, at = null) => {
    wanted = { slide, at };
    hs.openTab("Slide viewer");
    hs.viewer.take?.();
  };

  hs.viewer = (element) => {
    const find = (name) => element.querySelector(name);
    const note = find(".hs-vnote"), hits = find(".hs-vhits"), panes = find(".hs-panes"), legend = find(".hs-vlegend");
    const [name, list, layer, opacity, clustering] = ["slide", "slides", "layer", "opacity", "clustering"].map(
      (part) => find(`[data-part=${part}]`));
    const elsewhere = find("[data-part=elsewhere]");
    const tools = [...element.querySelectorAll(".hs-tool")];
    let left = null, right = null, tool = "move", result = null, last = null, asking = 0, linking = false, opened = false;

    const say = (text, problem = false) => {
      note.textContent = text;
      note.classList.toggle("hs-problem", problem);
    };
    const failed = (error) => say(error.message, true);
    const marks = hs.annotations(element, { json, ask, panes: () => [left, right], moving: () => tool === "move" });

    const moved = (pane) => {
      const other = pane === left ? right : left;
      if (linking || !other?.about || !pane.about || panes.dataset.two !== "1") return;
      const wanted = pane.map.getZoom() + Math.round(Math.log2((other.about.mpp ?? 1) / (pane.about.mpp ?? 1)));
      linking = true;
      if (other.map.getZoom() !== wanted) other.map.setZoom(wanted, { animate: false });
      linking = false;
    };

    async function ready() {
      await library();
      if (left) return;
      const [a, b] = element.querySelectorAll(".hs-pane");
      left = new Pane(a, moved);
      panes.dataset.two = "1";
      right = new Pane(b, moved);
      two(false);
      left.changed = right.changed = (pane) => { if (pane === left) marks.close(); marks.load(pane); };
      drawing(left);
    }
    function two(shown) {
      panes.dataset.two = shown ? "1" : "0";
      for (const pane of [left, right]) pane?.map.invalidateSize();
    }

    async function names(part = "") {
      const found = await json(`v1/slides?limit=200&contains=${encodeURIComponent(part)}`);
      const slides = found.slides.filter((row) => row.kind === "slide");
      list.replaceChildren(...slides.map((row) => el("option", { value: row.name }, row.label ?? "")));
      return slides;
    }

    async function show(slide, at = null) {
      try {
        find(".hs-vstage").hidden = false;  // a map needs the size of its element
        await ready();
        left.map.invalidateSize();
        await left.show(slide, at);
        name.value = slide;
        if (!list.childElementCount) names().catch(failed);
        say(at ? "" : "Drag to move, scroll or pinch to zoom. Choose Box or Shape and draw what you want to find.");
        await paint();
      } catch (error) { failed(error); }
    }
    const takeWanted = () => {
      if (!wanted) return false;
      const { slide, at } = wanted;
      wanted = null;
      opened = true;  // do not show the first slide
      setTimeout(() => show(slide, at), 60);
      return true;
    };
    hs.viewer.take = takeWanted;

    async function paint() {
      const kind = layer.value;
      legend.replaceChildren();
      if (kind === "score" && !result) { say("Search first, for example for a region; then this layer shows what resembles it."); return; }
      const options = { clustering: clustering.value, result, opacity: Number(opacity.value) };
      const shown = panes.dataset.two === "1" && right.about ? [left, right] : [left];
      try {
        const each = kind === "tissue" && new Set(shown.map((pane) => pane.about?.slide)).size > 1;  // its area is of one slide
        for (const [n, about] of (await Promise.all(shown.map((pane) => pane.paint(kind, options)))).entries()) {
          if (!about || (legend.childElementCount && !each)) continue;
          for (const [fact, colour] of about.legend) {
            const text = each ? `${shown[n].about.slide}, ${fact}` : fact;
            legend.append(el("li", {}, el("span", { class: "hs-dot", style: `background:${colour}` }), text));
          }
        }
      } catch (error) { failed(error); }
    }

    /* Search for regions of the left slide: `corners` of each; `remark` is added to the answer. */
    function ask(corners, remark = "") {
      const slide = left.about.slide;
      last = () => ask(corners, remark);
      return search({ regions: corners.map((ring) => ({ slide, ring: thinned(ring) })) }, remark);
    }
    async function search(query, remark = "") {
      const mine = ++asking;
      say("Searching …");
      const body = { ...query, k: 24, per_slide: false,
        where: elsewhere.checked && left?.about ? `slide != ${quoted(left.about.slide)}` : null };
      let answer;
      try {
        answer = await json("v1/search", { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });
      } catch (error) { if (mine === asking) failed(error); return; }
      if (mine !== asking) return;
      result = answer.result;
      const cuts = answer.provenance.examples.regions ?? [];
      const sum = (part) => cuts.reduce((total, cut) => total + cut[part], 0);
      const facts = !cuts.length ? [] : [sum("tiles") === 1 ? "one tile around its middle" : `${sum("tiles").toLocaleString()} tiles of the region`];
      if (sum("without_tissue")) facts.push(`${sum("without_tissue").toLocaleString()} without tissue left out`);
      if (sum("not_taken")) facts.push(`${sum("not_taken").toLocaleString()} more not used`);
      if (remark) facts.push(remark);
      facts.push(`${Math.round(answer.milliseconds.embed + answer.milliseconds.search)} ms`);
      say(`${answer.verdict.text} (${facts.join(", ")})`);
      hits.replaceChildren(...answer.hits.map(card));
      if (layer.value === "score") await paint();
    }
    function card(hit) {
      const where = hit.slide === left?.about?.slide ? "this slide" : hit.slide;
      const open = hit.size_px_level0 && !hit.file
        ? () => beside(hit) : () => hs.open(hit.tile);
      return el("li", {}, el("button", { type: "button", class: "hs-vhit", onclick: open,
        "aria-label": `Hit ${hit.rank}, ${where}: show it beside the question` },
        el("img", { src: `v1/tiles/${hit.tile}.jpg`, alt: "", width: 112, height: 112, loading: "lazy" }),
        el("span", {}, el("b", {}, hit.label ?? where), ` ${hit.score.toFixed(3)}`), el("small", {}, where)));
    }
    async function beside(hit) {
      try {
        two(true);
        await right.show(hit.slide, { x: hit.x, y: hit.y, side: hit.size_px_level0 });
        moved(left);
        right.map.panTo(place(hit.x + hit.size_px_level0 / 2, hit.y + hit.size_px_level0 / 2), { animate: false });
        await paint();
        right.section.scrollIntoView({ block: "nearest" });
      } catch (error) { failed(error); }
    }

    /* Draw a box, a free shape, or choose a point. */
    function drawing(pane) {
      const target = pane.map.getContainer();
      let points = null, shape = null;
      const at = (e) => {
        const { x, y } = target.getBoundingClientRect();
        const spot = pane.map.containerPointToLatLng([e.clientX - x, e.clientY - y]);
        return [spot.lng, spot.lat];
      };
      const outline = () => (tool === "box"
        ? [points[0], [points.at(-1)[0], points[0][1]], points.at(-1), [points[0][0], points.at(-1)[1]]] : points);
      const redraw = (corners) => {
        shape?.remove();
        shape = L.polygon(corners.map(([x, y]) => place(x, y)), { ...DRAWN, interactive: false }).addTo(pane.marks);
      };
      const finish = (corners, outlined) => {
        pane.marks.clearLayers();
        redraw(corners);
        const ring = thinned(corners);
        if (!marks.drawn(ring, outlined)) ask([ring]);
      };
      hs.askAround = (x, y) => {
        const half = pane.about.tile_px_level0 / 2;
        finish([[x - half, y - half], [x + half, y - half], [x + half, y + half], [x - half, y + half]], false);
      };
      target.addEventListener("pointerdown", (e) => {
        if (tool === "move" || !pane.about || e.button || e.target.closest(".leaflet-control")) return;
        e.preventDefault();
        e.stopPropagation();
        if (tool === "point") { hs.askAround(...at(e)); return; }
        target.setPointerCapture(e.pointerId);
        points = [at(e)];
      }, true);
      target.addEventListener("pointermove", (e) => {
        if (!points) return;
        points.push(at(e));
        redraw(outline());
      });
      target.addEventListener("pointerup", () => {
        if (!points) return;
        const corners = outline();
        points = null;
        const xs = corners.map((p) => p[0]), ys = corners.map((p) => p[1]);
        const size = Math.min(Math.max(...xs) - Math.min(...xs), Math.max(...ys) - Math.min(...ys));
        if (size * 2 ** pane.map.getZoom() < 4) { pane.marks.clearLayers(); say("That was too small: drag over the region."); return; }
        finish(corners, true);
      });
      target.addEventListener("pointercancel", () => { points = null; pane.marks.clearLayers(); });
    }
    for (const button of tools) button.addEventListener("click", () => {
      tool = button.dataset.tool;
      for (const each of tools) each.setAttribute("aria-pressed", String(each === button));
      for (const pane of [left, right]) pane?.map.dragging[tool === "move" ? "enable" : "disable"]();
      find(".hs-vstage").dataset.tool = tool;
    });
    find("[data-part=middle]").addEventListener("click", () => {
      const { lng, lat } = left.map.getCenter();
      hs.askAround(lng, lat);
    });
    find("[data-part=alone]").addEventListener("click", () => two(false));
    name.addEventListener("input", () => {
      const chosen = [...list.children].some((option) => option.value === name.value);
      clearTimeout(name.timer);
      if (chosen) show(name.value);
      else name.timer = setTimeout(() => names(name.value).catch(failed), 250);
    });
    layer.addEventListener("change", paint);
    clustering.addEventListener("change", paint);
    opacity.addEventListener("input", () => { for (const pane of [left, right]) pane?.layer?.setOpacity(Number(opacity.value)); });
    elsewhere.addEventListener("change", () => last?.());
    find(".hs-words").addEventListener("submit", async (e) => {
      e.preventDefault();
      const words = e.target.elements.words.value.trim();
      if (!words) { say("Type the words to search for."); return; }
      last = () => search({ texts: [words] });
      layer.value = "score";  // where on this slide the words fit best
      await last();
    });

    new IntersectionObserver((seen) => {
      if (opened || !seen.some((s) => s.isIntersecting) || takeWanted()) return;
      opened = true;
      names().then((slides) => {
        find(".hs-vbar").hidden = !slides.length;
        if (!slides.length) { opened = false; say("The atlas has no slides yet. Add one in the tab New slide."); }
        else if (!left?.about) show(slides[0].name);
      }).catch((error) => { opened = false; failed(error); });
    }).observe(element);
  };
})();
