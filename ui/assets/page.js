/* The page's JavaScript: choosing and cropping an image, uploads, a tile in its context. */
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

  /* A tile of a further atlas is called "number of the atlas:id", one of the server's own just by its id. */
  const tilePath = (tile) => {
    const [id, atlas] = String(tile).split(":").reverse();
    return atlas ? `v1/atlases/${atlas}/tiles/${id}` : `v1/tiles/${id}`;
  };
  const tileUrl = (tile) => `${tilePath(tile)}.jpg`;
  hs.tileUrl = tileUrl;
  hs.ask = ask;

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

    const scale = element.querySelector(".hs-micron"), match = element.querySelector(".hs-match");
    const [value, unit] = scale ? [scale.querySelector("input"), scale.querySelector("select")] : [];
    /* µm per pixel; null if it is unknown. */
    const mpp = () => {
      const given = Number(value?.value);
      return given > 0 ? (unit.value === "x" ? 10 / given : given) : null;
    };
    const send = () => { match.hidden = true; trigger("upload", { path, name, crop, mpp: mpp() }); };
    for (const field of scale ? [value, unit] : []) field.addEventListener("change", () => path && send());
    /* The part of the image that a hit resembles, while the pointer or the focus is on the hit. */
    const part = (e) => {
      const box = e.target.closest?.(".hs-card[data-part]")?.dataset.part.split(",").map((v) => `${100 * v}%`);
      match.hidden = !box;
      if (box) Object.assign(match.style, { left: box[0], top: box[1], width: box[2], height: box[3] });
    };
    for (const kind of ["pointerover", "focusin"]) document.addEventListener(kind, part);
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
      if (scale) { scale.hidden = false; value.value = ""; }
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
      if (scale) scale.hidden = true;
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
  hs.addSlide = (name) => async (path, label, patient, mpp, replace, tissue, sharpness, pen) => {
    const root = document.querySelector(`#${name} .hs-picker`);
    const input = root.querySelector("input");
    const note = root.querySelector(".hs-picker-note");
    const row = { label: label ?? "", patient: patient ?? "", mpp: mpp ?? "", replace: Boolean(replace), tissue_model: tissue, min_sharpness: sharpness, max_pen: pen };
    const file = input.files[0];
    const done = (ok, text) => [JSON.stringify({ ok, text }), label, patient, mpp, replace, tissue, sharpness, pen];
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
    const button = e.target.closest?.("[data-open],[data-like],[data-unlike],[data-view],[data-tab]");
    if (!button) return;
    if (button.dataset.tab) { openTab(button.dataset.tab); return; }
    if (button.dataset.view) { hs.showSlide?.(button.dataset.view); return; }
    if (button.dataset.open) hs.open(button.dataset.open, button);
    else if (button.dataset.like) pick("like", button.dataset.like);
    else pick("unlike", button.dataset.unlike);
  });
  /* Choosing a tile anywhere opens the first tab, which searches for it. */
  function pick(kind, tile) {
    openTab("Find similar");
    hs.pick?.(kind, tile);
  }
  function openTab(name) {
    const tabs = [...document.querySelectorAll("[role=tab], .overflow-dropdown button")];
    const tab = tabs.find((each) => each.textContent.trim() === name);
    if (tab && tab.getAttribute("aria-selected") !== "true") tab.click();
  }
  hs.openTab = openTab;
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
    dialog.replaceChildren(close, el("h2", { id: "hs-dialog-title" }, `Tile ${String(tile).split(":").pop()}`), el("p", {}, "Loading …"));
    if (!dialog.open) dialog.showModal();
    dialog.onclose = () => from?.focus?.();
    const mine = ++opening;
    let facts;
    try {
      facts = await (await ask(tilePath(tile))).json();
    } catch (error) {
      dialog.replaceChildren(close, el("h2", { id: "hs-dialog-title" }, `Tile ${String(tile).split(":").pop()}`),
        el("p", { role: "alert" }, error.message));
      return;
    }
    if (mine !== opening) return;
    const where = facts.file ?? `x ${facts.x}, y ${facts.y}`;
    const elsewhere = String(tile).includes(":");  /* viewer and clusters are of the server's own atlas */
    const figure = (url, alt, caption) => el("figure", {}, el("img", { src: url, alt }), el("figcaption", {}, caption));
    const list = el("dl", { class: "hs-facts-list" });
    const rows = { slide: facts.slide, position: where, label: facts.label, patient: facts.patient,
      cluster: elsewhere || facts.cluster === null || facts.cluster < 0 ? null : facts.cluster,
      "µm per pixel of level 0": facts.mpp };
    for (const [key, value] of Object.entries(rows))
      if (value !== null && value !== undefined && value !== "")
        list.append(el("dt", {}, key), el("dd", {}, String(value)));
    const act = (kind, text) => el("button", {
      class: "hs-act", onclick: () => { dialog.close(); pick(kind, tile); } }, text);
    const images = el("div", { class: "hs-context" },
      figure(tileUrl(tile), `tile ${tile}`, "the tile"),
      figure(`${tilePath(tile)}/field.jpg`, `tile ${tile} with its surroundings`,
        facts.file ? "the whole image; the box is what the encoder saw" : "its surroundings, at a lower magnification"));
    if (!facts.file) images.append(figure(`${tilePath(tile)}/place.jpg`, `position of tile ${tile} on the slide`, "position on the slide"));
    const onSlide = elsewhere || facts.file || !facts.size_px_level0 ? [] : [el("button", { class: "hs-act", onclick: () => {
      dialog.close();
      hs.showSlide?.(facts.slide, { x: facts.x, y: facts.y, side: facts.size_px_level0 });
    } }, "Open in the slide viewer")];
    dialog.replaceChildren(close, el("h2", { id: "hs-dialog-title" }, `${facts.slide}, ${where}`),
      images, list, el("div", { class: "hs-acts" }, act("like", "+ More like this"), act("unlike", "− Unlike this"), ...onSlide));
    close.focus();
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
