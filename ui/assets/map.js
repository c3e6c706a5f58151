/* The map of the atlas on a canvas: density where tiles lie close together, symbols where they are few. */
"use strict";
(() => {
  const hs = window.histoseek, el = hs.el;
  const PALETTE = ["#E69F00", "#56B4E9", "#009E73", "#C8B400", "#0072B2", "#D55E00", "#CC79A7"];
  const SIGNS = ["●", "■", "◆", "▲", "✚", "✖", "★"];
  const NONE = "#9a9a9a";
  const LEGEND = 28;  // more values than this have no legend
  const SYMBOLS_UP_TO = 20_000;  // tiles in view that are drawn one by one
  const GRID = 65_535;  // coordinates are from 0 to this
  const REACH = 9;  // pixels around the pointer
  const SHOWN = 60;  // tiles of a selection that are shown
  const colourOf = (code) => (code ? PALETTE[(code - 1) % PALETTE.length] : NONE);
  const shapeOf = (code) => (code ? Math.floor((code - 1) / PALETTE.length) % SIGNS.length : 0);
  const parsed = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  const number = (n) => n.toLocaleString();

  /* The answer of v1/map: a header, and of every tile its id, place and code (0: no value). */
  function unpack(buffer) {
    const length = new DataView(buffer).getUint32(0, true);
    const about = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
    const n = about.shown;
    let at = 4 + length, ids = null, places = null;
    if (about.places) {
      if (!about.runs) { ids = new Float64Array(buffer, at, n); at += 8 * n; }
      places = new Uint16Array(buffer, at, 2 * n);
      at += 4 * n;
    }
    const Kind = { 1: Uint8Array, 2: Uint16Array, 4: Uint32Array }[about.code_bytes];
    return { about, ids, places, codes: new Kind(buffer, at, n) };
  }

  /* Tile ids of numbers: most atlases have a few runs of consecutive ids. */
  function idsOf({ about, ids }) {
    if (ids) return (n) => ids[n];
    const ends = [];
    let end = 0;
    for (const [, count] of about.runs) ends.push((end += count));
    return (n) => {
      let low = 0, high = ends.length - 1;
      while (low < high) {
        const middle = (low + high) >> 1;
        if (n < ends[middle]) high = middle; else low = middle + 1;
      }
      return about.runs[low][0] + n - (low ? ends[low - 1] : 0);
    };
  }

  /* Place of a new image, from -1 to 1, on the grid. */
  const onGrid = (x, y) => [((x + 1) / 2) * GRID, ((y + 1) / 2) * GRID];
  /* The smallest box around places, as [left, low, right, high]. */
  function boxOf(places) {
    let left = GRID, low = GRID, right = 0, high = 0;
    for (let at = 0; at < places.length; at += 2) {
      left = Math.min(left, places[at]);
      right = Math.max(right, places[at]);
      low = Math.min(low, places[at + 1]);
      high = Math.max(high, places[at + 1]);
    }
    return left > right ? [0, 0, GRID, GRID] : [left, low, right, high];
  }

  function symbol(path, shape, x, y, r) {
    const corners = {
      1: [[-1, -1], [1, -1], [1, 1], [-1, 1]], 2: [[0, -1.3], [1.3, 0], [0, 1.3], [-1.3, 0]],
      3: [[0, -1.2], [1.1, 0.9], [-1.1, 0.9]],
      4: [[-0.4, -1.2], [0.4, -1.2], [0.4, -0.4], [1.2, -0.4], [1.2, 0.4], [0.4, 0.4], [0.4, 1.2], [-0.4, 1.2],
        [-0.4, 0.4], [-1.2, 0.4], [-1.2, -0.4], [-0.4, -0.4]],
      5: [[-1.1, -0.6], [-0.6, -1.1], [0, -0.5], [0.6, -1.1], [1.1, -0.6], [0.5, 0], [1.1, 0.6], [0.6, 1.1], [0, 0.5],
        [-0.6, 1.1], [-1.1, 0.6], [-0.5, 0]],
      6: star(1.3),
    }[shape];
    if (!corners) { path.moveTo(x + r, y); path.arc(x, y, r, 0, 7); return; }
    corners.forEach(([dx, dy], n) => (n ? path.lineTo(x + dx * r, y + dy * r) : path.moveTo(x + dx * r, y + dy * r)));
    path.closePath();
  }
  function star(size) {
    return Array.from({ length: 10 }, (_, n) => {
      const turn = (n * Math.PI) / 5 - Math.PI / 2, r = n % 2 ? size * 0.42 : size;
      return [Math.cos(turn) * r, Math.sin(turn) * r];
    });
  }

  /* What is shown: a point of the map in the middle of the canvas, and pixels per unit of the grid. */
  class Frame {
    constructor(canvas) { this.canvas = canvas; this.around = [0, 0, GRID, GRID]; this.whole(); }
    get width() { return this.canvas.clientWidth; }
    get height() { return this.canvas.clientHeight; }
    whole() {
      const [left, low, right, high] = this.around;
      this.x = (left + right) / 2;
      this.y = (low + high) / 2;
      this.k = null;
    }
    get scale() {
      const [left, low, right, high] = this.around, least = GRID / 50;  // no closer, if all places are one
      return this.k ?? 0.9 * Math.min(this.width / Math.max(right - left, least), this.height / Math.max(high - low, least));
    }
    /* Set what whole() shows, [left, low, right, high]; show it if the whole was shown before. */
    surround(around) {
      this.around = around;
      if (this.k === null) this.whole();
    }
    toPixel(x, y) { return [(x - this.x) * this.scale + this.width / 2, (this.y - y) * this.scale + this.height / 2]; }
    toMap(px, py) { return [(px - this.width / 2) / this.scale + this.x, this.y - (py - this.height / 2) / this.scale]; }
    move(dx, dy) { const k = this.scale; this.x -= dx / k; this.y += dy / k; this.k = k; }
    zoom(factor, px = this.width / 2, py = this.height / 2) {
      const [x, y] = this.toMap(px, py), least = (0.5 * Math.min(this.width, this.height)) / GRID;
      this.k = Math.min(8, Math.max(least, this.scale * factor));
      const [nx, ny] = this.toPixel(x, y);
      this.move(px - nx, py - ny);
    }
    get box() {
      const [left, top] = this.toMap(0, 0), [right, bottom] = this.toMap(this.width, this.height);
      return [left, bottom, right, top].map((v) => Math.round(Math.min(GRID, Math.max(0, v))));
    }
  }

  /* Draw the tiles; returns how many are in view. */
  class Painter {
    constructor(canvas) { this.canvas = canvas; this.sheet = document.createElement("canvas"); this.last = 0; }

    paint(frame, data, hidden, stars) {
      const { width, height } = frame, ratio = Math.min(2, window.devicePixelRatio || 1), canvas = this.canvas;
      if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
        canvas.width = Math.round(width * ratio);
        canvas.height = Math.round(height * ratio);
      }
      const brush = canvas.getContext("2d");
      brush.setTransform(ratio, 0, 0, ratio, 0, 0);
      brush.clearRect(0, 0, width, height);
      if (!width || !height) return 0;
      const near = [];
      const count = this.gather(frame, data, hidden, near);
      if (count <= SYMBOLS_UP_TO) this.symbols(brush, frame, data, near);
      else this.density(brush, width, height);
      this.stars(brush, frame, stars);
      this.last = count;
      return count;
    }

    /* Sum the colours per cell of the screen, and list the tiles in view while they are few. */
    gather(frame, { places, codes }, hidden, near) {
      const cell = (this.cell = this.last > 300_000 ? 1 : this.last > 60_000 ? 2 : 3);
      const columns = (this.columns = Math.ceil(frame.width / cell)), rows = (this.rows = Math.ceil(frame.height / cell));
      if (this.sums?.length !== 4 * columns * rows) this.sums = new Uint32Array(4 * columns * rows);
      else this.sums.fill(0);
      const sums = this.sums, k = frame.scale / cell;
      const left = frame.width / 2 / cell - frame.x * k, top = frame.height / 2 / cell + frame.y * k;
      const most = Math.max(...hidden.keys(), 0);
      const colours = this.colours(codes), off = new Uint8Array(Math.max(most + 1, colours.length / 3));
      for (const code of hidden.keys()) off[code] = 1;
      let count = 0;
      for (let n = 0, at = 0; n < codes.length; n++, at += 2) {
        const code = codes[n];
        if (off[code]) continue;
        const x = Math.floor(places[at] * k + left), y = Math.floor(top - places[at + 1] * k);
        if (x < 0 || y < 0 || x >= columns || y >= rows) continue;
        if (count++ < SYMBOLS_UP_TO) near.push(n);
        const spot = 4 * (y * columns + x), c = 3 * code;
        sums[spot] += colours[c];
        sums[spot + 1] += colours[c + 1];
        sums[spot + 2] += colours[c + 2];
        sums[spot + 3]++;
      }
      return count;
    }
    colours(codes) {
      if (this.coloured !== codes) {
        let most = 0;
        for (let n = 0; n < codes.length; n++) if (codes[n] > most) most = codes[n];
        this.palette = new Uint32Array(Array.from({ length: most + 1 }, (_, code) => parsed(colourOf(code))).flat());
        this.coloured = codes;
      }
      return this.palette;
    }

    density(brush, width, height) {
      const { sums, columns, rows, sheet } = this;
      sheet.width = columns;
      sheet.height = rows;
      const image = new ImageData(columns, rows), pixels = image.data;
      let most = 1;
      for (let at = 3; at < sums.length; at += 4) if (sums[at] > most) most = sums[at];
      const full = Math.log1p(most);
      for (let at = 0; at < sums.length; at += 4) {
        const n = sums[at + 3];
        if (!n) continue;
        pixels[at] = sums[at] / n;
        pixels[at + 1] = sums[at + 1] / n;
        pixels[at + 2] = sums[at + 2] / n;
        pixels[at + 3] = 90 + (165 * Math.log1p(n)) / full;
      }
      sheet.getContext("2d").putImageData(image, 0, 0);
      brush.imageSmoothingEnabled = false;
      brush.drawImage(sheet, 0, 0, columns * this.cell, rows * this.cell);
    }

    symbols(brush, frame, { places, codes }, near) {
      const r = near.length > 6000 ? 1.6 : near.length > 1500 ? 2.4 : 3.4;
      const paths = new Map();
      for (const n of near) {
        const code = codes[n];
        if (!paths.has(code)) paths.set(code, new Path2D());
        const [x, y] = frame.toPixel(places[2 * n], places[2 * n + 1]);
        symbol(paths.get(code), shapeOf(code), x, y, r);
      }
      brush.globalAlpha = 0.8;
      for (const [code, path] of [...paths].sort((a, b) => a[0] - b[0])) {
        brush.fillStyle = colourOf(code);
        brush.fill(path);
      }
      brush.globalAlpha = 1;
    }

    stars(brush, frame, found) {
      const dark = document.body.classList.contains("dark");
      brush.lineWidth = 1.5;
      brush.font = "12px system-ui, sans-serif";
      brush.textAlign = "center";
      for (const { x, y, name } of found) {
        const [px, py] = frame.toPixel(...onGrid(x, y)), path = new Path2D();
        symbol(path, 6, px, py, 7);
        brush.fillStyle = dark ? "#ffffff" : "#111111";
        brush.strokeStyle = dark ? "#111111" : "#ffffff";
        brush.fill(path);
        brush.stroke(path);
        if (found.length <= 8) brush.fillText(name, px, py - 13);
      }
    }
  }

  hs.map = (element, { fields = null, by = "cluster", stars = () => [] }) => {
    const plot = element.querySelector(".hs-plot"), canvas = plot.querySelector("canvas");
    const polygon = plot.querySelector("polygon"), note = element.querySelector(".hs-map-note");
    const gallery = element.querySelector(".hs-lassoed"), select = element.querySelector("select");
    const peek = element.querySelector(".hs-peek"), legend = element.querySelector(".hs-maplegend");
    const frame = new Frame(canvas), painter = new Painter(canvas);
    const hidden = new Map();  // by code
    let data = null, boxed = null, tilesBox = null, idOf = null, wanted = by, asking = 0, loaded = null, drawing = 0, fetching = 0;
    const revision = () => `${document.querySelector(".hs-head")?.dataset.revision} ${hs.changes ?? 0}`;

    async function load({ box = null, places = true } = {}) {
      const mine = ++asking;
      loaded = revision();
      for (let wait = 0; ; wait++) {
        try {
          const query = new URLSearchParams({ by: wanted, places });
          if (box) query.set("box", box.join(","));
          const answer = await hs.ask(`v1/map?${query}`);
          if (answer.status === 200) {
            const found = unpack(await answer.arrayBuffer());
            if (mine !== asking) return;
            if (!places) {
              if (found.about.revision !== data.about.revision) return load({ box });
              Object.assign(found, { places: data.places, ids: data.ids });
              found.about.runs = data.about.runs;
            }
            if (data?.about.by !== wanted) hidden.clear();
            data = found;
            boxed = box;
            if (!box && places) tilesBox = boxOf(data.places);
            idOf = idsOf(data);
            break;
          }
        } catch (error) {
          note.textContent = `No map: ${error.message}`;
          plot.hidden = !data;
          return;
        }
        if (mine !== asking) return;
        if (wait > 3) note.textContent = "Computing the map … this happens once and takes some seconds.";
        await new Promise((r) => setTimeout(r, wait < 4 ? 300 : 1500));
      }
      plot.hidden = false;
      describe();
      surround();
      draw();
    }
    /* Let the whole map be that of the tiles and the new images. */
    function surround() {
      frame.surround(boxOf([...tilesBox, ...stars().flatMap(({ x, y }) => onGrid(x, y))]));
    }

    function draw() {
      cancelAnimationFrame(drawing);
      drawing = requestAnimationFrame(() => { if (data) painter.paint(frame, data, hidden, stars()); });
    }
    /* The view has changed: draw, and of an atlas that is shown in part, fetch the tiles that are in view. */
    function changed() {
      polygon.setAttribute("points", "");
      draw();
      if (!data || (data.about.shown === data.about.total)) return;
      clearTimeout(fetching);
      fetching = setTimeout(() => load({ box: frame.box }), 350);
    }

    function describe() {
      const { about, codes } = data;
      const few = about.names.length <= LEGEND;
      const part = about.shown < about.inside
        ? `${number(about.shown)} of the ${number(about.inside)} tiles in view, chosen at random (${number(about.total)} in all)`
        : about.inside < about.total ? `All ${number(about.inside)} tiles in view (${number(about.total)} in all)`
          : `All ${number(about.total)} tiles`;
      note.textContent = `${part}. ${about.method} of ${number(about.landmarks)}; trustworthiness ` +
        `${about.trust.toFixed(3)} of 1: points that are close are similar; distances between groups mean little.` +
        (few ? "" : ` ${number(about.names.length)} values share seven colours, so a colour has several meanings.`);
      const counts = new Uint32Array(about.names.length + 1);
      for (let n = 0; n < codes.length; n++) counts[codes[n]]++;
      const entries = few ? [...counts.keys()].filter((code) => counts[code]).sort((a, b) => (a || 1e9) - (b || 1e9)) : [];
      legend.replaceChildren(...entries.map((code) => el("li", {}, el("button", {
        type: "button", "aria-pressed": String(!hidden.has(code)), onclick: (e) => {
          if (hidden.has(code)) hidden.delete(code); else hidden.set(code, true);
          e.currentTarget.setAttribute("aria-pressed", String(!hidden.has(code)));
          draw();
        } },
      el("span", { style: `color:${colourOf(code)}`, "aria-hidden": "true" }, SIGNS[shapeOf(code)]),
      `${code ? about.names[code - 1] : "none"} (${number(counts[code])})`))));
      const extra = stars();
      if (extra.length) legend.append(el("li", {}, `★ new images (${extra.length})`));
    }

    /* Show some of the tiles of a selection, given by their numbers in the data. */
    function show(found) {
      if (!gallery) return;
      const every = Math.max(1, Math.ceil(found.length / SHOWN)), some = [];
      for (let n = 0; n < found.length; n += every) some.push(idOf(found[n]));
      const head = found.length
        ? `${number(found.length)} tiles selected` + (some.length < found.length ? `, ${some.length} of them shown` : "")
        : "Draw around points to see their tiles; click a point or a tile to open it.";
      gallery.replaceChildren(el("p", { role: "status" }, head), el("ul", { class: "hs-strip" }, ...some.map((tile) =>
        el("li", {}, el("button", { class: "hs-open", "data-open": tile, "aria-label": `Open tile ${tile}` },
          el("img", { src: hs.tileUrl(tile), alt: `tile ${tile}`, width: 96, height: 96, loading: "lazy" }))))));
    }

    function inside(drawn) {
      const ring = drawn.map(([x, y]) => frame.toMap(x, y)), { places, codes } = data;
      const xs = ring.map((p) => p[0]), ys = ring.map((p) => p[1]);
      const [left, right, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
      const found = [];
      for (let n = 0; n < codes.length; n++) {
        const x = places[2 * n], y = places[2 * n + 1];
        if (x < left || x > right || y < low || y > high || hidden.has(codes[n])) continue;
        let odd = false;
        for (let a = 0, b = ring.length - 1; a < ring.length; b = a++) {
          const [ax, ay] = ring[a], [bx, by] = ring[b];
          if (ay > y !== by > y && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) odd = !odd;
        }
        if (odd) found.push(n);
      }
      return found;
    }
    function nearest([px, py]) {
      if (!data) return null;
      const { places, codes } = data, [x, y] = frame.toMap(px, py);
      let best = null, least = (REACH / frame.scale) ** 2;
      for (let n = 0; n < codes.length; n++) {
        const apart = (places[2 * n] - x) ** 2 + (places[2 * n + 1] - y) ** 2;
        if (apart < least && !hidden.has(codes[n])) { least = apart; best = n; }
      }
      return best === null ? null : idOf(best);
    }

    let peeking = 0;
    function peekAt(e) {
      cancelAnimationFrame(peeking);
      peeking = requestAnimationFrame(() => {
        const tile = nearest(at(e)), whole = element.getBoundingClientRect();
        peek.hidden = tile === null;
        if (tile === null) return;
        if (peek.dataset.tile !== String(tile))
          peek.replaceChildren(el("img", { src: hs.tileUrl(tile), alt: "", width: 112, height: 112 }));
        peek.dataset.tile = tile;
        peek.style.left = `${Math.min(e.clientX - whole.left + 14, whole.width - 120)}px`;
        peek.style.top = `${e.clientY - whole.top + 14}px`;
      });
    }

    /* ---- pointer, wheel and keys --------------------------------------------------------------- */
    const at = (e) => { const box = canvas.getBoundingClientRect(); return [e.clientX - box.left, e.clientY - box.top]; };
    const tools = [...element.querySelectorAll(".hs-tool")];
    let tool = "move", path = null, pinch = null;
    const down = new Map();  // pointers on the canvas, by id
    const use = (chosen) => {
      tool = chosen;
      for (const button of tools) button.setAttribute("aria-pressed", String(button.dataset.tool === tool));
      plot.dataset.tool = tool;
    };
    const outline = () => polygon.setAttribute("points", (path ?? []).map((p) => p.join(",")).join(" "));
    for (const button of tools) button.addEventListener("click", () => use(button.dataset.tool));
    canvas.addEventListener("pointerdown", (e) => {
      if (e.button) return;
      canvas.setPointerCapture(e.pointerId);
      down.set(e.pointerId, { at: at(e), first: at(e) });
      peek.hidden = true;
      path = tool === "lasso" && down.size === 1 ? [at(e)] : null;
      pinch = null;
    });
    canvas.addEventListener("pointermove", (e) => {
      const pointer = down.get(e.pointerId);
      if (!pointer) { if (!down.size && e.pointerType === "mouse") peekAt(e); return; }
      const before = pointer.at;
      pointer.at = at(e);
      if (down.size === 2) {
        const [a, b] = [...down.values()].map((each) => each.at);
        const now = { apart: Math.hypot(a[0] - b[0], a[1] - b[1]), x: (a[0] + b[0]) / 2, y: (a[1] + b[1]) / 2 };
        if (pinch) {
          frame.move(now.x - pinch.x, now.y - pinch.y);
          frame.zoom(now.apart / Math.max(1, pinch.apart), now.x, now.y);
          changed();
        }
        pinch = now;
      } else if (path) { path.push(pointer.at); outline(); }
      else if (tool === "move") { frame.move(pointer.at[0] - before[0], pointer.at[1] - before[1]); changed(); }
    });
    canvas.addEventListener("pointerup", (e) => {
      const pointer = down.get(e.pointerId), drawn = path;
      down.delete(e.pointerId);
      path = null;
      if (!pointer || pinch || !data) return;
      const still = [...(drawn ?? []), at(e)].every(([x, y]) => Math.hypot(x - pointer.first[0], y - pointer.first[1]) < 6);
      if (!still) { if (drawn) show(inside(drawn)); return; }
      const tile = nearest(at(e));
      if (tile !== null) hs.open(tile, canvas);
    });
    canvas.addEventListener("pointercancel", (e) => { down.delete(e.pointerId); path = null; outline(); });
    canvas.addEventListener("pointerleave", () => { peek.hidden = true; });
    canvas.addEventListener("wheel", (e) => {
      e.preventDefault();
      frame.zoom(1.0018 ** -e.deltaY, ...at(e));
      changed();
    }, { passive: false });
    const acts = { in: () => frame.zoom(1.5), out: () => frame.zoom(1 / 1.5), whole: () => frame.whole() };
    for (const button of plot.querySelectorAll("[data-map]"))
      button.addEventListener("click", () => { acts[button.dataset.map](); changed(); });
    canvas.addEventListener("keydown", (e) => {
      const step = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] }[e.key];
      const act = { "+": acts.in, "=": acts.in, "-": acts.out, 0: acts.whole }[e.key];
      if (e.ctrlKey || e.metaKey || (!step && !act && e.key !== "Enter")) return;
      e.preventDefault();
      if (e.key === "Enter") {
        const tile = nearest([frame.width / 2, frame.height / 2]);
        if (tile !== null) hs.open(tile, canvas);
        return;
      }
      if (step) frame.move(...step); else act();
      changed();
    });

    if (select) {
      (fields ?? []).forEach(([value, text]) => select.append(el("option", { value }, text)));
      select.value = wanted;
      select.addEventListener("change", () => set(select.value));
    }
    function set(value) {
      if (value === wanted && data) { describe(); return draw(); }
      wanted = value;
      return load(data ? { box: boxed, places: false } : {});
    }
    use(gallery && window.innerWidth >= 700 ? "lasso" : "move");
    show([]);
    new ResizeObserver(draw).observe(plot);
    /* Load when the map first becomes visible, and again after the atlas has changed. */
    new IntersectionObserver((seen) => {
      if (seen.some((s) => s.isIntersecting) && loaded !== revision())
        load().catch((e) => { loaded = null; note.textContent = `No map: ${e.message}`; });
    }).observe(element);
    new MutationObserver(draw).observe(document.body, { attributeFilter: ["class"] });
    return { draw: () => { if (data) { describe(); surround(); draw(); } }, load, set };
  };
})();
