// The drawings of one stage: each function builds one and returns what shows a frame in it.

const rows = (start, stop) =>
  stop - start === 1 ? `row ${start}` : `rows ${start} to ${stop - 1}`;

// HBM above, SRAM below, and between them the tile that moves.
function drawMemories(parent, film, frames, stored, most) {
  const SIDE = 10, TOP = 44, LANE = 50, MAX = 112;
  const tensors = film.tensors;
  const room = WIDTH - 2 * SIDE, last = frames[frames.length - 1].moved;
  const tall = Math.max(...tensors.map((t) => t.rows));
  const text = (t) => 14 + 6 * Math.max(...last[t.name].map((n) => grouped(n).length));
  let unit = Math.min(MAX / tall, 6), widths, slots, slack; // unit: of a value, in both directions
  do {
    widths = tensors.map((t) => Math.max(t.cols * unit, 7));
    slots = widths.map((width, i) => Math.max(width + 6, text(tensors[i])));
    slack = (room - slots.reduce((a, b) => a + b, 0)) / tensors.length;
    unit *= slack < 0 ? 0.9 : 1;
  } while (slack < 0 && unit > 0.05);
  const hbm = TOP + MAX + 50, chip = hbm + LANE;
  const bar = chip + 40, list = film.triton ? chip + 52 : bar + 40;
  const height = list + 16 * Math.ceil(most / 2) - 6;
  const svg = draw(parent, "svg", { class: "wide",
    viewBox: `0 0 ${WIDTH} ${height + 1}`, role: "img",
    "aria-label": "HBM above, SRAM of one program below, and the tile that moves between them" });
  hatch(svg, "hatch");
  draw(svg, "rect", { class: "box", x: 0.5, y: 0.5, width: WIDTH - 1, height: hbm, rx: 5 });
  draw(svg, "text", { class: "bold", x: SIDE, y: 18, "font-size": 13 }, "HBM (large, slow)");
  draw(svg, "text", { class: "soft", x: WIDTH - SIDE, y: 18, "font-size": 10.5,
    "text-anchor": "end" }, "bytes so far: ↓ read, ↑ written");
  draw(svg, "text", { class: "soft", x: SIDE, y: hbm - 6, "font-size": 10.5 },
    `bright: ${film.triton ? "loaded last" : "a copy is on chip"}; hatched: written; ` +
    "dashed: not yet written");

  let x = SIDE;
  const strips = tensors.map((tensor, i) => {
    const width = widths[i], centre = x + (slots[i] + slack) / 2, left = centre - width / 2;
    x += slots[i] + slack;
    draw(svg, "text", { class: "bold", x: centre, y: TOP - 6, "font-size": 12.5,
      "text-anchor": "middle" }, tensor.name);
    const tiles = [];
    for (let start = 0; start < tensor.rows; start += tensor.block) {
      const stop = Math.min(start + tensor.block, tensor.rows);
      const place = { x: left, y: TOP + start * unit, width, height: (stop - start) * unit };
      const tile = draw(svg, "rect", { ...place, class: "tile" });
      const over = tensor.input ? null : draw(svg, "rect", { ...place, fill: "url(#hatch)" });
      tiles.push({ start, stop, tile, over });
    }
    const below = [15, 28].map((dy) => draw(svg, "text", { x: centre, "font-size": 10.5,
      y: TOP + Math.max(tensor.rows * unit, 0) + dy, "text-anchor": "middle" }, ""));
    return { tensor, centre, tiles, below };
  });
  const outlines = draw(svg, "g", {});

  draw(svg, "rect", { class: "chip", x: 0.7, y: chip, width: WIDTH - 1.4, height: height - chip,
    rx: 5 });
  draw(svg, "text", { class: "bold", x: SIDE, y: chip + 18, "font-size": 13 },
    "SRAM of one program (small, fast)");
  const used = draw(svg, "text", { class: "soft", x: SIDE, y: chip + 33, "font-size": 11 },
    "what it has loaded; the bytes on chip are the compiler's choice");
  const peak = Math.max(...frames.map((f) => f.live.reduce((sum, t) => sum + (t[3] || 0), 0)), 1);
  if (!film.triton) {
    draw(svg, "rect", { x: SIDE, y: bar, width: room, height: 26, class: "tile empty" });
  }
  const blocks = draw(svg, "g", {}), arrow = draw(svg, "g", { });

  return (frame, done) => {
    for (const { tensor, tiles, below } of strips) {
      const onChip = frame.live.some(([name]) => name === tensor.name) && frame.at[tensor.name];
      const number = tensors.indexOf(tensor);
      tiles.forEach(({ start, stop, tile, over }, i) => {
        const first = stored[number].get(`${frame.head} ${i}`);
        const full = tensor.input || (first !== undefined && first <= frame.index);
        const held = onChip && onChip[0] < stop && onChip[1] > start;
        const { move } = frame;
        const moves = !done && move && move.name === tensor.name && move.op !== "hold" &&
          move.start < stop && move.stop > start;
        tile.setAttribute("class", full ? `tile ${held || moves ? "" : "rest"}` : "tile empty");
        tile.setAttribute("fill", full ? tensor.colour : "none");
        if (over) over.setAttribute("visibility", full ? "visible" : "hidden");
        tile.dataset.moves = moves ? "yes" : "";
      });
      const [read, written] = frame.moved[tensor.name] || [0, 0];
      const parts = [read ? `↓ ${grouped(read)}` : "", written ? `↑ ${grouped(written)}` : ""];
      parts.filter(Boolean).concat(["", ""]).slice(0, 2)
        .forEach((text, i) => { below[i].textContent = text; });
    }
    outlines.replaceChildren(...strips.flatMap(({ tiles }) => tiles)
      .filter(({ tile }) => tile.dataset.moves)
      .map(({ tile }) => {
        const copy = tile.cloneNode();
        copy.setAttribute("class", "tile moves");
        copy.setAttribute("fill", "none");
        return copy;
      }));
    drawArrow(frame, done);
    drawLive(frame.live);
  };

  function drawArrow(frame, done) {
    arrow.replaceChildren();
    const { move } = frame, middle = (hbm + chip) / 2 + 1;
    if (!move || done) return;
    if (move.op === "hold") {
      const how = frame.renewed ? "updated" : "made";
      draw(arrow, "text", { class: "soft", x: WIDTH / 2, y: middle + 4, "font-size": 12.5,
        "text-anchor": "middle" }, `${move.name} is ${how} on chip: nothing moves`);
      return;
    }
    const { tensor, centre } = strips.find((strip) => strip.tensor.name === move.name);
    const [a, b] = move.op === "load" ? [hbm + 3, chip - 2] : [chip - 3, hbm + 2];
    const sign = Math.sign(b - a), neck = b - 14 * sign;
    const shape = `M${centre - 6},${a} H${centre + 6} V${neck} H${centre + 13} L${centre},${b} ` +
      `L${centre - 13},${neck} H${centre - 6} Z`;
    draw(arrow, "path", { d: shape, fill: tensor.colour, class: "tile" });
    if (move.op === "store") draw(arrow, "path", { d: shape, fill: "url(#hatch)" });
    const right = centre < WIDTH / 2;
    draw(arrow, "text", { class: "bold", x: centre + (right ? 20 : -20), y: middle - 2,
      "font-size": 12.5, "text-anchor": right ? "start" : "end" },
    `${move.name}, ${rows(move.start, move.stop)}`);
    draw(arrow, "text", { x: centre + (right ? 20 : -20), y: middle + 14, "font-size": 12.5,
      "text-anchor": right ? "start" : "end" },
    `${move.op === "load" ? "read" : "written"}: ${bytes(move.n)}`);
  }

  function drawLive(live) {
    blocks.replaceChildren();
    let from = SIDE, sum = 0;
    live.forEach(([name, n, cols, size], i) => {
      const colour = film.tile_colours[name];
      if (!film.triton) {
        const width = (room * size) / peak;
        draw(blocks, "rect", { class: "tile", x: from, y: bar, width, height: 26,
          fill: colour });
        if (width > 9 + 6.2 * name.length) {
          draw(blocks, "text", { class: "bold", x: from + width / 2, y: bar + 17,
            "font-size": 11.5, "text-anchor": "middle", style: `fill:${inkOn(colour)}` }, name);
        }
        from += width;
        sum += size;
      }
      const x0 = SIDE + (i % 2) * (room / 2), y0 = list + Math.floor(i / 2) * 16;
      draw(blocks, "rect", { class: "tile", x: x0, y: y0 - 9, width: 10, height: 10,
        fill: colour });
      draw(blocks, "text", { class: "bold", x: x0 + 16, y: y0, "font-size": 11.5 }, name);
      draw(blocks, "text", { x: x0 + 54, y: y0, "font-size": 11.5 },
        film.triton ? `${n} row${n === 1 ? "" : "s"}` : `${n} × ${cols}`);
      if (!film.triton) {
        draw(blocks, "text", { x: x0 + room / 2 - 12, y: y0, "font-size": 11.5,
          "text-anchor": "end" }, bytes(size));
      }
    });
    if (!film.triton) {
      used.textContent = `holds ${bytes(sum)}; dashed: the most in this run, ${bytes(peak)}`;
    }
  }
}

