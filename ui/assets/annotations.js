/* Annotations on the left slide of the viewer: show them, draw, label, change and remove them. */
"use strict";
(() => {
  const hs = window.histoseek, el = hs.el;
  const DESCRIPTION = "ANNOTATION_DESCRIPTION";  // QuPath's name of the note
  const MAX_REGIONS = 8;  // parts that one search takes
  const path = (slide) => `v1/slides/${encodeURIComponent(slide)}/annotations`;
  const labelOf = (feature) => feature.properties?.classification?.name ?? "";
  const noteOf = (feature) => feature.properties?.metadata?.[DESCRIPTION] ?? "";
  const parts = ({ type, coordinates }) => (type === "Polygon" ? [coordinates] : coordinates);
  const colourOf = (feature) => {
    const [r, g, b] = feature.properties?.classification?.color ?? [82, 82, 91];
    return `rgb(${r},${g},${b})`;
  };

  /* Draw the annotations of a slide on a pane; `chosen` is called with the one that is clicked. */
  hs.drawAnnotations = (pane, features, chosen) => {
    pane.annotations?.remove();
    pane.annotations = L.featureGroup(features.map((feature) => {
      const rings = parts(feature.geometry).map((part) => part.map((ring) => ring.map(([x, y]) => L.latLng(y, x))));
      const shape = L.polygon(rings, { color: colourOf(feature), weight: 2.5, fillOpacity: 0.12 });
      shape.bindTooltip(el("span", {}, labelOf(feature) || "no label"), { sticky: true });  // a string would be HTML
      shape.on("click", () => chosen(feature));
      return shape;
    })).addTo(pane.map);
  };

  /* Connect the form and the list; returns what the viewer calls. `ask` searches for rings of a slide. */
  hs.annotations = (element, { json, ask, panes, moving }) => {
    const note = element.querySelector(".hs-marknote");  // its own: a search may answer at the same time
    const say = (text, problem = false) => {
      note.textContent = text;
      note.classList.toggle("hs-problem", problem);
    };
    const failed = (error) => say(error.message, true);
    const form = element.querySelector(".hs-mark"), box = element.querySelector(".hs-marks");
    const shown = element.querySelector("[data-part=marks]"), labels = element.querySelector("#hs-mark-labels");
    const list = box.querySelector("ul"), link = box.querySelector("a"), file = box.querySelector("input");
    const again = form.querySelector("[data-part=again]"), gone = form.querySelector("[data-part=delete]");
    const redraw = form.querySelector("[data-part=redraw]");
    const facts = form.querySelector("small");
    let current = null, known = [], redrawing = false;
    const slide = () => panes()[0]?.about?.slide;
    const reader = () => document.documentElement.dataset.role === "reader";

    const close = () => { form.hidden = true; current = null; redrawing = false; say(""); };
    function edit(feature, stored) {
      current = feature;
      redrawing = false;
      form.hidden = false;
      say("");
      form.elements.label.value = labelOf(feature);
      form.elements.note.value = noteOf(feature);
      again.hidden = redraw.hidden = gone.hidden = !stored;
      for (const field of [form.elements.label, form.elements.note]) field.readOnly = reader();
      const { author, changed_at } = feature.properties;
      facts.textContent = stored ? `${author ? `by ${author}, ` : ""}${changed_at.slice(0, 10)}` : "";
    }

    async function load(pane) {
      const mine = pane.about.slide;
      const { features } = await json(path(mine));
      if (pane.about.slide !== mine) return;
      if (pane === panes()[0]) { known = features; write(); }
      hs.drawAnnotations(pane, shown.checked ? features : [], (feature) => {
        if (!moving()) return;  // a point or a region is being drawn
        if (pane === panes()[0]) edit(feature, true);
        else say(`${labelOf(feature) || "no label"}${noteOf(feature) ? `: ${noteOf(feature)}` : ""}`);
      });
    }
    function write() {
      box.hidden = false;
      link.href = `${path(slide())}?frame=qupath`;
      link.download = `${slide()}.geojson`;
      link.hidden = !known.length;
      box.querySelector("summary").textContent = `Annotations of this slide (${known.length})`;
      labels.replaceChildren(...[...new Set(known.map(labelOf))].filter(Boolean).map((value) => el("option", { value })));
      list.replaceChildren(...known.map((feature) => el("li", {}, el("button", {
        type: "button", class: "hs-link", onclick: () => { edit(feature, true); look(feature); },
      }, el("span", { class: "hs-dot", style: `background:${colourOf(feature)}` }), labelOf(feature) || "no label"),
      noteOf(feature) ? ` ${noteOf(feature)}` : "")));
      if (!known.length) list.append(el("li", {}, "None yet. Draw a region; then it can be labelled here."));
    }
    function look(feature) {
      const corners = parts(feature.geometry).flatMap((part) => part[0]).map(([x, y]) => L.latLng(y, x));
      panes()[0].map.fitBounds(L.latLngBounds(corners).pad(0.3), { animate: false, maxZoom: 0 });
    }

    async function send(body, frame) {
      return json(`${path(slide())}${frame ? `?frame=${frame}` : ""}`, {
        method: "POST", headers: { "content-type": "application/json" }, body,
      });
    }
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      const label = form.elements.label.value.trim(), note = form.elements.note.value.trim();
      if (!label && !note) { say("Give the annotation a label or a note.", true); return; }
      const feature = { type: "Feature", id: current.id, geometry: current.geometry, properties: {
        objectType: "annotation", classification: label ? { name: label } : null,
        metadata: note ? { [DESCRIPTION]: note } : null } };
      try {
        await send(JSON.stringify({ type: "FeatureCollection", features: [feature] }));
        close();
        await load(panes()[0]);
        panes()[0].marks.clearLayers();
        say(`Saved. Find its tiles with the filter annotation.label = '${label.replace(/'/g, "''")}'.`);
      } catch (error) { failed(error); }
    });
    gone.addEventListener("click", async () => {
      if (!confirm("Delete this annotation?")) return;
      try {
        await json(`v1/annotations/${current.id}`, { method: "DELETE" });
        close();
        await load(panes()[0]);
        say("Deleted.");
      } catch (error) { failed(error); }
    });
    redraw.addEventListener("click", () => {
      redrawing = true;
      const rings = parts(current.geometry).flat().length;
      say("Choose Box or Shape and draw the new outline; draw again to correct it." +
        (rings > 1 ? ` It takes the place of all ${rings} outlines and holes of this annotation.` : ""));
    });
    /* Take a drawn ring; returns whether it is the new outline of the annotation in the form. */
    function drawn(ring, outlined) {
      const geometry = { type: "Polygon", coordinates: [[...ring, ring[0]]] };
      if (redrawing && outlined) {
        current = { ...current, geometry };
        say("Save the annotation to keep its new outline, or draw again.");
        return true;
      }
      if (!reader()) edit({ geometry, properties: {} }, false);
      return false;
    }
    again.addEventListener("click", () => {
      const rings = parts(current.geometry).map((part) => part[0]);
      ask(rings.slice(0, MAX_REGIONS), rings.length > MAX_REGIONS ? `the first ${MAX_REGIONS} of ${rings.length} parts` : "");
    });
    form.querySelector("[data-part=close]").addEventListener("click", close);
    link.addEventListener("click", async () => {
      try {
        const { frame_unknown } = await json(`${path(slide())}?frame=qupath`);
        if (frame_unknown) say("The slide's scanned area is unknown: the file has level-0 pixels, and QuPath may have another origin.", true);
      } catch (error) { failed(error); }
    });
    shown.addEventListener("change", () => { for (const pane of panes()) if (pane?.about) load(pane).catch(failed); });
    file.addEventListener("change", async () => {
      if (!file.files.length) return;
      try {
        const text = await file.files[0].text();
        let document;
        try { document = JSON.parse(text); } catch { throw new Error(`${file.files[0].name} is not GeoJSON`); }
        const features = document.features ?? (Array.isArray(document) ? document : [document]);
        const done = await send(JSON.stringify({ type: "FeatureCollection", features }), "qupath");
        await load(panes()[0]);
        const frame = done.frame_unknown ? ". The slide's scanned area is unknown, so level-0 pixels were assumed" : "";
        const skipped = Object.entries(done.skipped).map(([reason, count]) => `${count} x ${reason}`).join("; ");
        say(`${done.added.length} annotations added, ${done.changed.length} changed, ${done.unchanged.length} as before` +
          `${skipped ? `; not taken: ${skipped}` : ""}${frame}.`);
      } catch (error) { failed(error); } finally { file.value = ""; }
    });

    return {
      load: (pane) => load(pane).catch(failed),
      close,
      drawn,
    };
  };
})();
