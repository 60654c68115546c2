"""Open pages in a browser, at the width of a desktop and of a telephone, in the light and the dark theme.

Every page has to fit its window, and its text needs a contrast of 4.5 to its ground (3 if it is large)::

    python tools/check_pages.py docs/_build/html report.html     # folders and files
    python tools/check_pages.py docs/_build/html --pictures OUT  # also writes pictures of the pages
    python tools/check_pages.py docs/_build/html --reports       # also a report of every command, written for this

Needs Chromium (Debian: ``apt-get install chromium``). Exits with 0 and the reason if there is none.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

WIDTHS = (1280, 390)
THEMES = ("light", "dark")
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run",
)  # fmt: skip

DRIVER = """<!doctype html><meta charset="utf-8"><body style="margin:0"><script>
const MEASURE = %s;
const wait = ms => new Promise(done => setTimeout(done, ms));
(async () => {
  const results = [];
  for (const width of MEASURE.widths) {
    const frame = document.createElement("iframe");
    frame.style = `width:${width}px;height:900px;border:0`;
    document.body.replaceChildren(frame);
    for (const page of MEASURE.pages) {
      await new Promise(done => { frame.onload = done; frame.src = page; });
      await wait(60);
      results.push({page, width, problems: problems(frame.contentWindow)});
    }
  }
  await fetch("/result", {method: "POST", body: JSON.stringify(results)});
})();
function problems(win) {
  const root = win.document.scrollingElement, found = [];
  if (root.scrollWidth > win.innerWidth + 1) {
    const wide = [...win.document.querySelectorAll("body *")].filter(e => {
      if (e.getBoundingClientRect().right <= win.innerWidth + 1) return false;
      for (let up = e.parentElement; up; up = up.parentElement)
        if (/auto|scroll|hidden|clip/.test(win.getComputedStyle(up).overflowX))
          return up === win.document.body;
      return true;
    });
    const inner = wide.filter(e => !wide.some(other => other !== e && e.contains(other)));
    const named = inner.slice(0, 3).map(name).join(", ");
    found.push(`wider than the window: ${root.scrollWidth} of ${win.innerWidth} (${named})`);
  }
  const low = new Map();
  const walker = win.document.createTreeWalker(win.document.body, 4);
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim(), e = walker.currentNode.parentElement;
    if (!text || !e || /SCRIPT|STYLE|NOSCRIPT/.test(e.tagName)) continue;
    const box = e.getBoundingClientRect(), style = win.getComputedStyle(e);
    if (!box.width || !box.height || style.visibility === "hidden" || +style.opacity < 0.1) continue;
    const ground = behind(win, e), ink = over(parse(style.color), ground);
    const size = parseFloat(style.fontSize), bold = +style.fontWeight >= 600;
    const least = size >= 24 || (bold && size >= 18.6) ? 3 : 4.5, ratio = contrast(ink, ground);
    if (ratio < least - 0.02) {
      const key = `${style.color} on rgb(${ground.slice(0, 3).map(Math.round)})`;
      if (!low.has(key)) low.set(key, `contrast ${ratio.toFixed(2)} of ${name(e)}: "${text.slice(0, 30)}" (${key})`);
    }
  }
  return [...found, ...low.values()];
}
const name = e => e.tagName.toLowerCase() + [...e.classList].map(c => "." + c).join("");
function parse(text) {
  const numbers = (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  return numbers.length < 4 ? [...numbers, 1] : numbers;
}
const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
function behind(win, e) {
  const layers = [];
  for (let up = e; up; up = up.parentElement) {
    const color = parse(win.getComputedStyle(up).backgroundColor);
    if (color[3] > 0) layers.push(color);
    if (color[3] === 1) break;
  }
  const dark = win.matchMedia("(prefers-color-scheme: dark)").matches;
  let ground = dark ? [18, 18, 18, 1] : [255, 255, 255, 1];
  for (const layer of layers.reverse()) ground = over(layer, ground);
  return ground;
}
function luminance(color) {
  const [r, g, b] = color.slice(0, 3).map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function contrast(a, b) {
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
}
</script>"""


def browser() -> str | None:
    """Return the path of Chromium; None: there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the pages and the driver, and receives what the driver measured."""

    def __init__(self, *arguments: Any, state: dict[str, Any], **options: Any):
        self.state = state
        super().__init__(*arguments, **options)

    def do_GET(self) -> None:
        """Serve the driver, or a file."""
        if self.path == "/driver":
            text = (DRIVER % json.dumps(self.state["measure"])).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)
        else:
            super().do_GET()

    def do_POST(self) -> None:
        """Receive the results."""
        length = int(self.headers["Content-Length"])
        self.state["results"] = json.loads(self.rfile.read(length))
        self.send_response(204)
        self.end_headers()
        self.state["done"].set()

    def translate_path(self, path: str) -> str:
        """Return the file of an address ``/NUMBER/...``: the number is that of the folder."""
        number, _, rest = super().translate_path(path)[len(os.getcwd()) + 1 :].partition(os.sep)
        roots = self.state["roots"]
        return (
            str(roots[int(number)] / rest) if number.isdigit() and int(number) < len(roots) else ""
        )

    def log_message(self, format: str, *arguments: Any) -> None:
        """Print nothing."""


def addresses(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Return the folders to serve and the address of every HTML page.

    Args:
        paths: Folders, searched below, and files.
    """
    roots, pages = [], []
    for path in paths:
        root = path if path.is_dir() else path.parent
        files = sorted(path.rglob("*.html")) if path.is_dir() else [path]
        for file in files:
            if not {"_static", "_modules"} & set(file.parts):
                pages.append(f"/{len(roots)}/{quote(file.relative_to(root).as_posix())}")
        roots.append(root.resolve())
    return roots, pages


def measure(
    paths: Sequence[Path], theme: str, program: str, timeout: float, widths: Sequence[int] = WIDTHS
) -> list[dict[str, Any]]:
    """Open all pages in one theme and return the problems of each.

    Args:
        paths: Folders and files.
        theme: ``"light"`` or ``"dark"``.
        program: Chromium.
        timeout: Seconds for all pages.
        widths: Widths of the window, in pixels.

    Returns:
        One entry per page and width: ``page``, ``width``, ``problems``.
    """
    roots, pages = addresses(paths)
    state: dict[str, Any] = {
        "roots": roots, "measure": {"widths": list(widths), "pages": pages},
        "done": threading.Event(), "results": None,
    }  # fmt: skip
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(_Handler, state=state)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    profile = tempfile.mkdtemp(prefix="check-pages-")
    command = [
        program, *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-port=0",
        f"--blink-settings=preferredColorScheme={int(theme == 'light')}",
        f"http://127.0.0.1:{server.server_port}/driver",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        if not state["done"].wait(timeout):
            msg = f"Chromium did not finish {len(pages)} pages in {timeout:.0f} s"
            raise TimeoutError(msg)
    finally:
        process.terminate()
        process.wait(30)
        server.shutdown()
        shutil.rmtree(profile, ignore_errors=True)
    names = [root.name for root in roots]
    for result in state["results"]:
        _, number, rest = result["page"].split("/", 2)
        result["page"] = f"{names[int(number)]}/{rest}"
    return state["results"]


def picture(page: Path, out: Path, theme: str, width: int, height: int, program: str) -> None:
    """Write a picture of a page.

    Args:
        page: An HTML file.
        out: PNG file.
        theme: ``"light"`` or ``"dark"``.
        width: Width of the window, in pixels.
        height: Its height.
        program: Chromium.
    """
    with tempfile.TemporaryDirectory(prefix="check-pages-") as profile:
        frame = Path(profile) / "frame.html"
        # The window of a browser has a least width; a frame has none.
        frame.write_text(
            f'<body style="margin:0"><iframe src="{page.resolve().as_uri()}" '
            f'style="width:{width}px;height:{height}px;border:0"></iframe>'
        )
        subprocess.run(
            [
                program, *FLAGS, f"--user-data-dir={profile}", "--allow-file-access-from-files",
                f"--blink-settings=preferredColorScheme={int(theme == 'light')}",
                f"--window-size={max(width, 500)},{height}", f"--screenshot={out}", frame.as_uri(),
            ],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the pages that the command line names; 1 if one has a problem."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", type=Path, help="folders of pages, and pages")
    parser.add_argument("--pictures", type=Path, help="folder for pictures of all pages")
    parser.add_argument("--reports", action="store_true", help="also a report of every command")
    parser.add_argument("--height", type=int, default=1600, help="height of the pictures")
    parser.add_argument("--timeout", type=float, default=600, help="seconds per theme")
    given = parser.parse_args(arguments)
    program = browser()
    if program is None:
        print("not checked: Chromium is not installed (Debian: apt-get install chromium)")
        return 0
    missing = [path for path in given.paths if not path.exists()]
    if missing:
        parser.error(f"no such page: {', '.join(map(str, missing))}")
    with tempfile.TemporaryDirectory(prefix="check-pages-") as folder:
        if given.reports:
            from sample_reports import write_reports

            write_reports(Path(folder))
            given.paths.append(Path(folder))
        if not given.paths:
            print("not checked: no page is there; build the site first (make docs)")
            return 0
        return check(given, program)


def check(given: argparse.Namespace, program: str) -> int:
    """Open all pages, and return 1 if one has a problem."""
    failed, opened = 0, 0
    for theme in THEMES:
        for result in measure(given.paths, theme, program, given.timeout):
            opened += 1
            for problem in result["problems"]:
                failed += 1
                print(f"{result['page']} ({result['width']} px, {theme}): {problem}")
    print(f"{opened} views of pages, {failed} problems")
    if given.pictures:
        given.pictures.mkdir(parents=True, exist_ok=True)
        for path in given.paths:
            for page in sorted(path.rglob("*.html")) if path.is_dir() else [path]:
                for theme in THEMES:
                    for width in WIDTHS:
                        name = f"{page.stem}-{width}-{theme}.png"
                        picture(page, given.pictures / name, theme, width, given.height, program)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
