// One player in `host`: its controls, and panels that show a step. No library, no network.

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

function mount(host, { label, panels: stages, speed: usual }, css) {
  const root = host.attachShadow({ mode: "open" });
  const steps = Math.max(...stages.map((stage) => stage.steps));
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
  speed.value = window.matchMedia("(prefers-reduced-motion: reduce)").matches ? "1" : usual;
  speed.addEventListener("change", () => { if (timer !== null) { clearInterval(timer); run(); } });
  const status = element("div", { class: "hidden", role: "status", "aria-live": "polite" });
  player.append(
    element("div", { class: "controls" }, ...Object.values(buttons), slider, at, speed),
    element("div", { class: stages.length > 1 ? "stages" : "stages one" },
      ...stages.map((stage) => stage.panel)), status);

  const whole = () => {
    const each = stages.map((stage) =>
      (stages.length > 1 ? `${stage.name}: ` : "") + stage.spoken(step));
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