// What has crossed between the memories, to the scale of the stage that moves most.
function drawBytes(parent, film, scale) {
  const line = element("p", { class: "bytes" });
  parent.append(line);
  const svg = draw(parent, "svg", { class: "wide", viewBox: `0 0 ${WIDTH} 24`, role: "img",
    "aria-label": "bytes so far, by tensor; what is written is hatched" });
  hatch(svg, "hatch-bytes");
  draw(svg, "rect", { class: "tile empty", x: 1, y: 1, width: WIDTH - 2, height: 21 });
  const bars = draw(svg, "g", {});
  return (frame) => {
    line.replaceChildren(`read ${grouped(frame.read)}, written ${grouped(frame.written)}, total `,
      element("b", { class: "total" }, bytes(frame.read + frame.written)));
    bars.replaceChildren();
    let x = 1;
    for (const column of [0, 1]) {
      for (const { name, colour } of film.tensors) {
        const width = ((WIDTH - 2) * ((frame.moved[name] || [0, 0])[column])) / scale;
        if (!width) continue;
        const place = { x, y: 1, width, height: 21 };
        draw(bars, "rect", { ...place, fill: colour, class: "tile" });
        if (column) draw(bars, "rect", { ...place, fill: "url(#hatch-bytes)" });
        if (width > 10 + 6.5 * name.length) {
          draw(bars, "text", { x: x + width / 2, y: 16, "font-size": 12, "text-anchor": "middle",
            class: "bold", style: column ? "paint-order:stroke;stroke:var(--bg);stroke-width:3px"
            : `fill:${inkOn(colour)}` }, name);
        }
        x += width;
      }
    }
  };
}

