"""The stored notebooks: they match their scripts, they ran, and they say what they leave open."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import nbformat
import numpy as np
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from matplotlib.figure import Figure
from matplotlib.image import imread
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook, new_output

from tools import notebooks as tool

ROOT = Path(__file__).resolve().parent.parent
FIRST_CHAPTERS = ("00", "01", "02", "03", "04")
MAX_IGNORED_CELLS = 3
MAX_FUNCTION_LINES = 5
IGNORE = "nbval-ignore-output"

PATHS = tool.notebooks()
every_notebook = pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])


def code_cells(path: Path) -> list[NotebookNode]:
    notebook = nbformat.read(path, as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def long_functions(source: str) -> list[str]:
    tree = ast.parse(TransformerManager().transform_cell(source))
    functions = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    return [
        f"{name} has {lines} lines" for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES
    ]


def failures(cell: NotebookNode) -> list[str]:
    return [output.ename for output in cell.outputs if output.output_type == "error"]


def test_the_first_chapters_exist() -> None:
    numbers = [path.stem[:2] for path in PATHS]
    missing = [number for number in FIRST_CHAPTERS if number not in numbers]
    assert not missing, f"chapters {missing} are missing"
    assert len(numbers) == len(set(numbers)), f"two chapters share a number: {numbers}"


def test_every_notebook_has_a_script_and_agrees_with_it() -> None:
    found = tool.orphans()
    for script in tool.scripts():
        found += tool.differences(script)
    assert not found, "\n" + "\n".join(found)


@every_notebook
def test_notebook_was_executed_from_top_to_bottom(path: Path) -> None:
    counts = [cell.execution_count for cell in code_cells(path) if cell.source.strip()]
    assert counts, "the notebook has no code"
    assert counts == list(range(1, len(counts) + 1))


@every_notebook
def test_only_tagged_cells_fail_and_each_of_them_does(path: Path) -> None:
    for cell in code_cells(path):
        tagged = tool.MAY_FAIL in tool.tags(cell)
        assert bool(failures(cell)) == tagged, f"{failures(cell)} in:\n{cell.source}"


@every_notebook
def test_notebook_is_small(path: Path) -> None:
    assert path.stat().st_size <= tool.MAX_BYTES


@every_notebook
def test_few_outputs_are_ignored_and_each_with_a_reason(path: Path) -> None:
    ignored = [cell for cell in code_cells(path) if IGNORE in tool.tags(cell)]
    assert len(ignored) <= MAX_IGNORED_CELLS
    for cell in ignored:
        assert has_comment(cell.source), f"no comment says why:\n{cell.source}"


def has_comment(source: str) -> bool:
    return any(line.strip().startswith("# ") for line in source.splitlines())


@every_notebook
def test_no_cell_ignores_its_output_without_the_tag(path: Path) -> None:
    """nbval also obeys comments and other tags, which the count above would miss."""
    for cell in code_cells(path):
        assert "NBVAL" not in cell.source.upper(), cell.source
        assert not {"nbval-skip", "skip-execution"} & set(tool.tags(cell)), cell.source


@every_notebook
def test_code_longer_than_a_few_lines_lives_in_the_package(path: Path) -> None:
    found = [line for cell in code_cells(path) for line in long_functions(cell.source)]
    assert not found, "\n" + "\n".join(found)


def test_a_long_function_is_found() -> None:
    body = "".join(f"    x = {n}\n" for n in range(4))
    assert long_functions(f"%matplotlib inline\ndef short(x):\n{body}") == []
    assert long_functions(f"def long(x):\n{body}    return x\n") == ["long has 6 lines"]


SCRIPT = """\
# # A title

# %% tags=["nbval-ignore-output"]
# A comment that states a reason.
1 + 1
"""


def write_pair(folder: Path, **change: object) -> Path:
    script = folder / "00_toy.py"
    script.write_text(f"# %% [markdown]\n{SCRIPT}", encoding="utf-8")
    notebook = tool.read_script(script)
    for name, value in change.items():
        notebook.cells[1][name] = value
    nbformat.write(notebook, script.with_suffix(".ipynb"))
    return script


def test_a_matching_pair_has_no_differences(tmp_path: Path) -> None:
    assert tool.differences(write_pair(tmp_path)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "# A comment that states a reason.\n1 + 2"}, "'1 + 2' should be '1 + 1'"),
        ({"metadata": nbformat.from_dict({})}, "has the tags []"),
        ({"cell_type": "raw"}, "is a raw cell"),
    ],
)
def test_a_change_in_one_half_of_a_pair_is_reported(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    script = write_pair(tmp_path)
    notebook = tool.read_script(script)
    notebook.cells[1].update(change)
    script.with_suffix(".ipynb").write_text(nbformat.writes(notebook), encoding="utf-8")
    (line,) = tool.differences(script)
    assert message in line


def test_streams_are_merged() -> None:
    pieces = [("stdout", "a"), ("stderr", "!"), ("stdout", "b")]
    outputs = [new_output("stream", name=name, text=text) for name, text in pieces]
    merged = tool.merge_streams([*outputs, new_output("display_data"), *outputs[:1]])
    assert [(o.get("name"), o.get("text")) for o in merged] == [
        ("stdout", "ab"),
        ("stderr", "!"),
        (None, None),
        ("stdout", "ab"),
    ]


VARYING = """\
# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots()

