// Builds one player in `host`, from the films that film.py packs. No library, no network.

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

const ICONS = {
  first: "M1,1h2v12h-2z M13,1v12l-9,-6z", back: "M11,1v12l-9,-6z", play: "M2,1v12l10,-6z",
  pause: "M2,1h3.5v12h-3.5z M8.5,1h3.5v12h-3.5z", forward: "M3,1v12l9,-6z",
  last: "M11,1h2v12h-2z M1,1v12l9,-6z",
};

function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 14 14");
  svg.setAttribute("aria-hidden", "true");
  draw(svg, "path", { d: ICONS[name] });
  return svg;
}

function mount(host, films, css) {
  const root = host.attachShadow({ mode: "open" });
  const total = (film) => film.events.reduce((sum, n) => sum + film.moves[n][4], 0);
  const scale = Math.max(...films.map(total), 1);
  const mostTiles = Math.max(...films.flatMap((film) => film.lives.map((live) => live.length)), 1);
  const stages = films.map((film) => stagePanel(film, scale, mostTiles));
  const steps = Math.max(...stages.map((stage) => stage.steps));
  const label = `Tile player: ${films.map((film) => film.stage).join(" beside ")}`;
  const player = element("div", { class: "player", role: "group", "aria-label": label,
    tabindex: "-1" });

  let step = 0, timer = null;
  const button = (name, text, action) => {
    const b = element("button", { type: "button", "aria-label": text, title: text, class: name },
      icon(name));
    b.addEventListener("click", action);
    return b;
  };
  const buttons = {
    first: button("first", "First step", () => go(0)),
    back: button("back", "One step back", () => go(step - 1)),
    play: button("play", "Play", () => (timer === null ? play() : pause())),
    forward: button("forward", "One step forward", () => go(step + 1)),
    last: button("last", "Last step", () => go(steps)),
  };
  const slider = element("input", { type: "range", min: 0, max: steps, step: 1, value: 0,
    "aria-label": "Step" });
  slider.addEventListener("input", () => go(Number(slider.value)));
  const at = element("span", { class: "at", "aria-hidden": "true" });
  const speed = element("select", { "aria-label": "Speed" });
  for (const n of [1, 4, 16, 64]) {
    speed.append(element("option", { value: n }, `${n} step${n > 1 ? "s" : ""} a second`));
  }
  speed.value = window.matchMedia("(prefers-reduced-motion: reduce)").matches ? "1" : "4";
  speed.addEventListener("change", () => { if (timer !== null) { clearInterval(timer); run(); } });
  const status = element("div", { class: "hidden", role: "status", "aria-live": "polite" });
  player.append(
    element("div", { class: "controls" }, ...Object.values(buttons), slider, at, speed),
    element("div", { class: stages.length > 1 ? "stages" : "stages one" },
      ...stages.map((stage) => stage.panel)), status);

  const whole = () => {
    const each = stages.map((stage, i) =>
      (stages.length > 1 ? `${films[i].stage}: ` : "") + stage.spoken(step));
    return `Step ${grouped(step)} of ${grouped(steps)}: ${each.join(". ")}`;
  };
  let saying = null;
  function say() { // once it rests, so that a drag or a run of keys is one sentence
    clearTimeout(saying);
    saying = setTimeout(() => { if (timer === null) status.textContent = whole(); }, 300);
  }
  function show() {
    stages.forEach((stage) => stage.show(step));
    slider.value = String(step);
    slider.setAttribute("aria-valuetext", timer === null ? whole() : "playing");
    at.textContent = `Step ${grouped(step)} of ${grouped(steps)}`;
  }
  function go(to, playing) {
    if (!playing) pause();
    step = Math.min(Math.max(to, 0), steps);
    show();
    if (!playing) say();
  }
  function run() {
    timer = setInterval(() => {
      if (!host.isConnected || step >= steps) pause();
      else go(step + 1, true);
    }, 1000 / Number(speed.value));
  }
  function play() {
    if (step >= steps) go(0, true);
    run();
    dress("pause", "Pause");
  }
  function pause() {
    if (timer === null) return;
    clearInterval(timer);
    timer = null;
    dress("play", "Play");
    slider.setAttribute("aria-valuetext", whole());
    say();
  }
  function dress(name, text) {
    buttons.play.replaceChildren(icon(name), ` ${text}`);
    buttons.play.setAttribute("aria-label", text);
    buttons.play.title = `${text} (Space)`;
  }

  // JupyterLab listens at the document, before the target: so the window listens while the focus
  // is here. It keeps from others what the player takes, and what a control does with a key.
  const keys = {
    " ": () => buttons.play.click(), ArrowLeft: () => go(step - 1), ArrowRight: () => go(step + 1),
    Home: () => go(0), End: () => go(steps),
  };
  const ofControls = ["Enter", "ArrowUp", "ArrowDown", "PageUp", "PageDown"];
  const listen = () => window.addEventListener("keydown", onKey, true);
  const listenNoMore = () => window.removeEventListener("keydown", onKey, true);
  function onKey(event) {
    const focus = root.activeElement, action = keys[event.key];
    if (!focus) { // taken away with the focus in it, of which not all browsers tell
      listenNoMore();
      return;
    }
    const control = focus.matches("button, select, input, pre");
    const typed = focus === speed && event.key.length === 1; // finds an entry of the list
    if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
    if (!action && !typed && !(control && ofControls.includes(event.key))) return;
    event.stopPropagation();
    if (!action || focus === speed || (event.key === " " && focus.matches("button"))) return;
    event.preventDefault();
    action();
  }
  player.addEventListener("focusin", listen);
  player.addEventListener("focusout", listenNoMore);

  followTheme(player);
  root.append(element("style", {}, css), player);
  dress("play", "Play");
  show();
}

// JupyterLab, its exported pages and VS Code say what they are; elsewhere the reader's system does. A
// player that is gone, as its cell ran again, is held by none of this.
function followTheme(player) {
  const held = new WeakRef(player), prefers = window.matchMedia("(prefers-color-scheme: dark)");
  const lab = "data-jp-theme-light", code = "data-vscode-theme-kind"; // VS Code says "vscode-dark"
  const observer = new MutationObserver(show);
  function show() {
    const light = document.body.getAttribute(lab), kind = document.body.getAttribute(code);
    const alive = held.deref();
    if (alive) {
      const dark = light !== null ? light === "false" : kind ? /dark|high-contrast$/.test(kind) : null;
      alive.classList.toggle("dark", dark ?? prefers.matches);
    } else {
      observer.disconnect();
      prefers.removeEventListener("change", show);
    }
  }
  prefers.addEventListener("change", show);
  observer.observe(document.body, { attributes: true, attributeFilter: [lab, code] });
  show();
}

// The still picture is the output before this one; it may be in place a moment later.
function hideStill(host, tries) {
  const still = host.closest(".jp-OutputArea-child, .output_area")?.previousElementSibling;
  if (still?.querySelector("img")) still.style.display = "none";
  else if (tries > 0) setTimeout(() => hideStill(host, tries - 1), 100);
}