// S in tiles: which are computed, which one now, which never.
function drawGrid(parent, film) {
  const { Nq, Nk, block_q: bq, block_k: bk, causal } = film.sizes;
  const colour = film.s_colour;
  const inHbm = film.tensors.some((tensor) => tensor.name === "s");
  const box = element("div", { class: "grid" });
  box.append(element("h4", {}, `S, ${Nq} × ${Nk}: ${inHbm ? "in HBM, as is P" : "never in HBM"}`));
  const LEFT = 18, TOP = 15, MAX = 168, unit = MAX / Math.max(Nq, Nk);
  // no tile is a mere line
  const down = Math.min(Math.max(unit, 9 / Math.min(bq, Nq)), MAX / Nq);
  const across = Math.min(Math.max(unit, 9 / Math.min(bk, Nk)), MAX / Nk);
  const svg = draw(box, "svg", { viewBox: `0 0 188 ${TOP + Math.max(Nq * down, 46) + 3}`,
    role: "img",
    "aria-label": "the scores in tiles: not yet computed, being computed, computed or skipped" });
  hatch(svg, "hatch-grid");
  draw(svg, "text", { x: LEFT, y: 10, "font-size": 11, class: "soft" }, "key →");
  draw(svg, "text", { x: 0, y: 0, "font-size": 11, class: "soft", "text-anchor": "end",
    transform: `translate(11 ${TOP}) rotate(-90)` }, "← query");
  const everVisited = new Set(film.visits.map(([i, j]) => `${i} ${j}`));
  const heads = film.triton ? film.sizes.B * film.sizes.H : 1;
  const most = film.visits.length / heads;
  const each = Math.round(most / everVisited.size) || 1;
  const cells = new Map();
  for (let i = 0; i < Nq; i += bq) {
    for (let j = 0; j < Nk; j += bk) {
      const width = Math.min(bk, Nk - j) * across, height = Math.min(bq, Nq - i) * down;
      const place = { x: LEFT + j * across, y: TOP + i * down, width, height };
      const cell = draw(svg, "rect", { ...place, class: "cell" });
      const masked = causal && j + Math.min(bk, Nk - j) - 1 > i + Nk - Nq;
      const over = masked ? draw(svg, "rect", { ...place, fill: "url(#hatch-grid)" }) : null;
      if (!everVisited.has(`${i} ${j}`)) {
        cell.setAttribute("class", "cell skipped");
        const { x, y } = place;
        const [w, h] = [width - 4, height - 4];
        draw(svg, "path", { class: "cross",
          d: `M${x + 2},${y + 2} l${w},${h} m0,${-h} l${-w},${h}` });
        if (over) over.remove();
        continue;
      }
      const times = each > 1 && Math.min(width, height) > 13
        ? draw(svg, "text", { x: place.x + width / 2, y: place.y + height / 2 + 3.8,
          "font-size": 10.5, "text-anchor": "middle", class: "bold" }, "") : null;
      cells.set(`${i} ${j}`, { cell, over, times, place });
    }
  }
  const outline = draw(svg, "rect", { class: "cell computing", style: "fill:none" });
  const count = element("p", { class: "note" });
  const swatch = (text, attributes, extra) => {
    const item = element("span", {});
    const small = draw(item, "svg", { viewBox: "0 0 13 13" });
    draw(small, "rect", { x: 1, y: 1, width: 11, height: 11, ...attributes });
    if (extra) draw(small, "path", extra);
    item.append(text);
    return item;
  };
  const legend = element("div", { class: "legend" },
    swatch("not yet", { class: "cell" }),
    swatch("now", { class: "cell computing", style: `fill:${colour}` }),
    swatch("computed", { fill: colour }));
  if ([...cells.values()].some(({ over }) => over)) {
    legend.append(swatch("partly masked", { fill: colour },
      { d: "M0,8 L8,0 M4,13 L13,4", class: "stripes" }));
  }
  if (svg.querySelector(".skipped")) {
    legend.append(swatch("skipped", { class: "cell skipped" },
      { d: "M2,2 L11,11 M11,2 L2,11", class: "cross" }));
  }
  box.append(element("div", { class: "beside" }, svg, element("div", {}, legend, count)));
  parent.append(box);

  return (frame, done) => {
    const times = new Map();
    for (let n = frame.firstVisit; n < frame.visit; n++) {
      const key = film.visits[n].join(" ");
      times.set(key, (times.get(key) || 0) + 1);
    }
    for (const [key, { cell, over, times: text }] of cells) {
      const n = times.get(key) || 0;
      cell.setAttribute("class", n ? "cell computed" : "cell");
      const full = 0.25 + (0.75 * n) / each;
      cell.setAttribute("style", n ? `fill:${colour};fill-opacity:${full}` : "");
      if (over) over.setAttribute("visibility", n ? "visible" : "hidden");
      if (text) {
        text.textContent = n ? String(n) : "";
        text.setAttribute("style", n === each ? `fill:${inkOn(colour)}` : "");
      }
    }
    const computing = frame.now && !done;
    outline.setAttribute("visibility", computing ? "visible" : "hidden");
    if (computing) {
      const { place } = cells.get(film.visits[frame.visit - 1].join(" "));
      for (const [name, value] of Object.entries(place)) outline.setAttribute(name, value);
    }
    const begun = frame.visit - frame.firstVisit;
    count.textContent = most === 1 ? "S is one piece"
      : `${begun} of ${most} tiles` + (each > 1 ? `: each ${each} times` : "") +
        (heads > 1 ? " of this head" : "");
  };
}

