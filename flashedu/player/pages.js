// The page player: pages of one memory, and beside them the same sequences without pages.

const of = (n, what) => `${grouped(n)} ${what}${n === 1 ? "" : "s"}`;

// What holds no key, in pages and without them.
function idle(parent, place, id) {
  draw(parent, "rect", { ...place, class: "idle" });
  draw(parent, "rect", { ...place, fill: `url(#${id})` });
}

function drawPages(parent, film) {
  const { n_pages: n, page_size: size, colours } = film;
  const columns = Math.max(4, Math.ceil(Math.sqrt(n))), GAP = 8, HEAD = 16, SLOT = 20;
  const width = (WIDTH - 2 - GAP * (columns - 1)) / columns, height = HEAD + SLOT + 3;
  const lines = Math.ceil(n / columns);
  parent.append(element("h4", {}, `In pages: ${of(n, "page")} of ${of(size, "key")}`));
  const svg = draw(parent, "svg", { class: "wide", role: "img",
    viewBox: `0 0 ${WIDTH} ${lines * (height + GAP)}`,
    "aria-label": "the pages of the memory: free, or with the keys of one or more sequences" });
  hatch(svg, "hatch-idle");
  const left = (page) => 1 + (page % columns) * (width + GAP);
  const top = (page) => 1 + Math.floor(page / columns) * (height + GAP);
  const layer = draw(svg, "g", {});

  return (moment) => {
    layer.replaceChildren();
    for (let page = 0; page < n; page++) {
      const x = left(page), y = top(page), group = draw(layer, "g", { "data-page": page });
      const users = moment.sequences.filter(([, , pages]) => pages.includes(page));
      const state = (users.length ? "" : " free") + (moment.touched.includes(page) ? " touched" : "");
      draw(group, "rect", { class: `page${state}`, x, y, width, height, rx: 3 });
      draw(group, "text", { class: "soft", x: x + 5, y: y + 12, "font-size": 10.5 }, page);
      draw(group, "text", { class: "bold users", x: x + width - 5, y: y + 12, "font-size": 11,
        "text-anchor": "end" }, users.map(([name]) => name).join(" "));
      const slot = (width - 6) / size;
      for (let i = 0; users.length && i < size; i++) {
        const place = { x: x + 3 + i * slot, y: y + HEAD, width: slot, height: SLOT };
        const here = users.filter(([, keys, pages]) => pages.indexOf(page) * size + i < keys);
        if (!here.length) idle(group, place, "hatch-idle");
        here.forEach(([name], band) => {
          const part = SLOT / here.length;
          draw(group, "rect", { class: "key", x: place.x, width: slot, y: place.y + band * part,
            height: part, fill: colours[name] });
        });
        draw(group, "rect", { class: "slot", ...place });
      }
    }
    if (moment.copied) drawCopy(moment.copied);
  };

  function drawCopy([from, to]) {
    const [x0, y0, x1, y1] = [left(from), top(from), left(to), top(to)];
    const [dx, dy] = [width / 2, height / 2];
    const length = Math.hypot(x1 - x0, y1 - y0), [ux, uy] = [(x1 - x0) / length, (y1 - y0) / length];
    const [tx, ty] = [x1 + dx - 8 * ux, y1 + dy - 8 * uy];
    draw(layer, "path", { class: "arrow", d: `M${x0 + dx},${y0 + dy} L${tx},${ty}` });
    draw(layer, "path", { class: "tile", style: "fill:var(--ink)",
      d: `M${tx - 5 * uy},${ty + 5 * ux} L${tx + 5 * uy},${ty - 5 * ux} ` +
        `L${x1 + dx},${y1 + dy} Z` });
  }
}

function drawContiguous(parent, film) {
  const { longest, places, colours, moments } = film, LEFT = 20, ROW = 18, GAP = 5;
  const used = moments.flatMap((moment) => moment.sequences.map(([, , , place]) => place + 1));
  const most = Math.max(places, ...used), beyond = most > places ? 18 : 0;
  const box = element("div", { class: "contiguous" });
  box.append(element("h4", {}, `Without pages: room for ${of(longest, "key")} each`));
  const svg = draw(box, "svg", { class: "wide", role: "img",
    viewBox: `0 0 ${WIDTH} ${most * (ROW + GAP) + beyond}`,
    "aria-label": "the same sequences, each with room for the longest" });
  hatch(svg, "hatch-room");
  if (beyond) {
    const y = places * (ROW + GAP) + 3;
    draw(svg, "line", { class: "limit", x1: 0, x2: WIDTH, y1: y, y2: y });
    draw(svg, "text", { class: "soft", x: WIDTH, y: y + 13, "font-size": 10.5,
      "text-anchor": "end" }, "the memory ends at this line");
  }
  const layer = draw(svg, "g", {});
  parent.append(box);
  return (moment) => {
    layer.replaceChildren();
    const at = Object.fromEntries(moment.sequences.map((one) => [one[3], one]));
    for (let place = 0; place < most; place++) {
      const y = 1 + place * (ROW + GAP) + (place < places ? 0 : beyond);
      const whole = { x: LEFT, y, width: WIDTH - LEFT - 1, height: ROW };
      if (!at[place]) {
        if (place < places) draw(layer, "rect", { ...whole, class: "page free" });
        continue;
      }
      const [name, keys] = at[place], filled = (whole.width * keys) / longest;
      const row = draw(layer, "g", { "data-place": place });
      draw(row, "text", { class: "bold", x: 4, y: y + 13, "font-size": 12 }, name);
      idle(row, { ...whole, x: LEFT + filled, width: whole.width - filled }, "hatch-room");
      draw(row, "rect", { ...whole, width: filled, class: "key", fill: colours[name] });
      draw(row, "rect", { ...whole, class: "slot" });
    }
  };
}

