/* The page's JavaScript: choosing and cropping an image, uploads, the map, a tile in its context. */
"use strict";
(() => {
  const hs = (window.histoseek = window.histoseek || {});
  const el = (tag, attributes = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
      else if (value !== null && value !== false) made.setAttribute(key, value === true ? "" : value);
    }
    made.append(...children);
    return made;
  };
  hs.el = el;
  /* If the server does not know its public address, its links fail: name the header that the proxy omits. */
  const here = new URL(".", location.href), believed = new URL(window.gradio_config?.root || here, here);
  const missing = believed.hostname !== here.hostname ? "Host or X-Forwarded-Host"
    : believed.pathname.replace(/\/?$/, "/") !== here.pathname ? "X-Forwarded-Prefix (or start with --root-path)" : "";
  if (missing) document.body.prepend(el("p", { class: "hs-problem", role: "alert" },
    `This page is at ${here.href}, but the server was told that it is at ${believed.href}. The proxy must send ` +
    `${missing}; see "Behind a proxy" in docs/ui.md. Until then the page cannot search.`));

  const tileUrl = (tile) => `v1/tiles/${tile}.jpg`;

  /* Hide the editors' controls from readers; the server refuses their actions in any case. */
  (async function role(left = 4) {
    try {
      const me = await (await ask("v1/me")).json();
      document.documentElement.dataset.role = me.role;
    } catch (problem) {
      if (left) setTimeout(role, 1000, left - 1);
      else document.body.prepend(el("p", { class: "hs-problem", role: "alert" },
        `Your role is not known (${problem.message}), so that controls may be shown which the server refuses. ` +
        "Reload the page."));
    }
  })();

  async function ask(url) {
    const answer = await fetch(url);
    if (!answer.ok) {
      const body = await answer.json().catch(() => null);
      throw Object.assign(new Error(body?.error?.message ?? `the server answered ${answer.status}`), {
        status: answer.status,
      });
    }
    return answer;
  }

  /* Call `take` with the files that are dropped on an element. */
  function onDrop(target, take) {
    for (const kind of ["dragenter", "dragover"])
      target.addEventListener(kind, (e) => { e.preventDefault(); target.classList.add("hs-over"); });
    for (const kind of ["dragleave", "drop"]) target.addEventListener(kind, () => target.classList.remove("hs-over"));
    target.addEventListener("drop", (e) => { e.preventDefault(); take(e.dataTransfer.files); });
  }

  /* ---- the query image: choose, drop or paste it, and crop it ------------------------------------- */
  hs.picker = (element, trigger, upload) => {
    const input = element.querySelector("input");
    const stage = element.querySelector(".hs-stage");
    const image = stage.querySelector("img");
    const box = stage.querySelector(".hs-crop");
    const note = element.querySelector(".hs-picker-note");
    const whole = element.querySelector(".hs-whole");
    const limit = Number(element.querySelector(".hs-picker").dataset.limit);
    let path = null, name = "", crop = null, start = null, url = null, latest = 0;

    const send = () => trigger("upload", { path, name, crop });
    const draw = () => {
      whole.hidden = !crop;
      box.hidden = !crop;
      if (!crop) return;
      const [x, y, w, h] = crop.map((v) => `${100 * v}%`);
      Object.assign(box.style, { left: x, top: y, width: w, height: h });
    };
    async function take(file) {
      if (!file) return;
      if (file.size > limit) {
        note.textContent = `${file.name} has ${file.size.toLocaleString()} bytes; the limit is ` +
          `${limit.toLocaleString()}. Crop or downsample the image.`;
        return;
      }
      const mine = ++latest;
      path = null;  // a box drawn from now on belongs to the new image
      input.value = "";
      note.textContent = `Sending ${file.name} …`;
      if (url) URL.revokeObjectURL(url);
      url = URL.createObjectURL(file);
      let seen = true;
      image.onload = () => { stage.hidden = false; };
      image.onerror = () => { stage.hidden = true; seen = false; };
      image.src = url;
      image.alt = `your image, ${file.name}`;
      crop = null;
      draw();
      let sent;
      try {
        sent = (await upload(file)).path;
      } catch (error) {
        if (mine === latest) note.textContent = `${file.name} could not be sent: ${error.message ?? error}. Try again.`;
        return;
      }
      if (mine !== latest) return;
      path = sent;
      name = file.name;
      note.textContent = seen ? `${name}. Drag over the image to search with a part of it.`
        : `${name}. This browser cannot show this format, so the whole image is the query.`;
      send();
    }
    input.addEventListener("change", () => take(input.files[0]));
    onDrop(element.querySelector(".hs-drop"), (files) => take(files[0]));
    document.addEventListener("paste", (e) => {
      const file = [...(e.clipboardData?.files ?? [])].find((f) => f.type.startsWith("image/"));
      if (file && element.offsetParent) take(file);
    });

    const at = (e) => {
      const frame = image.getBoundingClientRect();
      const share = (v, low, size) => Math.min(1, Math.max(0, (v - low) / size));
      return [share(e.clientX, frame.left, frame.width), share(e.clientY, frame.top, frame.height)];
    };
    stage.addEventListener("pointerdown", (e) => {
      if (!path) return;
      e.preventDefault();
      stage.setPointerCapture(e.pointerId);
      start = at(e);
    });
    stage.addEventListener("pointermove", (e) => {
      if (!start) return;
      const end = at(e);
      crop = [Math.min(start[0], end[0]), Math.min(start[1], end[1]),
              Math.abs(end[0] - start[0]), Math.abs(end[1] - start[1])];
      draw();
    });
    stage.addEventListener("pointerup", () => {
      if (!start) return;
      start = null;
      if (crop && (crop[2] < 0.02 || crop[3] < 0.02)) crop = null;
      draw();
      send();
    });
    /* Keyboard: arrows move the box, with Shift they resize it, Escape selects the whole image. */
    stage.addEventListener("keydown", (e) => {
      const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[e.key];
      if (!path) return;
      if (e.key === "Escape") crop = null;
      else if (!step) return;
      else {
        e.preventDefault();
        crop = crop ?? [0.25, 0.25, 0.5, 0.5];
        let [x, y, w, h] = crop;
        if (e.shiftKey) { w += step[0] * 0.05; h += step[1] * 0.05; }
        else { x += step[0] * 0.05; y += step[1] * 0.05; }
        w = Math.min(1, Math.max(0.05, w)); h = Math.min(1, Math.max(0.05, h));
        crop = [Math.min(1 - w, Math.max(0, x)), Math.min(1 - h, Math.max(0, y)), w, h];
      }
      draw();
      clearTimeout(stage.timer);
      stage.timer = setTimeout(send, 400);
    });
    stage.addEventListener("pointercancel", () => { start = null; });
    whole.addEventListener("click", () => { crop = null; draw(); send(); });
    hs.clearPicker = () => {
      latest++; path = null; crop = null; name = ""; input.value = ""; stage.hidden = true; draw();
      note.textContent = "";
    };
  };

  /* ---- files to upload: chosen or dropped, listed, and removed from the list --------------------- */
  const choosers = {};
  hs.chosen = (name) => JSON.stringify(choosers[name]?.() ?? {});
  hs.files = (element, upload) => {
    const root = element.querySelector(".hs-picker");
    const input = root.querySelector("input");
    const list = root.querySelector(".hs-files");
    const note = root.querySelector(".hs-picker-note");
    const limit = Number(root.dataset.limit), many = input.multiple;
    let files = [], sending = 0;
    choosers[input.id.replace(/-input$/, "")] = () => ({ files, sending });
    const draw = () => list.replaceChildren(...files.map((file, n) => el("li", {}, el("span", {}, file.name),
      el("button", { type: "button", "aria-label": `Remove ${file.name} from the list`, onclick: () => {
        files = files.filter((_, m) => m !== n); if (root.dataset.local) input.value = ""; draw(); } }, "×"))));
    async function take(chosen) {
      if (root.dataset.local) {
        if (chosen !== input.files) input.files = chosen;
        files = [...input.files].map((file) => ({ name: file.name }));
        draw();
        return;
      }
      const wanted = many ? [...chosen] : [...chosen].slice(0, 1);
      const refused = [];
      sending++;
      for (const [n, file] of wanted.entries()) {
        note.textContent = `Sending ${n + 1} of ${wanted.length}: ${file.name} …`;
        if (file.size > limit) { refused.push(`${file.name} is larger than ${(limit / 2 ** 20).toLocaleString()} MB`); continue; }
        try {
          const { path } = await upload(file);
          files = many ? [...files, { path, name: file.name }] : [{ path, name: file.name }];
        } catch (error) { refused.push(`${file.name} could not be sent: ${error.message ?? error}`); }
        draw();
      }
      note.textContent = refused.join("; ");
      input.value = "";
      sending--;
    }
    input.addEventListener("change", () => take(input.files));
    onDrop(root.querySelector(".hs-drop"), take);
    root.addEventListener("hs-clear", () => { files = []; draw(); });
  };

  /* ---- a new slide: sent directly to the API, which accepts large files ------------------------ */
  hs.addSlide = (name) => async (path, label, patient, mpp, replace) => {
    const root = document.querySelector(`#${name} .hs-picker`);
    const input = root.querySelector("input");
    const note = root.querySelector(".hs-picker-note");
    const row = { label: label ?? "", patient: patient ?? "", mpp: mpp ?? "", replace: Boolean(replace) };
    const file = input.files[0];
    const done = (ok, text) => [JSON.stringify({ ok, text }), label, patient, mpp, replace];
    if (Boolean(file) === Boolean(path?.trim())) return done(false, "choose a file or enter a path; expected exactly one of them");
    let body, kind = null;
    if (file) {
      body = new FormData();
      for (const [key, value] of Object.entries(row)) body.append(key, String(value));
      body.append("file", file);
    } else {
      body = JSON.stringify({ path: path.trim(), ...row });
      kind = "application/json";
    }
    return new Promise((resolve) => {
      const request = new XMLHttpRequest();
      request.open("POST", "v1/slides");
      if (kind) request.setRequestHeader("content-type", kind);
      request.upload.onprogress = (e) => {
        note.textContent = `Sending: ${Math.round((100 * e.loaded) / e.total)} % of ${(e.total / 2 ** 20).toFixed(1)} MB`;
      };
      request.onerror = () => resolve(done(false, "the server does not answer; try again"));
      request.onload = () => {
        note.textContent = "";
        let reply = {};
        try { reply = JSON.parse(request.responseText); } catch { /* use the status */ }
        if (request.status === 202) {
          input.value = "";
          root.dispatchEvent(new Event("hs-clear"));
          resolve(done(true, `${reply.slide} was accepted. The list shows its progress.`));
        } else resolve(done(false, reply.error?.message ?? `the server answered ${request.status}`));
      };
      request.send(body);
    });
  };

  /* ---- choosing tiles anywhere on the page ----------------------------------------------------- */
  document.addEventListener("click", (e) => {
    const button = e.target.closest?.("[data-open],[data-like],[data-unlike],[data-view]");
    if (!button) return;
    if (button.dataset.view) { hs.showSlide?.(button.dataset.view); return; }
    if (button.dataset.open) hs.open(Number(button.dataset.open), button);
    else if (button.dataset.like) pick("like", Number(button.dataset.like));
    else pick("unlike", Number(button.dataset.unlike));
  });
  /* Choosing a tile anywhere opens the first tab, which searches for it. */
  function pick(kind, tile) {
    const tabs = [...document.querySelectorAll("[role=tab], .overflow-dropdown button")];
    const first = tabs.find((tab) => tab.textContent.trim() === "Find similar");
    if (first && first.getAttribute("aria-selected") !== "true") first.click();
    hs.pick?.(kind, tile);
  }
  document.addEventListener("error", (e) => {
    const image = e.target;
    if (!(image instanceof HTMLImageElement) || !image.src.includes("/v1/")) return;
    const text = el("span", { class: "hs-missing", role: "img", "aria-label": image.alt }, "image not available");
    image.replaceWith(text);
    fetch(image.src).then(async (r) => {
      if (!r.ok) text.textContent = (await r.json())?.error?.message ?? text.textContent;
    }).catch(() => {});
  }, true);

  /* ---- a tile in its context ------------------------------------------------------------------- */
  let dialog = null, opening = 0;
  hs.open = async (tile, from) => {
    if (!dialog) {
      dialog = el("dialog", { class: "hs-dialog", "aria-labelledby": "hs-dialog-title" });
      dialog.addEventListener("click", (e) => { if (e.target === dialog) dialog.close(); });
      document.body.append(dialog);
    }
    const close = el("button", { class: "hs-close", "aria-label": "Close", onclick: () => dialog.close() }, "×");
    dialog.replaceChildren(close, el("h2", { id: "hs-dialog-title" }, `Tile ${tile}`), el("p", {}, "Loading …"));
    if (!dialog.open) dialog.showModal();
    dialog.onclose = () => from?.focus?.();
    const mine = ++opening;
    let facts;
    try {
      facts = await (await ask(`v1/tiles/${tile}`)).json();
    } catch (error) {
      dialog.replaceChildren(close, el("h2", { id: "hs-dialog-title" }, `Tile ${tile}`),
        el("p", { role: "alert" }, error.message));
      return;
    }
    if (mine !== opening) return;
    const where = facts.file ?? `x ${facts.x}, y ${facts.y}`;
    const figure = (url, alt, caption) => el("figure", {}, el("img", { src: url, alt }), el("figcaption", {}, caption));
    const list = el("dl", { class: "hs-facts-list" });
    const rows = { slide: facts.slide, position: where, label: facts.label, patient: facts.patient,
      cluster: facts.cluster === null || facts.cluster < 0 ? null : facts.cluster,
      "µm per pixel of level 0": facts.mpp };
    for (const [key, value] of Object.entries(rows))
      if (value !== null && value !== undefined && value !== "")
        list.append(el("dt", {}, key), el("dd", {}, String(value)));
    const act = (kind, text) => el("button", {
      class: "hs-act", onclick: () => { dialog.close(); pick(kind, tile); } }, text);
    const images = el("div", { class: "hs-context" },
      figure(tileUrl(tile), `tile ${tile}`, "the tile"),
      figure(`v1/tiles/${tile}/field.jpg`, `tile ${tile} with its surroundings`,
        facts.file ? "the whole image; the box is what the encoder saw" : "its surroundings, at a lower magnification"));
    if (!facts.file) images.append(figure(`v1/tiles/${tile}/place.jpg`, `position of tile ${tile} on the slide`, "position on the slide"));
    const onSlide = facts.file || !facts.size_px_level0 ? [] : [el("button", { class: "hs-act", onclick: () => {
      dialog.close();
      hs.showSlide?.(facts.slide, { x: facts.x, y: facts.y, side: facts.size_px_level0 });
    } }, "Open in the slide viewer")];
    dialog.replaceChildren(close, el("h2", { id: "hs-dialog-title" }, `${facts.slide}, ${where}`),
      images, list, el("div", { class: "hs-acts" }, act("like", "+ More like this"), act("unlike", "− Unlike this"), ...onSlide));
    close.focus();
  };

  /* ---- the map --------------------------------------------------------------------------------- */
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const PALETTE = ["#E69F00", "#56B4E9", "#009E73", "#C8B400", "#0072B2", "#D55E00", "#CC79A7"];
  const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "x", "star"];
  const NONE = "#9a9a9a";
  const LEGEND = 28;

  function unpack(buffer) {
    const length = new DataView(buffer).getUint32(0, true);
    const about = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
    const at = 4 + length, n = about.shown;
    return { about, ids: new Float64Array(buffer, at, n), places: new Float32Array(buffer, at + 8 * n, 2 * n),
      codes: new Int32Array(buffer, at + 16 * n, n) };
  }

  const script = (() => {
    let loading = null;
    return () => (loading ??= new Promise((done, failed) => {
      document.head.append(el("script", { src: "page-assets/plotly.min.js", onload: done,
        onerror: () => { loading = null; failed(new Error("the library Plotly could not be loaded; reload the page")); } }));
    }));
  })();

  hs.map = (element, { fields = null, by = "cluster", stars = () => [] }) => {
    const plot = element.querySelector(".hs-plot");
    const note = element.querySelector(".hs-map-note");
    const gallery = element.querySelector(".hs-lassoed");
    const select = element.querySelector("select");
    const peek = element.querySelector(".hs-peek");
    let data = null, wanted = by, drawing = 0, loaded = null;
    const revision = () => `${document.querySelector(".hs-head")?.dataset.revision} ${hs.changes ?? 0}`;

    async function load() {
      const mine = ++drawing;
      loaded = revision();
      for (let wait = 0; ; wait++) {
        try {
          const answer = await ask(`v1/map?by=${encodeURIComponent(wanted)}`);
          if (answer.status === 200) {
            const found = unpack(await answer.arrayBuffer());
            if (mine !== drawing) return;
            data = found;
            break;
          }
        } catch (error) {
          note.textContent = `No map: ${error.message}`;
          return;
        }
        if (mine !== drawing) return;
        if (wait > 3) note.textContent = "Computing the map … this happens once and takes some seconds.";
        await new Promise((r) => setTimeout(r, wait < 4 ? 300 : 1500));
      }
      await draw();
    }

    const dark = () => document.body.classList.contains("dark");

    async function draw() {
      if (!data) return;
      await script();
      const { about, ids, places, codes } = data;
      const few = about.names.length <= LEGEND;
      const groups = new Map();
      for (let n = 0; n < ids.length; n++) {
        const key = few ? codes[n] : 0;
        if (!groups.has(key)) groups.set(key, []);
        groups.get(key).push(n);
      }
      const size = ids.length > 50000 ? 3 : ids.length > 5000 ? 4 : 6;
      const colour = (code) => (code < 0 ? NONE : PALETTE[code % PALETTE.length]);
      const traces = [...groups.keys()].sort((a, b) => a - b).map((key) => {
        const rows = groups.get(key);
        const name = few ? (key < 0 ? `none (${rows.length.toLocaleString()})`
          : `${plain(about.names[key])} (${rows.length.toLocaleString()})`) : "tiles";
        return {
          type: "scattergl", mode: "markers", name, hoverinfo: "none", customdata: rows.map((n) => ids[n]),
          x: Float32Array.from(rows, (n) => places[2 * n]), y: Float32Array.from(rows, (n) => places[2 * n + 1]),
          marker: { size, opacity: 0.7, color: few ? colour(key) : rows.map((n) => colour(codes[n])),
            symbol: few && key >= 0 ? SYMBOLS[Math.floor(key / PALETTE.length) % SYMBOLS.length] : "circle" },
        };
      });
      const extra = stars();
      if (extra.length) traces.push({
        type: "scatter", mode: extra.length <= 8 ? "markers+text" : "markers", name: `new images (${extra.length})`,
        x: extra.map((s) => s.x), y: extra.map((s) => s.y), text: extra.map((s) => plain(s.name)),
        textposition: "top center", hovertext: extra.map((s) => plain(`${s.name}: ${s.cluster}`)), hoverinfo: "text",
        marker: { size: 15, symbol: "star", color: dark() ? "#ffffff" : "#111111",
          line: { color: dark() ? "#111111" : "#ffffff", width: 1.5 } },
      });
      const ink = dark() ? "#e7e7ea" : "#27272a";
      const axis = { visible: false, zeroline: false };
      await Plotly.react(plot, traces, {
        height: window.innerWidth < 600 ? 420 : 560, margin: { l: 5, r: 5, t: lasso ? 34 : 5, b: 5 },
        xaxis: axis, yaxis: { ...axis, scaleanchor: "x" }, dragmode: "pan", hovermode: "closest",
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink },
        legend: { orientation: "h", y: -0.02, font: { size: 12 } }, showlegend: few || extra.length > 0, uirevision: wanted,
      }, { displaylogo: false, responsive: true, showTips: false, scrollZoom: true,
        modeBarButtons: [["zoomIn2d", "zoomOut2d", "resetScale2d"]] });
      const shown = about.shown < about.total
        ? `${about.shown.toLocaleString()} of ${about.total.toLocaleString()} tiles, chosen at random`
        : `All ${about.total.toLocaleString()} tiles`;
      note.textContent = `${shown}. ${about.method} of ${about.landmarks.toLocaleString()}; trustworthiness ` +
        `${about.trust.toFixed(3)} of 1: points that are close are similar; distances between groups mean little.` +
        (few ? "" : ` ${about.names.length.toLocaleString()} values share seven colours, so a colour has several meanings.`);
      fit();
      if (plot.dataset.wired) return;
      plot.dataset.wired = "1";
      plot.on("plotly_relayout", () => { lasso?.querySelector("polygon").setAttribute("points", ""); fit(); });
      plot.on("plotly_afterplot", fit);
      if (lasso) new ResizeObserver(() => setTimeout(fit, 200)).observe(plot);
      plot.on("plotly_click", (e) => { const p = e.points[0]; if (p.customdata !== undefined) hs.open(p.customdata, plot); });
      plot.on("plotly_hover", (e) => {
        const p = e.points[0];
        if (p.customdata === undefined) return;
        const frame = element.getBoundingClientRect();
        peekShow(p.customdata, e.event.clientX - frame.left, e.event.clientY - frame.top, frame.width);
      });
      plot.on("plotly_unhover", () => { peek.hidden = true; });
    }

    function show(ids) {
      if (!gallery) return;
      const some = ids.length > 60 ? ids.filter((_, n) => n % Math.ceil(ids.length / 60) === 0) : ids;
      const head = ids.length
        ? `${ids.length.toLocaleString()} tiles selected` + (some.length < ids.length ? `, ${some.length} of them shown` : "")
        : "Draw around points to see their tiles; click a point or a tile to open it.";
      gallery.replaceChildren(el("p", { role: "status" }, head), el("ul", { class: "hs-strip" }, ...some.map((tile) =>
        el("li", {}, el("button", { class: "hs-open", "data-open": tile, "aria-label": `Open tile ${tile}` },
          el("img", { src: tileUrl(tile), alt: `tile ${tile}`, width: 96, height: 96, loading: "lazy" }))))));
    }

    /* Plotly's lasso tests every point at every mouse move; this one tests once, at the end. */
    const lasso = gallery && element.querySelector(".hs-lasso");
    if (lasso) {
      const polygon = lasso.querySelector("polygon");
      let path = null;
      const at = (e) => {
        const frame = lasso.getBoundingClientRect();
        return [e.clientX - frame.left, e.clientY - frame.top];
      };
      const paint = () => polygon.setAttribute("points", (path ?? []).map((p) => p.join(",")).join(" "));
      const tools = [...element.querySelectorAll(".hs-tool")];
      const use = (tool) => {
        for (const button of tools) button.setAttribute("aria-pressed", String(button.dataset.tool === tool));
        lasso.toggleAttribute("hidden", tool !== "lasso");
      };
      for (const button of tools) button.addEventListener("click", () => use(button.dataset.tool));
      lasso.addEventListener("pointerdown", (e) => {
        if (!plot._fullLayout) return;
        e.preventDefault();
        lasso.setPointerCapture(e.pointerId);
        path = [at(e)];
      });
      lasso.addEventListener("pointermove", (e) => { if (path) { path.push(at(e)); paint(); } else peekAt(e); });
      lasso.addEventListener("pointerup", (e) => {
        const drawn = path;
        path = null;
        if (!drawn) return;
        const moved = drawn.some(([x, y]) => Math.abs(x - drawn[0][0]) + Math.abs(y - drawn[0][1]) > 6);
        if (moved) show(inside(drawn));
        else { const tile = nearest(at(e)); if (tile !== null) hs.open(tile, lasso); }
      });
      lasso.addEventListener("pointercancel", () => { path = null; paint(); });
      lasso.addEventListener("wheel", (e) => {
        e.preventDefault();
        plot.querySelector(".nsewdrag")?.dispatchEvent(new WheelEvent("wheel", e));
      }, { passive: false });
      lasso.addEventListener("pointerleave", () => { if (peek) peek.hidden = true; });
      use(window.innerWidth < 700 ? "move" : "lasso");  // so that a finger can scroll the page
    }
    /* The lasso covers only the points: legend and buttons stay clickable. */
    function fit() {
      if (!lasso || !plot._fullLayout) return;
      const { xaxis, yaxis } = plot._fullLayout;
      Object.assign(lasso.style, { left: `${xaxis._offset}px`, top: `${yaxis._offset}px`,
        width: `${xaxis._length}px`, height: `${yaxis._length}px` });
    }
    /* Every visible point with its coordinates in pixels of the overlay. */
    function* shownPoints() {
      const { xaxis, yaxis } = plot._fullLayout;
      for (const trace of plot.data) {
        if (!trace.customdata || trace.visible === "legendonly") continue;
        for (let n = 0; n < trace.x.length; n++)
          yield [xaxis.l2p(trace.x[n]), yaxis.l2p(trace.y[n]), trace.customdata[n]];
      }
    }
    function inside(polygon) {
      const xs = polygon.map((p) => p[0]), ys = polygon.map((p) => p[1]);
      const [left, right, top, bottom] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
      const found = [];
      for (const [x, y, tile] of shownPoints()) {
        if (x < left || x > right || y < top || y > bottom) continue;
        let odd = false;
        for (let a = 0, b = polygon.length - 1; a < polygon.length; b = a++) {
          const [ax, ay] = polygon[a], [bx, by] = polygon[b];
          if (ay > y !== by > y && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) odd = !odd;
        }
        if (odd) found.push(tile);
      }
      return found;
    }
    function nearest([x, y], reach = 9) {
      let best = null, least = reach * reach;
      for (const [px, py, tile] of shownPoints()) {
        const apart = (px - x) ** 2 + (py - y) ** 2;
        if (apart < least) { least = apart; best = tile; }
      }
      return best;
    }
    let peeking = 0;
    function peekAt(e) {
      cancelAnimationFrame(peeking);
      peeking = requestAnimationFrame(() => {
        if (!plot._fullLayout || !data || data.ids.length > 50000) return;
        const frame = lasso.getBoundingClientRect(), whole = element.getBoundingClientRect();
        const tile = nearest([e.clientX - frame.left, e.clientY - frame.top], 7);
        if (tile === null) { peek.hidden = true; return; }
        peekShow(tile, e.clientX - whole.left, e.clientY - whole.top, whole.width);
      });
    }
    function peekShow(tile, x, y, width) {
      if (peek.dataset.tile !== String(tile))
        peek.replaceChildren(el("img", { src: tileUrl(tile), alt: "", width: 112, height: 112 }));
      peek.dataset.tile = tile;
      peek.style.left = `${Math.min(x + 14, width - 120)}px`;
      peek.style.top = `${y + 14}px`;
      peek.hidden = false;
    }

    if (select) {
      (fields ?? []).forEach(([value, text]) => select.append(el("option", { value }, text)));
      select.value = wanted;
      select.addEventListener("change", () => { wanted = select.value; load(); });
    }
    show([]);
    /* Draw the map when it first becomes visible: a hidden tab has no width. */
    new IntersectionObserver((seen) => {
      if (seen.some((s) => s.isIntersecting) && loaded !== revision())
        load().catch((e) => { loaded = null; note.textContent = `No map: ${e.message}`; });
    }).observe(element);
    new MutationObserver(() => data && draw()).observe(document.body, { attributeFilter: ["class"] });
    return { draw, load, set: (value) => { if (value === wanted && data) return draw(); wanted = value; return load(); } };
  };

  /* ---- on small screens, scroll to the answer --------------------------------------------------- */
  hs.answered = (element) => new MutationObserver(() => {
    if (window.innerWidth < 700 && element.querySelector(".hs-verdict, .hs-problem"))
      element.scrollIntoView({ block: "start" });
  }).observe(element, { childList: true, subtree: true });

  /* ---- clusters: names given by users ---------------------------------------------------------- */
  document.addEventListener("submit", async (e) => {
    const form = e.target.closest?.(".hs-rename");
    if (!form) return;
    e.preventDefault();
    const cluster = form.closest("[data-cluster]").dataset.cluster;
    const status = form.querySelector("[role=status]");
    status.textContent = "Saving …";
    const body = { name: form.elements.name.value, description: form.elements.description.value,
      clustering: form.dataset.clustering };
    try {
      const answer = await fetch(`v1/clusters/${cluster}`, {
        method: "PUT", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });
      status.textContent = answer.ok ? "Saved." : (await answer.json()).error.message;
      if (answer.ok) hs.changes = (hs.changes ?? 0) + 1;
    } catch (error) {
      status.textContent = `Not saved: ${error.message}. Check that the server is running.`;
    }
  });
})();
