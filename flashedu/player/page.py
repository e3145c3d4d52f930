"""The player as HTML: one element and one script, which builds all else; no file beside it."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from pathlib import Path

from flashedu.player.film import Pack

FOLDER = Path(__file__).parent
SENTENCE = "Run this cell to step through it."

SCRIPT = """(() => {
"use strict";
%(js)s
const NAME = '[data-flashedu-player="%(name)s"]';
function start(tries) {
  // JupyterLab runs a copy of this script; a player may be on a page twice.
  const near = document.currentScript && document.currentScript.previousElementSibling;
  const host = [near, ...document.querySelectorAll(NAME)]
    .find((element) => element && element.matches(NAME) && !element.shadowRoot);
  if (host) {
    mount(host, %(films)s, %(css)s);
    hideStill(host, 50);
  } else if (tries > 0) setTimeout(() => start(tries - 1), 100);
}
start(50);
})();
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>%(title)s</title>
<style>
:root { color-scheme: light dark; }
body { max-width: 1400px; margin: 1em auto; padding: 0 1em; font-family: system-ui, sans-serif; }
img { max-width: 100%%; }
</style>
</head>
<body>
<noscript><img alt="%(title)s" src="data:image/png;base64,%(png)s"></noscript>
%(player)s
</body>
</html>
"""


def fragment(films: Sequence[Pack]) -> str:
    """What a notebook cell puts out: depends on the films alone, on any machine."""
    js = f"{_read('drawing.js')}\n\n{_read('player.js')}"
    css = _read("player.css")
    packed = _literal(films)
    name = hashlib.sha256((js + css + packed).encode()).hexdigest()[:12]
    script = SCRIPT % {"js": js, "css": _literal(css), "films": packed, "name": name}
    return (
        f'<div data-flashedu-player="{name}"><p>{SENTENCE}</p></div>\n<script>\n{script}</script>'
    )


def page(films: Sequence[Pack], png: bytes, title: str) -> str:
    """A whole page, for a file; with scripts off it shows the still picture."""
    return PAGE % {
        "title": html.escape(title),
        "png": base64.b64encode(png).decode(),
        "player": fragment(films),
    }


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8").rstrip("\n")


def _literal(value: object) -> str:
    """JSON that may stand in a script: no tag can end it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