// The keys of the memory, both ways, to one scale.
function drawCounts(parent, film) {
  const total = film.n_pages * film.page_size, sum = (parts) => parts.reduce((a, b) => a + b);
  const scale = Math.max(...film.moments.map((moment) => sum(moment.contiguous)), total);
  const LEFT = 66, ROW = 22, unit = (WIDTH - LEFT - 2) / scale, end = LEFT + unit * total;
  const svg = draw(parent, "svg", { class: "wide", viewBox: `0 0 ${WIDTH} ${2 * ROW + 10}`,
    role: "img", "aria-label": "keys held, idle and free, in pages and without" });
  hatch(svg, "hatch-counts");
  const bars = draw(svg, "g", {});
  draw(svg, "line", { class: "limit", x1: end, x2: end, y1: 0, y2: 2 * ROW + 10 });
  const table = element("table", { class: "counts" }), body = element("tbody", {});
  const head = ["", "with a key", "idle", "free", "beyond"];
  table.append(element("thead", {}, element("tr", {},
    ...head.map((text) => element("th", { scope: "col" }, text)))), body);
  parent.append(element("div", { class: "numbers" }, table), element("p", { class: "note" },
    "In keys. Dashed line: the end of the memory. Idle: reserved, and without a key. A shared " +
    "key counts once in pages, and for each sequence without them."));
  return (moment) => {
    bars.replaceChildren();
    body.replaceChildren();
    [["pages", moment.in_pages], ["no pages", moment.contiguous]].forEach(([name, parts], line) => {
      let x = LEFT;
      const y = 2 + (ROW + 6) * line;
      draw(bars, "text", { x: LEFT - 6, y: y + 15, "font-size": 11.5, "text-anchor": "end" }, name);
      parts.forEach((keys, i) => {
        const place = { x, y, width: unit * keys, height: ROW };
        if (i === 0) draw(bars, "rect", { ...place, class: "held" });
        else if (i === 1) idle(bars, place, "hatch-counts");
        else draw(bars, "rect", { ...place, class: "page free" });
        x += place.width;
      });
      const cells = [...parts, Math.max(0, sum(parts) - total)];
      body.append(element("tr", {}, element("th", { scope: "row" }, name),
        ...cells.map((n) => element("td", {}, grouped(n)))));
    });
  };
}

function drawTable(parent) {
  const box = element("div", { class: "table numbers" }), body = element("tbody", {});
  box.append(element("h4", {}, "Block table: the page of keys 0, 1, … in order"),
    element("table", {}, body));
  parent.append(box);
  return (moment, before) => {
    const old = Object.fromEntries((before ? before.sequences : []).map((one) => [one[0], one]));
    body.replaceChildren(...moment.sequences.map(([name, keys, pages]) => {
      const row = element("tr", {}, element("th", { scope: "row" }, `${name}, ${of(keys, "key")}`));
      pages.forEach((page, i) => {
        const cell = element("td", {}, page);
        if (!old[name] || old[name][2][i] !== page) cell.className = "changed";
        row.append(cell);
      });
      return row;
    }));
  };
}

function legendOfPages(parent, film) {
  const legend = element("div", { class: "legend" });
  for (const [text, part] of [["one colour a sequence; a shared key has several", "key"],
    ["idle: reserved, no key", "idle"], ["free", "page free"]]) {
    const item = element("span", {}), svg = draw(item, "svg", { viewBox: "0 0 13 13" });
    const place = { x: 1, y: 1, width: 11, height: 11 };
    const [fill] = Object.values(film.colours);
    draw(svg, "rect", { ...place, class: part, ...(part === "key" ? { fill } : {}) });
    if (part === "idle") draw(svg, "path", { d: "M1,8 L8,1 M4,12 L12,4", class: "stripes" });
    item.append(text);
    legend.append(item);
  }
  parent.append(legend);
}

function panels([film]) {
  const { moments } = film;
  const panel = element("section", { class: "stage", "aria-label": "pages of a cache" });
  const now = element("p", { class: "now" });
  const left = element("div", { class: "column" }), right = element("div", { class: "column" });
  panel.append(element("div", { class: "says" }, now), left, right);
  const pages = drawPages(left, film);
  legendOfPages(left, film);
  const table = drawTable(left);
  const contiguous = drawContiguous(right, film), counts = drawCounts(right, film);
  function show(step) {
    const moment = moments[step], { text } = moment;
    now.textContent = `${text[0].toUpperCase()}${text.slice(1)}.`;
    pages(moment);
    contiguous(moment);
    counts(moment);
    table(moment, moments[step - 1]);
  }
  const spoken = (step) => moments[step].text;
  return { label: "Page player", speed: 1,
    panels: [{ name: "pages", panel, show, spoken, steps: moments.length - 1 }] };
}
