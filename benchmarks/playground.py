"""The playground in Chromium, from localhost: how long it takes to start, and to answer a slider.

    python benchmarks/playground.py [--rounds 7] [--record]

The book must be built. Starting is measured in fresh profiles, from the beginning of the navigation to the first
results. An answer is measured from the slider's event to the results on the page, all charts and tables redrawn.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import shutil
import statistics
import threading
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from moe_course import records

ROOT = Path(__file__).resolve().parents[1]
HTML = ROOT / "_build" / "html"
RECORD = ROOT / "moe_course/data/records/playground.json"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
SLIDE = """async () => {
  const slider = document.querySelector('[data-for=batch]');
  const tables = document.querySelector('.pg-tables');
  const times = [];
  for (let i = 0; i < 60; i++) {
    slider.value = String(i % 13);
    const begin = performance.now();
    const shown = new Promise(done => new MutationObserver((_, seen) => {
      seen.disconnect();
      done(performance.now());
    }).observe(tables, { childList: true }));
    slider.dispatchEvent(new Event('input', { bubbles: true }));
    times.push(await shown - begin);
    await new Promise(done => setTimeout(done, 30));
  }
  return times;
}"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


def look(browser: Any, address: str) -> tuple[float, list[float]]:
    """Milliseconds until the first results, and of each answer."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector(".pg-summary p", timeout=120_000)
    start = page.evaluate(
        "performance.getEntriesByName('playground-ready')[0].startTime"
    )
    page.wait_for_timeout(500)
    times = page.evaluate(SLIDE)
    context.close()
    return start, times


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("no Chromium on this machine (Debian: apt install chromium)")
    handler = functools.partial(Quiet, directory=str(HTML))
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
        sync_playwright() as playwright,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/book/choosing/playground.html"
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        version = browser.version
        looks = [look(browser, address) for _ in range(args.rounds)]
        browser.close()
        server.shutdown()

    starts = [start for start, _ in looks]
    answers = sorted(t for _, times in looks for t in times)
    rows = [
        {
            "kind": kind,
            "browser": f"Chromium {version}",
            "samples": len(times),
            "median_ms": round(statistics.median(times), 1),
            "p95_ms": round(sorted(times)[int(0.95 * (len(times) - 1))], 1),
            "most_ms": round(max(times), 1),
        }
        for kind, times in (("start", starts), ("answer", answers))
    ]
    for row in rows:
        print(row)
    if args.record:
        command = "python benchmarks/playground.py --record"
        packages = ("playwright",)
        records.save(records.measure("playground", command, rows, packages), RECORD)


if __name__ == "__main__":
    main()
