"""Many visitors of a Space at once: how long they wait, whether anybody gets another's result, and how memory grows.

    python benchmarks/spaces_load.py --model spaces/geneformer/model --json benchmarks/results/spaces_load.json

Serves spaces/geneformer by its own app.py. Each of --clients visitors, all at once, uploads a file of its own with a
number of cells that no other has, asks for its analysis and for one perturbation, and checks that the answers are its
own. The queue takes 64: visitors above that are told so, and come again.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import measure
import numpy as np

APP = Path(__file__).parents[1] / "spaces" / "geneformer" / "app.py"


def resident_mb(pid: int) -> float:
    """Memory of a process and its children, in MB."""
    total = 0.0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except OSError:
            continue
        if int(fields["PPid"]) == pid or status.parent.name == str(pid):
            total += float(fields.get("VmRSS", "0 kB").split()[0]) / 1000
    return total


def visit(url: str, path: Path, n_cells: int) -> dict[str, Any]:
    """One visitor: seconds until the analysis and the perturbation, and whether both were of its own cells."""
    from gradio_client import Client, handle_file

    start = time.monotonic()
    api = Client(url, verbose=False, analytics_enabled=False)
    refusals = 0
    while True:
        try:
            said, *_ = api.predict(handle_file(path), api_name="/analyse")
            break
        except Exception as error:
            # A full queue; anything else is a failure of the Space
            if "queue is full" not in str(error).lower():
                return {"error": str(error)[:200]}
            refusals += 1
            time.sleep(2)
    analysed = time.monotonic() - start
    own = f"**{n_cells} cells**" in said
    try:
        perturbed, *_ = api.predict("FTL", "delete", api_name="/perturb")
    except Exception as error:
        return {"error": str(error)[:200]}
    return {
        "analysed": analysed,
        "perturbed": time.monotonic() - start,
        "own": own and "FTL" in perturbed,
        "refusals": refusals,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=APP.parent / "model", help="folder of prepare.py")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--cells", type=int, default=100, help="of the smallest file; each next has one more")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    import anndata as ad

    cells = ad.read_h5ad(options.model / "examples.h5ad")
    with tempfile.TemporaryDirectory() as work:
        paths = {}
        for i in range(options.clients):
            n = options.cells + i
            part = cells[np.sort(np.random.default_rng(i).choice(cells.n_obs, n, replace=False))]
            paths[n] = Path(work) / f"{n}.h5ad"
            part.write_h5ad(paths[n])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        (Path(work) / "gradio").mkdir()
        environment = os.environ | {
            "CELLGLOT_SPACE_MODEL": str(options.model.resolve()),
            "GRADIO_SERVER_PORT": str(port),
            "GRADIO_TEMP_DIR": f"{work}/gradio",
        }
        url, start = f"http://127.0.0.1:{port}", time.monotonic()
        app = subprocess.Popen([sys.executable, str(APP)], env=environment, stdout=subprocess.DEVNULL)
        while True:
            try:
                urllib.request.urlopen(url, timeout=2).close()
                break
            except OSError:
                time.sleep(0.1)
        startup = time.monotonic() - start
        visit(url, paths[options.cells], options.cells)
        before = peak = resident_mb(app.pid)
        done = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.2):
                peak = max(peak, resident_mb(app.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        start = time.monotonic()
        with ThreadPoolExecutor(options.clients) as pool:
            answers = list(pool.map(lambda item: visit(url, item[1], item[0]), paths.items()))
        seconds = time.monotonic() - start
        done.set()
        watcher.join()
        after, alive = resident_mb(app.pid), app.poll() is None
        left = sum(path.is_file() for path in Path(work, "gradio").rglob("*.h5ad"))
        app.terminate()
        app.wait(30)

    good = [answer for answer in answers if "error" not in answer]
    results: dict[str, Any] = {
        **measure.machine(),
        "clients": options.clients,
        "startup_seconds": startup,
        "seconds": seconds,
        "answered": len(good),
        "own_results": sum(answer["own"] for answer in good),
        "errors": [answer["error"] for answer in answers if "error" in answer],
        "told_queue_is_full": sum(answer["refusals"] for answer in good),
        "median_seconds_to_analysis": float(np.median([answer["analysed"] for answer in good])) if good else None,
        "longest_seconds_to_both": max((answer["perturbed"] for answer in good), default=None),
        "rss_before_mb": before,
        "rss_peak_mb": peak,
        "rss_after_mb": after,
        "uploads_left": left,
        "still_running": alive,
    }
    for name, value in results.items():
        print(f"{name:28} {value}")
    if options.json:
        measure.save_results(results, options.json)


if __name__ == "__main__":
    main()
