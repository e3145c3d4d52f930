// What every drawing needs.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 400; // of the drawings, in their own units

function element(tag, attributes, ...children) {
  const e = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) e.setAttribute(name, value);
  e.append(...children);
  return e;
}

function draw(parent, tag, attributes, text) {
  const e = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) e.setAttribute(name, value);
  if (text !== undefined) e.textContent = text;
  parent.append(e);
  return e;
}

const grouped = (n) => String(n).replace(/\B(?=(\d{3})+$)/g, ",");
const bytes = (n) => `${grouped(n)} byte${n === 1 ? "" : "s"}`;

function inkOn(colour) {
  const [r, g, b] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16) / 255);
  return 0.2126 * r ** 2.2 + 0.7152 * g ** 2.2 + 0.0722 * b ** 2.2 > 0.2 ? "#111111" : "#ffffff";
}

// What is written is hatched, as in the figures.
function hatch(svg, id) {
  const pattern = draw(draw(svg, "defs", {}), "pattern", {
    id, width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)",
  });
  draw(pattern, "line", { x1: 2, y1: 0, x2: 2, y2: 5, class: "stripes" });
}
