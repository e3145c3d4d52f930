// The tile player: a panel for each stage, from the films that film.py packs.

// What the film says by tables and differences, event by event; index 0 is before the first.
function unpack(film) {
  const moves = film.events.map((number) => film.moves[number]);
  const tilesOfHead = film.triton ? film.n_programs / (film.sizes.B * film.sizes.H) : 0;
  const frames = [{ move: null, live: [], index: 0, read: 0, written: 0, moved: {}, at: {},
    visit: 0, head: 0, firstVisit: 0 }];
  const stored = film.tensors.map(() => new Map()); // head and tile → when it was first stored
  const numberOf = Object.fromEntries(film.tensors.map((tensor, i) => [tensor.name, i]));
  moves.forEach(([op, name, start, stop, n, line, kernel], i) => {
    const before = frames[i];
    const head = tilesOfHead ? Math.floor(film.program[i] / tilesOfHead) : 0;
    const moved = { ...before.moved }, at = { ...before.at };
    if (op !== "hold") {
      const [read, written] = moved[name] || [0, 0];
      moved[name] = op === "load" ? [read + n, written] : [read, written + n];
    }
    if (op === "load") at[name] = [start, stop];
    if (op === "store") {
      const { block } = film.tensors[numberOf[name]];
      for (let tile = Math.floor(start / block); tile * block < stop; tile++) {
        const key = `${head} ${tile}`, when = stored[numberOf[name]];
        if (!when.has(key)) when.set(key, i + 1);
      }
    }
    frames.push({
      index: i + 1, move: { op, name, start, stop, n, line, kernel }, moved, at,
      live: film.lives[film.live[i]], renewed: before.live.some(([held]) => held === name),
      read: before.read + (op === "load" ? n : 0),
      written: before.written + (op === "store" ? n : 0),
      visit: film.visit[i], now: film.now[i], head, program: film.program[i],
      firstVisit: head === before.head ? before.firstVisit : before.visit,
      state: film.state.length ? film.states[film.state[i]] : null,
    });
  });
  return { frames, stored };
}

function sentence(film, frame, verbose) {
  if (!frame.move) return "start: q, k and v are in HBM, and nothing is on chip";
  const { op, name, start, stop, n } = frame.move;
  if (op === "hold") return `${frame.renewed ? "update" : "make"} ${name} on chip; nothing moves`;
  const text = `${op} ${name}, ${rows(start, stop)}, ${bytes(n)}`;
  return verbose ? `${text}; ${bytes(frame.read + frame.written)} so far` : text;
}

// One stage: its drawings, and a function that shows a frame.
function stagePanel(film, scale, mostTiles) {
  const { frames, stored } = unpack(film);
  const last = frames[frames.length - 1];
  const panel = element("section", { class: "stage", "aria-label": `stage ${film.stage}` });
  const now = element("p", { class: "now" });
  panel.append(element("div", { class: "says" },
    element("h3", {}, film.stage, element("span", { class: "idea" }, `: ${film.idea}`)), now));
  const left = element("div", { class: "column" }), right = element("div", { class: "column" });
  panel.append(left, right);

  const memories = drawMemories(left, film, frames, stored, mostTiles);
  const moved = drawBytes(left, film, scale);
  const numbers = drawNumbers(left, film);
  if (!numbers) panel.classList.add("brief");
  const grid = drawGrid(right, film);
  const source = drawSource(right, film);

  function show(step) {
    const done = step > frames.length - 1;
    const frame = done ? last : frames[step];
    const text = sentence(film, frame, false);
    now.replaceChildren(done
      ? `Done after ${grouped(frames.length - 1)} steps: it waits, and its total stands.`
      : `${text[0].toUpperCase()}${text.slice(1)}.${where(film, frame)}`);
    memories(frame, done);
    moved(frame);
    grid(frame, done);
    if (numbers) numbers(frame, step > 0 && !done ? frames[step - 1] : null);
    source(frame);
  }
  const spoken = (step) => (step < frames.length
    ? sentence(film, frames[step], true)
    : `done, ${bytes(last.read + last.written)}`);
  return { panel, show, spoken, steps: frames.length - 1 };
}

function where(film, frame) {
  const { B, H } = film.sizes, heads = B * H;
  if (film.triton && frame.move) {
    const head = heads > 1 ? `, head ${frame.head + 1} of ${heads}` : "";
    return ` Program ${frame.program + 1} of ${film.n_programs}${head}.`;
  }
  const kernel = film.kernels.length > 1 && frame.move
    ? ` Kernel ${frame.move.kernel + 1} of ${film.kernels.length}.` : "";
  return kernel + (heads > 1 && frame.move ? ` Bytes of all ${heads} heads, tiles of one.` : "");
}

function panels(films) {
  const total = (film) => film.events.reduce((sum, n) => sum + film.moves[n][4], 0);
  const scale = Math.max(...films.map(total), 1);
  const mostTiles = Math.max(...films.flatMap((film) => film.lives.map((live) => live.length)), 1);
  return {
    label: `Tile player: ${films.map((film) => film.stage).join(" beside ")}`,
    panels: films.map((film) => ({ name: film.stage, ...stagePanel(film, scale, mostTiles) })),
    speed: 4,
  };
}
