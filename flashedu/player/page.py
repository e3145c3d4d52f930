"""The player as HTML: one element and one script, which builds all else; no file beside it."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pack = dict[str, Any]

FOLDER = Path(__file__).parent
SENTENCE = "Run this cell to step through it."
MAX_BYTES = 150_000  # of HTML: a notebook holds several players
SCRIPTS = {  # what is played → what draws it; `panels` of the last but one gets the packs
    "tiles": ("dom.js", "drawing.js", "tiles.js", "player.js"),
    "pages": ("dom.js", "pages.js", "player.js"),
}
STYLES = {"tiles": ("player.css",), "pages": ("player.css", "pages.css")}

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
    mount(host, panels(%(packs)s), %(css)s);
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


class Player:
    """Something recorded. The last line of a cell shows it; `save` makes a page of it."""

    kind: str  # one of SCRIPTS

    @property
    def packs(self) -> list[Pack]:
        """What the page gets, a panel each."""
        raise NotImplementedError

    def storyboard(self) -> Figure:
        """Its moments in one picture."""
        raise NotImplementedError

    @cached_property
    def html(self) -> str:
        """An element and the script that builds the player in it."""
        return fragment(self.packs, self.kind)

    @cached_property
    def still(self) -> bytes:
        """The storyboard as PNG: what is seen where scripts are off."""
        from flashedu.player.still import png

        return png(self.storyboard())

    def save(self, path: str | Path) -> None:
        """Write the player as a page that needs no network and no other file."""
        title = html.escape(repr(self))
        text = PAGE % {
            "title": title,
            "png": base64.b64encode(self.still).decode(),
            "player": self.html,
        }
        Path(path).write_text(text, encoding="utf-8")

    def _ipython_display_(self) -> None:
        """First the still, then the player, which hides it when its script runs."""
        from IPython.display import display

        for kind, data in (("image/png", self.still), ("text/html", self.html)):
            display({kind: data, "text/plain": repr(self)}, raw=True)


def fragment(packs: Sequence[Pack], kind: str = "tiles") -> str:
    """What a notebook cell puts out: depends on the packs alone, on any machine."""
    js = "\n\n".join(_read(name) for name in SCRIPTS[kind])
    css = "\n".join(_read(name) for name in STYLES[kind])
    packed = _literal(packs)
    name = hashlib.sha256((js + css + packed).encode()).hexdigest()[:12]
    script = SCRIPT % {"js": js, "css": _literal(css), "packs": packed, "name": name}
    return (
        f'<div data-flashedu-player="{name}"><p>{SENTENCE}</p></div>\n<script>\n{script}</script>'
    )


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8").rstrip("\n")


def _literal(value: object) -> str:
    """JSON that may stand in a script: no tag can end it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
