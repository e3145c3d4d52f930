"""Execute the chapters: notebooks/NN_name.py becomes notebooks/NN_name.ipynb.

The script is the source. The notebook is what readers open, so it is stored with its outputs,
in a form that depends on nothing but the script and the installed packages.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import re
import struct
import sys
import time
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import jupytext
import nbformat
import numpy as np
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from PIL import Image

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
MAX_BYTES = 1_000_000
CELL_TIMEOUT = 120
MAY_FAIL = "raises-exception"
VARIES = "nbval-ignore-output"

METADATA = {
    "jupytext": {"formats": "ipynb,py:percent"},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "pygments_lexer": "ipython3",
    },
}

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# matplotlib writes its own version into a text chunk.
PNG_VARIABLE_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"tIME")


def scripts(folder: Path = FOLDER) -> list[Path]:
    return sorted(folder.glob("[0-9][0-9]_*.py"))


def notebooks(folder: Path = FOLDER) -> list[Path]:
    return sorted(folder.glob("*.ipynb"))


def text(source: str | list[str]) -> str:
    return source if isinstance(source, str) else "".join(source)


def tags(cell: NotebookNode) -> list[str]:
    return list(cell.metadata.get("tags", []))


def cell_id(index: int, cell: NotebookNode) -> str:
    content = f"{cell.cell_type}\n{index}\n{text(cell.source)}"
    return hashlib.sha256(content.encode()).hexdigest()[:8]


def read_script(script: Path) -> NotebookNode:
    notebook = jupytext.read(script, fmt="py:percent")
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for index, cell in enumerate(notebook.cells):
        cell.id = cell_id(index, cell)
    return notebook


def execute(notebook: NotebookNode, folder: Path) -> None:
    # A backend that the caller has set might draw no figures.
    environment = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=CELL_TIMEOUT,
        record_timing=False,
        allow_errors=False,
        # Below an error, the kernel only warns that local connections are not encrypted.
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(folder)}},
    ).execute(env=environment)


def strip_png(data: bytes) -> bytes:
    """The same image without its text and time chunks."""
    kept, position = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while position < len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        end = position + length + 12
        if data[position + 4 : position + 8] not in PNG_VARIABLE_CHUNKS:
            kept.append(data[position:end])
        position = end
    return b"".join(kept)


def fewer_colours(data: bytes) -> bytes:
    """The same image in its 256 most frequent colours: of a figure, about a third of the bytes.

    A rarer one, at the edge of a letter or a line, becomes the one that is nearest.
    """
    with Image.open(BytesIO(data)) as image:
        if image.convert("RGBA").getextrema()[3] != (255, 255):
            return data
        pixels = np.asarray(image.convert("RGB"))
    flat = pixels.reshape(-1, 3).astype(np.int64)
    colours, inverse, counts = np.unique(
        flat @ (1 << 16, 1 << 8, 1), return_inverse=True, return_counts=True
    )
    rgb = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], axis=1)
    palette = rgb[np.argsort(-counts, kind="stable")[:256]]
    nearest = ((rgb[:, None] - palette) ** 2).sum(-1).argmin(1).astype(np.uint8)
    smaller = Image.fromarray(nearest[inverse].reshape(pixels.shape[:2]), "P")
    smaller.putpalette(palette.astype(np.uint8).tobytes())
    buffer = BytesIO()
    smaller.save(buffer, "PNG", optimize=True)
    return min(buffer.getvalue(), data, key=len)


def merge_streams(outputs: Iterable[NotebookNode]) -> list[NotebookNode]:
    """One stdout and one stderr output for each run of stream outputs.

    The kernel sends both through buffers, so where one piece ends and how the two interleave
    differs from run to run.
    """
    merged: list[NotebookNode] = []
    streams: dict[str, NotebookNode] = {}

    def close() -> None:
        merged.extend(streams[name] for name in ("stdout", "stderr") if name in streams)
        streams.clear()

    for output in outputs:
        if output.output_type != "stream":
            close()
            merged.append(output)
        elif output.name in streams:
            streams[output.name].text += text(output.text)
        else:
            output.text = text(output.text)
            streams[output.name] = output
    close()
    return merged


def normalise(notebook: NotebookNode) -> None:
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({"tags": tags(cell)} if tags(cell) else {})
        if cell.cell_type != "code":
            continue
        cell.outputs = merge_streams(cell.outputs)
        for output in cell.outputs:
            if output.output_type == "error":
                # The frames name folders of the machine that ran the notebook.
                output.traceback = [f"{output.ename}: {output.evalue}"]
            data = output.get("data", {})
            if "image/png" in data:
                png = fewer_colours(strip_png(base64.b64decode(data["image/png"])))
                data["image/png"] = base64.b64encode(png).decode()


def as_bytes(notebook: NotebookNode) -> bytes:
    nbformat.validate(notebook)
    return (nbformat.writes(notebook).rstrip("\n") + "\n").encode()


def keep_varying_outputs(stored: NotebookNode, notebook: NotebookNode) -> NotebookNode:
    """The new notebook with the stored outputs of those cells whose outputs vary by nature."""
    outputs = {cell.id: cell.outputs for cell in stored.cells if VARIES in tags(cell)}
    mixed = nbformat.from_dict(notebook)
    for cell in mixed.cells:
        if VARIES in tags(cell) and cell.id in outputs:
            cell.outputs = outputs[cell.id]
    return mixed


def same_but_for_varying_outputs(target: Path, notebook: NotebookNode) -> bool:
    if not target.exists():
        return False
    stored = target.read_bytes()
    mixed = keep_varying_outputs(nbformat.reads(stored.decode(), as_version=4), notebook)
    return as_bytes(mixed) == stored


def local_path(content: bytes, root: Path) -> str | None:
    """The first text that only this machine, or only this run, would print."""
    pattern = rf"{re.escape(str(root))}[^\s\"\\]*|ipykernel_\d+[^\s\"\\]*"
    match = re.search(pattern, content.decode())
    return match.group() if match else None


def build(script: Path) -> str | None:
    """Execute one chapter and store it. Returns a sentence when that is not possible."""
    start = time.perf_counter()
    notebook = read_script(script)
    try:
        execute(notebook, script.parent)
    except CellTimeoutError:
        return f"{script.name} has a cell that runs for more than {CELL_TIMEOUT} seconds."
    except DeadKernelError:
        return f"{script.name} ended its kernel."
    except CellExecutionError as error:
        return f"{script.name} has a cell that fails and is not tagged {MAY_FAIL}:\n{error}"
    normalise(notebook)
    content = as_bytes(notebook)
    target = script.with_suffix(".ipynb")
    if len(content) > MAX_BYTES:
        return f"{target.name} would have {len(content):,} bytes; {MAX_BYTES:,} are allowed."
    if path := local_path(content, script.parent.parent):
        return f"{script.name} prints {path}, which differs from machine to machine."
    state = "unchanged"
    if not same_but_for_varying_outputs(target, notebook):
        target.write_bytes(content)
        state = "written"
    seconds = time.perf_counter() - start
    print(f"{target.name:<40} {seconds:6.1f} s {len(content) / 1000:7.0f} kB  {state}", flush=True)
    return None


def differences(script: Path) -> list[str]:
    """A sentence for each way in which the notebook's cells differ from its script's."""
    target = script.with_suffix(".ipynb")
    if not target.exists():
        return [f"{target.name} is missing."]
    wanted = jupytext.read(script, fmt="py:percent").cells
    stored = nbformat.read(target, as_version=4).cells
    found = []
    if len(wanted) != len(stored):
        found.append(f"{target.name} has {len(stored)} cells and its script {len(wanted)}.")
    for number, (want, have) in enumerate(zip(wanted, stored, strict=False)):
        where = f"{target.name}, cell {number}"
        if want.cell_type != have.cell_type:
            found.append(f"{where} is a {have.cell_type} cell; in the script {want.cell_type}.")
        elif text(want.source) != text(have.source):
            found.append(f"{where} has another source than the script: {first_change(want, have)}")
        if tags(want) != tags(have):
            found.append(f"{where} has the tags {tags(have)}; in the script {tags(want)}.")
    return found


def first_change(want: NotebookNode, have: NotebookNode) -> str:
    ours, theirs = text(want.source).splitlines(), text(have.source).splitlines()
    for old, new in zip(theirs, ours, strict=False):
        if old != new:
            return f"{old!r} should be {new!r}."
    return f"it has {len(theirs)} lines and should have {len(ours)}."


def orphans(folder: Path = FOLDER) -> list[str]:
    """A sentence for each notebook without a script."""
    return [
        f"{path.name} has no script {path.stem}.py."
        for path in notebooks(folder)
        if not path.with_suffix(".py").exists()
    ]


def choose(names: list[str], folder: Path = FOLDER) -> list[Path]:
    """The scripts for names such as `01`, `01_softmax` or `notebooks/01_softmax.py`."""
    available = scripts(folder)
    if not names:
        return available
    chosen = []
    for name in names:
        stem = Path(name).name.removesuffix(".py").removesuffix(".ipynb")
        matches = [path for path in available if path.stem == stem or path.stem[:2] == stem]
        if not matches:
            raise SystemExit(f"There is no chapter {name!r} in {folder.name}/.")
        chosen += matches
    return chosen


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Execute the chapters and store the notebooks.")
    parser.add_argument("chapters", nargs="*", help="names or numbers; all when left out")
    parser.add_argument(
        "--check", action="store_true", help="compare notebooks with scripts, execute nothing"
    )
    options = parser.parse_args(arguments)
    chosen = choose(options.chapters)
    if not chosen:
        raise SystemExit(f"There is no chapter in {FOLDER.name}/.")
    problems: list[str] = []
    if options.check:
        problems += [line for script in chosen for line in differences(script)]
    else:
        problems += [line for script in chosen if (line := build(script))]
    if not options.chapters:
        problems += orphans()
    for line in problems:
        print(line, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
