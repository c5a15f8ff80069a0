"""Reference of the command line, docs/cli.md, generated from the help of the commands.

python -m tools.cli_reference --write     write docs/cli.md
python -m tools.cli_reference --check     exit with 1 if docs/cli.md differs
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

from tuneavideo.cli import main

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
COMMANDS = {name: [name] for name in main.COMMANDS if name not in ("benchmark", "mindone")} | {
    f"{name} {kind}": [name, kind]
    for name, kinds in {"benchmark": ("tgve", "miniature"), "mindone": ("train", "infer")}.items()
    for kind in kinds
}
HEAD = """\
# Command line

This page is generated from the help of the commands: `make reference` writes it.
`tuneavideo COMMAND --help` shows the common options of a command, `--help-all` shows all options.
The default values of `tune` and `adopt` are those of the bundled miniature; `tuneavideo tune --base NAME --help-all`
shows those of another base. Edits take their default values from the run.
"""


def reference() -> str:
    """Return the text of the page: the help of every command at 100 columns."""
    sections = [f"## {name}\n\n```text\n{help_of(words)}\n```\n" for name, words in COMMANDS.items()]
    return "\n".join([HEAD, f"```text\n{help_of([])}\n```\n", *sections])


def help_of(words: Sequence[str]) -> str:
    """Return the help of a command, without spaces at the ends of lines."""
    os.environ["COLUMNS"] = "100"
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main.main([*words, "--help-all" if words and words[0] != "mindone" else "--help"])
    return "\n".join(line.rstrip() for line in out.getvalue().strip().splitlines())


def run(argv: Sequence[str] | None = None) -> None:
    """Write the page or check it."""
    parser = argparse.ArgumentParser("python -m tools.cli_reference", description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true", help="Write docs/cli.md.")
    action.add_argument("--check", action="store_true", help="Exit with 1 if docs/cli.md is out of date.")
    if parser.parse_args(argv).write:
        PAGE.write_text(reference(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != reference():
        raise SystemExit(f"{PAGE}: out of date; run 'make reference'")


if __name__ == "__main__":
    run()
