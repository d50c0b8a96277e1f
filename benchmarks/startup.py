"""What `import cellglot` adds to `import transformers`, and how long a tokenizer takes to load.

    python benchmarks/startup.py --json benchmarks/results/startup.json

Fresh processes, in turns. Each imports the same parts of transformers first, so that what is lazy there is not counted:
`import transformers` alone, and `from transformers import AutoModel`, after which cellglot's classes are registered.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import answer_as_contender, interleaved, machine, median, print_table, save_results

CONTENDERS = ("transformers", "cellglot", "transformers_auto", "cellglot_auto", "tokenizer")
DATA = Path(os.environ.get("CELLGLOT_DATA", "../shared/data"))
STATEMENTS = {
    "transformers": "import transformers",
    "cellglot": "import transformers, cellglot",
    "transformers_auto": "from transformers import AutoConfig, AutoModel",
    "cellglot_auto": "import cellglot\nfrom transformers import AutoConfig, AutoModel",
}
TIMED = "import time\nstart = time.perf_counter()\n{statement}\nprint(time.perf_counter() - start)"


def imported(name: str) -> dict[str, Any]:
    """Seconds the statement takes in a process that has imported nothing."""
    code = TIMED.format(statement=STATEMENTS[name])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {"seconds": float(done.stdout)}


def tokenizer(folder: str) -> dict[str, Any]:
    """Seconds of the first load and of a second one, of V1's vocabulary."""
    import time

    from cellglot import RankValueTokenizer

    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        RankValueTokenizer.from_pretrained(folder)
        seconds.append(time.perf_counter() - start)
    return {"first": seconds[0], "second": seconds[1]}


def main() -> None:
    importers = {name: lambda folder, name=name: imported(name) for name in STATEMENTS}
    answer_as_contender({**importers, "tokenizer": tokenizer})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=Path, default=DATA / "geneformer/vocabulary_v1.tsv.gz")
    parser.add_argument("--aliases", type=Path, default=DATA / "geneformer/gene_aliases_v1.tsv.gz")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()

    from cellglot import RankValueTokenizer

    with tempfile.TemporaryDirectory() as folder:
        RankValueTokenizer.from_vocabulary(options.vocabulary, layout="v1", aliases=options.aliases).save_pretrained(
            folder
        )
        answers = interleaved(__file__, CONTENDERS, {"folder": folder}, repeats=options.repeats)
    results: dict[str, Any] = {f"{name}_seconds": median(answers[name], "seconds") for name in STATEMENTS}
    results["added_seconds"] = results["cellglot_seconds"] - results["transformers_seconds"]
    results["added_seconds_with_auto"] = results["cellglot_auto_seconds"] - results["transformers_auto_seconds"]
    results["tokenizer_first_load_ms"] = 1e3 * median(answers["tokenizer"], "first")
    results["tokenizer_load_ms"] = 1e3 * median(answers["tokenizer"], "second")
    print_table(
        ["statement", "seconds"],
        [[code.replace("\n", "; "), results[f"{n}_seconds"]] for n, code in STATEMENTS.items()],
    )
    print(f"import cellglot adds {results['added_seconds']:.3f} s; ", end="")
    print(f"{results['added_seconds_with_auto']:.3f} s where AutoModel is imported too")
    print(f"tokenizer: {results['tokenizer_first_load_ms']:.0f} ms, again {results['tokenizer_load_ms']:.0f} ms")
    save_results({**results, "repeats": options.repeats, **machine()}, options.json)


if __name__ == "__main__":
    main()
