"""Checks HTML pages as a screen reader and weak eyes need them: `python docs/check_pages.py FOLDER --axe axe.min.js`.

Every page is opened in Chromium, light and dark, and examined by axe-core (contrast, headings, names, alt texts).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, Queue

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SCHEMES = {"light": 1, "dark": 0}
"""The colour schemes, and the numbers that Chromium has for them."""
MOUSE = "primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4"
"""Settings of Chromium: it has a mouse, as on a desktop; on a phone, a page may do without the keyboard."""
LIMIT_S = 900

EXAMINE = """<!doctype html><title>check</title><script>
async function examine(path) {
  const frame = document.createElement("iframe");
  frame.width = 1280; frame.height = 900; frame.src = path;
  await new Promise(loaded => { frame.onload = loaded; document.body.append(frame); });
  const inside = frame.contentWindow, script = inside.document.createElement("script");
  script.src = "/_check/axe.js";
  await new Promise(loaded => { script.onload = loaded; inside.document.head.append(script); });
  const { violations } = await inside.axe.run(inside.document, { resultTypes: ["violations"] });
  frame.remove();
  return violations.flatMap(rule => rule.nodes.map(node => ({
    rule: rule.id, help: rule.help, html: node.html, why: node.failureSummary })));
}
onload = async () => {
  const found = {};
  for (const path of await (await fetch("/_check/pages")).json())
    found[path] = await examine(path).catch(error => [{ rule: "error", help: String(error), html: "", why: "" }]);
  const scheme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  await fetch("/_check/found", { method: "POST", body: JSON.stringify({ scheme, found }) });
};
</script><body></body>"""
"""A page that opens the others one after the other, and sends what axe-core finds in them."""


class Examined(SimpleHTTPRequestHandler):
    """Serves the pages, without their policies for scripts, and the page that examines them."""

    def __init__(self, *arguments: object, axe: Path, found: Queue[dict], **keywords: object) -> None:
        self.axe, self.found = axe, found
        super().__init__(*arguments, **keywords)  # pyright: ignore[reportArgumentType]

    def do_GET(self) -> None:
        """Answers with a file of the folder, or with a part of the check."""
        folder = Path(self.directory)
        path = Path(self.translate_path(self.path))
        if self.path == "/_check/pages":
            listed = sorted(f"/{page.relative_to(folder)}" for page in folder.rglob("*.html"))
            self._send(json.dumps(listed).encode(), "application/json")
        elif self.path == "/_check/axe.js":
            self._send(self.axe.read_bytes(), "text/javascript")
        elif self.path == "/_check/":
            self._send(EXAMINE.encode(), "text/html")
        elif path.suffix == ".html" and path.is_file():
            text = re.sub(r"<meta http-equiv=.?Content-Security-Policy[^>]*>", "", path.read_text())
            self._send(text.encode(), "text/html; charset=utf-8")
        else:
            super().do_GET()

    def do_POST(self) -> None:
        """Takes what was found."""
        self.found.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self._send(b"", "text/plain")

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Says nothing."""


def examine(folder: Path, axe: Path, browser: str) -> dict[str, dict[str, list[dict[str, str]]]]:
    """What axe-core finds in the pages of a folder, by colour scheme and page.

    Raises:
        TimeoutError: the browser did not finish.
        RuntimeError: the browser does not take the scheme that it is given.
    """
    found: Queue[dict] = Queue()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Examined, directory=str(folder), axe=axe, found=found))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/_check/"
    results = {}
    for scheme, number in SCHEMES.items():
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
            command += [f"--blink-settings=preferredColorScheme={number},{MOUSE}", "--remote-debugging-port=0", address]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                shown = found.get(timeout=LIMIT_S)
            except Empty:
                raise TimeoutError(f"{browser} did not examine the pages in {LIMIT_S} s") from None
            finally:
                process.terminate()
                process.wait()
        if shown["scheme"] != scheme:
            raise RuntimeError(f"{browser} shows pages in the {shown['scheme']} scheme, not in the {scheme} one")
        results[scheme] = shown["found"]
    server.shutdown()
    return results


def main() -> None:
    """Prints what is wrong in the pages; exits with 1 if anything is."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path, help="where the pages are")
    parser.add_argument("--axe", type=Path, required=True, metavar="FILE", help="axe.min.js of axe-core")
    arguments = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        parser.error(f"needs one of {', '.join(BROWSERS)}")
    wrong = 0
    for scheme, pages in examine(arguments.folder, arguments.axe, browser).items():
        for page, violations in pages.items():
            for each in violations:
                what = f"{page} ({scheme}): {each['rule']}: {each['help']}"
                print(f"{what}\n  {each['html']}\n  {each['why']}\n")  # noqa: T201
                wrong += 1
        print(f"{scheme}: {len(pages)} pages")  # noqa: T201
    sys.exit(f"{wrong} problems" if wrong else 0)


if __name__ == "__main__":
    main()
