"""Documentation: commands and Python of the README run, tables agree with the measurements, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from benchmarks import tables

from tuneavideo.cli import main
from tuneavideo.settings import ClipEditSettings, TuneSettings
from tuneavideo.video import read

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FEW_STEPS = {"max_train_steps": 2, "num_inference_steps": 2, "num_inv_steps": 2}


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text_of(page), re.DOTALL)


def tiny(text: str, base: Path, clip: Path) -> str:
    """Replace base, clip and number of frames by small ones."""
    text = text.replace("skiing.mp4", str(clip)).replace("sd1.5", str(base)).replace("runs/skiing-1", "runs/square-1")
    steps = "".join(f", {name}={value}" for name, value in FEW_STEPS.items())
    return re.sub(r"(stride=2, )?num_frames=24", f"num_frames=3{steps}", text)


def test_the_commands_and_the_python_run(
    base: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    steps = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in FEW_STEPS.items())
    commands = tiny(blocks(README, "sh")[1], base, clip).replace("\\\n", "").strip().splitlines()
    for command in commands:
        program, *words = shlex.split(command.replace("--stride 2 --num-frames 24", f"--num-frames 3 {steps}"))
        assert program == "tuneavideo"
        main.main(words)
    assert len(list(Path("runs/square-1/edits").iterdir())) == 3
    assert Path("runs/square-1/report.html").is_file()
    (first,) = blocks(README, "python")
    pipeline = next(code for code in blocks(ROOT / "docs/python.md", "python") if "from_pretrained" in code)
    for code in (first, pipeline):
        exec(compile(tiny(code, base, clip), "README.md", "exec"), {})
    assert read("spider-man.mp4").frames == 3


def test_tables_are_those_of_the_measurements() -> None:
    assert not [page.name for page in tables.outdated()], "python -m benchmarks.tables --write"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, heading = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", text_of(file), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_and_tests_named_in_a_page_exist(page: Path) -> None:
    named = re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py|(?:src|tests|benchmarks|docs|tools)/[\w/.-]+)`", text_of(page))
    assert not [path for path in named if not any((root / path).exists() for root in (ROOT, ROOT / "src/tuneavideo"))]


def test_the_readme_is_short_and_its_tree_is_the_packages() -> None:
    lines = text_of(README).splitlines()
    assert len(lines) <= 150
    assert not [line for line in lines if len(line) > 125]
    start = lines.index("src/tuneavideo/")
    tree = lines[start + 1 : lines.index("```", start)]
    named = {name for line in tree for name in re.findall(r"(?:^  |   )([a-z_]+(?:\.py|/)) ", line)}
    assert not [name for name in named if not (ROOT / "src/tuneavideo" / name).exists()]
    assert {
        f"{path.name}/" for path in (ROOT / "src/tuneavideo").iterdir() if (path / "__init__.py").is_file()
    } <= named


def test_every_option_named_in_the_readme_exists() -> None:
    named = set(re.findall(r"--([a-z][a-z-]+)", text_of(README)))
    elsewhere = {"config", "resume", "help-all", "debug", "goldens"}  # of the commands and of benchmarks.parity
    known = {name.replace("_", "-") for kind in (TuneSettings, ClipEditSettings) for name in kind.model_fields}
    assert {name.removeprefix("no-") for name in named} - elsewhere <= known