# %% tags=["nbval-ignore-output"]
# The time depends on the machine.
import time

time.perf_counter()

# %% tags=["raises-exception"]
raise ValueError("on purpose")
"""


def test_building_a_chapter_twice_changes_no_byte(tmp_path: Path) -> None:
    folder = tmp_path / "notebooks"
    folder.mkdir()
    script = folder / "00_toy.py"
    script.write_text(VARYING, encoding="utf-8")
    assert tool.build(script) is None
    first = script.with_suffix(".ipynb").read_bytes()
    assert b"image/png" in first
    assert tool.build(script) is None
    assert script.with_suffix(".ipynb").read_bytes() == first


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("1 / 0", "has a cell that fails"),
        ("import os\nprint(os.getcwd())", "differs from machine to machine"),
        ("print('x' * 1_000_000)", "bytes; 1,000,000 are allowed"),
    ],
    ids=["error", "path", "size"],
)
def test_a_chapter_that_must_not_be_stored_is_refused(
    tmp_path: Path, code: str, message: str
) -> None:
    script = tmp_path / "00_toy.py"
    script.write_text(f"# %%\n{code}\n", encoding="utf-8")
    assert message in (tool.build(script) or "")
    assert not script.with_suffix(".ipynb").exists()


def test_a_png_loses_its_text_and_keeps_its_pixels() -> None:
    figure = Figure(figsize=(1, 1))
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    stripped = tool.strip_png(buffer.getvalue())
    assert b"Matplotlib" in buffer.getvalue()
    assert b"Matplotlib" not in stripped
    assert np.array_equal(imread(BytesIO(stripped)), imread(BytesIO(buffer.getvalue())))


def test_a_figure_in_fewer_colours_differs_only_where_a_colour_is_rare() -> None:
    figure = Figure(figsize=(3, 2), dpi=110)
    axes = figure.subplots()
    axes.bar(range(3), (1, 2, 3), hatch="//", color=("#0072B2", "#E69F00", "#009E73"))
    axes.imshow(np.linspace(0, 1, 900).reshape(30, 30), extent=(3, 4, 0, 3))
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    smaller = tool.fewer_colours(buffer.getvalue())
    assert len(smaller) < len(buffer.getvalue()) / 1.5
    before, after = (255 * imread(BytesIO(x))[..., :3] for x in (buffer.getvalue(), smaller))
    colours, inverse, counts = np.unique(
        before.reshape(-1, 3), axis=0, return_inverse=True, return_counts=True
    )
    rare = counts[inverse.reshape(before.shape[:2])] <= np.sort(counts)[-256]
    assert len(colours) > 256
    assert np.array_equal(before[~rare], after[~rare])
    assert np.abs(before - after).mean() < 0.5  # of 255


@pytest.mark.parametrize(("stored", "code"), [("2", 0), ("3", 1)], ids=["true", "tampered"])
def test_nbval_fails_when_a_stored_output_was_changed(
    tmp_path: Path, stored: str, code: int
) -> None:
    output = new_output("execute_result", {"text/plain": stored}, execution_count=1)
    cell = new_code_cell("1 + 1", execution_count=1, outputs=[output])
    path = tmp_path / "toy.ipynb"
    nbformat.write(new_notebook(cells=[cell], metadata=tool.METADATA), path)
    command = [
        *(sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env"),
        *("-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", str(path)),
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == code, result.stdout + result.stderr
    assert f"1 {'failed' if code else 'passed'}" in result.stdout


def test_a_source_that_a_chapter_shows_is_the_lesson_and_not_a_wrapper() -> None:
    shown = [
        text
        for path in tool.notebooks()
        for cell in code_cells(path)
        for output in cell.outputs
        if (text := output.get("data", {}).get("text/markdown", "")).startswith("```python")
    ]
    assert len(shown) >= 4
    for text in shown:
        is_stage = "q, k, v" in text.partition(":\n")[0]
        assert "with machine.kernel(" in text or "with counted(" in text or not is_stage, text
        too_long = [line for line in text.splitlines() if len(line) > 88]
        assert not too_long, f"a slide or a notebook breaks these lines: {too_long}"
