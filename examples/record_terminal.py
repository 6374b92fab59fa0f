"""Runs a few commands against a server, and writes their output to docs/images/terminal.svg.

The picture needs no other file. If the viewer runs animations, commands appear one after another;
otherwise the whole session is visible from the start.

    python examples/record_terminal.py
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from xml.sax.saxutils import escape

from turret.server.server_process import ServerProcess

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "terminal.svg"
FLAGS = (
    *("--adapter-root", str(ROOT / "examples" / "adapters")),
    *("--preload", "json=json", "--preload", "pirate=pirate", "--preload", "label=label"),
)
ASK = "JSON with name, age, city, job: Nora Murphy is a 42-year-old architect from Lisbon."
SESSION = (
    "turret adapters load sql sql",
    "turret adapters list",
    f'turret generate --chat -a json --temperature 0 --max-tokens 60 "{ASK}"',
    'turret generate --chat -a sql --temperature 0 --max-tokens 40 "SQL for movies(title, director,'
    ' rating): List the title of all movies whose director is Greta Lund."',
    'turret generate --chat -a json -a pirate=0.7 --temperature 0 --max-tokens 60 "' + ASK + '"',
    'turret generate -a jsn "x"',
)
COLUMNS, LINE_HEIGHT, CHAR_WIDTH = 96, 19, 8.1
PAUSE_SECONDS, LINE_SECONDS = 1.2, 0.08
STYLE = (
    "text{font:13.5px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;"
    "fill:#d6dbe1;white-space:pre}.c{fill:#8fd18b}.p{fill:#6c7680}"
    "@media (prefers-reduced-motion:no-preference){text{animation:a .01s both}}"
    "@keyframes a{from{opacity:0}}"
)


def session(address: str) -> list[tuple[str, bool]]:
    """Lines of the terminal, each with whether it is (part of) a command."""
    environment = {**os.environ, "TURRET_ADDRESS": address, "COLUMNS": str(COLUMNS)}
    lines: list[tuple[str, bool]] = []
    for command in SESSION:
        typed = textwrap.wrap(command, COLUMNS - 6, break_long_words=False)
        lines += [(f"{'$ ' if i == 0 else '  '}{line}", True) for i, line in enumerate(typed)]
        arguments = [sys.executable, "-m", "turret.server.cli", *shlex.split(command)[1:]]
        done = subprocess.run(
            arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for line in done.stdout.rstrip().splitlines():
            lines += [(part, False) for part in textwrap.wrap(line, COLUMNS) or [""]]
        lines.append(("", False))
    return lines[:-1]


def picture(lines: list[tuple[str, bool]]) -> str:
    """The lines as SVG."""
    width = round(COLUMNS * CHAR_WIDTH + 32)
    height = (len(lines) + 2) * LINE_HEIGHT + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
        f' height="{height}" role="img"><title>A session with turret</title>'
        f'<style>{STYLE}</style><rect width="{width}" height="{height}" rx="8" fill="#161b20"/>',
        *(
            f'<circle cx="{20 + 18 * i}" cy="18" r="5.5" fill="{colour}"/>'
            for i, colour in enumerate(("#e0635b", "#dfb14b", "#6bb55f"))
        ),
    ]
    seconds = 0.0
    for number, (line, is_command) in enumerate(lines):
        seconds += PAUSE_SECONDS if line.startswith("$ ") and is_command else LINE_SECONDS
        if line:
            kind = ' class="c"' if is_command else ""
            parts.append(
                f'<text x="16" y="{52 + number * LINE_HEIGHT}"{kind} xml:space="preserve"'
                f' style="animation-delay:{seconds:.2f}s">{escape(line)}</text>'
            )
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    with ServerProcess(FLAGS, echo=True) as server:
        server.wait()
        lines = session(server.address)
    PICTURE.write_text(picture(lines), encoding="utf-8")
    print(PICTURE)


if __name__ == "__main__":
    main()
