"""What the README shows is what the code does now."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import readme


def test_the_ladder_table_and_the_pictures_are_those_of_the_code():
    assert readme.stale() == []


@pytest.mark.parametrize(
    ("name", "begin"),
    [("ladder", "| `naive`"), ("counters", "| 128 |"), ("speed", "| forward, full")],
)
def test_a_changed_table_is_found(monkeypatch, tmp_path, name, begin):
    copy = tmp_path / "README.md"
    text = readme.README.read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith(begin))
    copy.write_text(text.replace(row, re.sub(r"\d", "7", row)), encoding="utf-8")
    monkeypatch.setattr(readme, "README", copy)
    assert any(f"{name} table is stale" in sentence for sentence in readme.stale())


def test_a_picture_of_other_bytes_is_found(monkeypatch):
    monkeypatch.setattr(readme, "PROBLEM", readme.PROBLEM.replace(Nq=64))
    found = readme.stale()
    for name in ("traffic.png", "traffic_dark.png"):
        assert any(f"{name} is stale" in sentence for sentence in found)
    assert not any("moments" in sentence for sentence in found)


def test_each_picture_has_a_text_and_a_dark_twin():
    text = readme.README.read_text(encoding="utf-8")
    shown = re.findall(r"<picture>.*?</picture>", text, re.S)
    assert len(shown) == len(readme.PICTURES)
    for name, picture in zip(readme.PICTURES, shown, strict=True):
        assert f'media="(prefers-color-scheme: dark)" srcset="images/{name}_dark.png"' in picture
        assert f'src="images/{name}.png"' in picture
        assert len(re.search(r'alt="([^"]*)"', picture)[1]) > 80


def test_links_lead_to_files():
    text = readme.README.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert links
    for link in links:
        assert (readme.ROOT / link).exists(), f"README.md links to {link}, which is not there"


@pytest.fixture(scope="module")
def lecture_example():
    text = readme.README.read_text(encoding="utf-8")
    return "".join(re.findall(r"```python\n(.*?)```", text, re.S))


def test_the_examples_for_a_lecture_run(lecture_example, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", lecture_example], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(readme.ROOT), "MPLBACKEND": "agg"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "traffic.svg").exists()