// The running numbers of the rows that the program works on.
function drawNumbers(parent, film) {
  const names = film.states.length
    ? [...new Set(film.states.flatMap((state) => Object.keys(state)))] : [];
  if (!names.length) return null;
  const { D, block_q: bq } = film.sizes;
  const parsed = film.numbers.map((text) => text.split("|").map((row) => row.split(" ")));
  const columns = Object.fromEntries(names.map((name) => [name,
    Math.max(...film.states.filter((s) => name in s).map((s) => parsed[s[name]][0].length))]));
  const box = element("div", { class: "numbers" });
  const table = element("table", {});
  const head = element("tr", {}, element("th", { scope: "col" }, "query"));
  for (const name of names) {
    head.append(element("th", { scope: "col", colspan: columns[name] }, name));
  }
  const body = element("tbody", {});
  table.append(element("thead", {}, head), body);
  const wide = names.find((name) => columns[name] > 1);
  const notes = ["numbers: the same run in float64", "marked: changed in this step"];
  if (wide && columns[wide] < D) notes.push(`${wide}: columns 0 to ${columns[wide] - 1} of ${D}`);
  if (film.numbers.some((text) => text.includes("lowest"))) notes.push("lowest: no key seen yet");
  box.append(element("h4", {}, "Running numbers of the query tile"), table,
    element("p", { class: "note" }, `${notes.join("; ")}.`));
  parent.append(box);

  return (frame, before) => {
    const state = frame.state || {};
    const start = (frame.at.q || [0, 0])[0], stop = (frame.at.q || [0, 0])[1];
    const shown = Math.min(8, bq, film.sizes.Nq);
    const old = (before && before.state) || {};
    body.replaceChildren(...Array.from({ length: shown }, (_, r) => {
      const row = element("tr", {},
        element("th", { scope: "row" }, start + r < stop ? String(start + r) : "·"));
      for (const name of names) {
        const values = name in state ? parsed[state[name]][r] : undefined;
        const past = name in old ? parsed[old[name]][r] : undefined;
        for (let c = 0; c < columns[name]; c++) {
          const text = values ? values[c] : "·";
          const cell = element("td", {}, text);
          if (values && past && past[c] !== text) cell.className = "changed";
          row.append(cell);
        }
      }
      return row;
    }));
    if (stop - start > shown) {
      body.append(element("tr", {}, element("th", { scope: "row" }, "…")));
    }
  };
}

function drawSource(parent, film) {
  const { file, function: name, first, lines } = film.source;
  const box = element("div", { class: "source" });
  const title = element("h4", {});
  const pre = element("pre", { tabindex: "0", role: "region", "aria-label": `source of ${name}` });
  const shown = lines.map((text, i) => {
    const indent = text.length - text.trimStart().length;
    const [, code, comment] = /^(.*?)(\s# .*)?$/.exec(text.trim()) || [null, text.trim(), ""];
    const body = element("span", { style: `padding-left:${indent + 2}ch` }, code);
    if (comment) body.append(element("span", { class: "comment" }, comment));
    const line = element("code", {}, element("i", {}, String(first + i)), body);
    pre.append(line);
    return line;
  });
  box.append(title, pre);
  parent.append(box);
  let current = null;
  return (frame) => {
    const line = frame.move ? shown[frame.move.line - first] : null;
    title.textContent = `${file}, ${name}${frame.move ? `: line ${frame.move.line}` : ""}`;
    if (line === current) return;
    if (current) current.className = "";
    current = line;
    if (!line) {
      pre.scrollTop = 0;
      return;
    }
    line.className = "on";
    pre.scrollTop = line.offsetTop - (pre.clientHeight - line.offsetHeight) / 2;
  };
}
