"""Drug response training at scale: a `.gctx` of 100,000 made-up L1000 profiles streamed; steps of the base recipes.

    python benchmarks/drug_response_streaming.py --json benchmarks/results/drug_response_streaming.json

Stage 1 of the small model on files of --profiles profiles x 978 genes: reading, aligning and storing them, then some
steps of masked training on the stored ones; if memory is bounded, the larger file takes no more of the process's own.
The base recipes (BERT-base, a token a gene) do --steps steps on the real wells of HT115 (folder CELLGLOT_DATA, else
../shared/data), with their own settings but fewer profiles at a time. Every job is a process of its own.
"""

import argparse
import json
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import h5py
import numpy as np
from drug_response_data import FILES, ROOT
from measure import answer_as_contender, machine, print_table, run_contender, save_results
from tqdm.auto import tqdm

N_GENES, N_LINES, N_DRUGS, WELLS_OF_PLATE = 978, 23, 997, 380
PROFILES_AT_ONCE = 4_000
RECIPES = ROOT / "train" / "recipes"


def write_gctx(path: Path, n_profiles: int, seed: int) -> None:
    """Profiles of 23 lines on plates of 380 wells, 20 of them vehicle: line + drug x log dose + noise, in log2."""
    rng = np.random.default_rng(seed)
    lines, drugs = 8 + 2 * rng.normal(size=(N_LINES, N_GENES)), 0.3 * rng.normal(size=(N_DRUGS, N_GENES))
    well = np.arange(n_profiles)
    plate = well // WELLS_OF_PLATE
    control, line = well % WELLS_OF_PLATE < 20, plate % N_LINES
    drug, dose = rng.integers(0, N_DRUGS, n_profiles), np.where(control, -666, rng.choice([0.1, 1, 10], n_profiles))
    with h5py.File(path, "w") as file:
        matrix = file.create_dataset("/0/DATA/0/matrix", (n_profiles, N_GENES), np.float32, chunks=(262, N_GENES))
        for start in tqdm(range(0, n_profiles, PROFILES_AT_ONCE), "writing", unit="block"):
            rows = slice(start, start + PROFILES_AT_ONCE)
            effect = drugs[drug[rows]] * np.where(control[rows], 0, np.log10(10 * np.abs(dose[rows])))[:, None]
            noise = 0.5 * rng.standard_normal((len(effect), N_GENES), dtype=np.float32)
            matrix[rows] = lines[line[rows]] + effect + noise
        columns = {
            "id": [f"well{i}" for i in well],
            "pert_type": np.where(control, "ctl_vehicle", "trt_cp"),
            "pert_iname": np.where(control, "DMSO", np.char.add("drug", drug.astype(str))),
            "cell_id": np.char.add("line", line.astype(str)),
            "pert_dose_unit": np.where(control, "-666", "um"),
            "rna_plate": np.char.add("plate", plate.astype(str)),
        }
        for name, values in columns.items():
            file[f"/0/META/COL/{name}"] = np.asarray(values).astype("S")
        file["/0/META/COL/pert_dose"] = dose
        file["/0/META/ROW/id"] = np.array([str(100 + i) for i in range(N_GENES)], "S")


def stream(data: str, output: str, steps: int) -> dict[str, Any]:
    """Stage 1 of the small model on a file; seconds until its profiles are stored, and of the training steps."""
    from cellglot.train.pretrain import main

    options = "--method drug_response --preset small --batch_size 2048 --max_validation_profiles 256 --report False"
    begun = time.time()
    main([*options.split(), "--max_steps", str(steps), "--data", data, "--output", output])
    report = json.loads((Path(output) / "report.json").read_text())
    stored = (Path(output) / "data" / "data.json").stat().st_mtime
    return {
        "storing_seconds": stored - begun,
        "training_seconds": report["seconds"],
        "training_profiles": 2048 * report["steps"],
        "validation_loss": report["validation_loss"],
        "own_memory_mb": _own_memory_mb(),
    }


def _own_memory_mb() -> float | None:
    """Memory of this process now, in MB, without the pages of files that it has mapped; Linux only."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024 / 1e6


def base(script: str, recipe: str, options: dict[str, Any]) -> dict[str, Any]:
    """Some steps of a base recipe on real wells."""
    from cellglot.train import finetune, pretrain

    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    {"pretrain": pretrain, "finetune": finetune}[script].main(
        ["--recipe", str(RECIPES / recipe), "--data", str(FILES["HT115"]), *words]
    )
    report = json.loads((Path(options["output"]) / "report.json").read_text())
    log = [json.loads(line) for line in (Path(options["output"]) / "metrics.jsonl").read_text().splitlines()]
    return {
        "parameters": report["n_parameters"],
        "seconds_per_step": report["seconds"] / report["steps"],
        "losses": [line["loss"] for line in log if "loss" in line],
    }


CONTENDERS = {"stream": stream, "base": base}


def main() -> None:
    answer_as_contender(CONTENDERS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profiles", type=int, nargs="*", default=[25_000, 100_000], help="profiles of each file")
    parser.add_argument("--stream-steps", type=int, default=10, help="steps of 2,048 profiles on each file")
    parser.add_argument("--steps", type=int, default=2, help="steps of each base recipe; 0: leave them out")
    parser.add_argument("--base-profiles", type=int, default=1, help="profiles of a step of the base recipes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    # Saved part by part: the base recipes take minutes.
    record: dict[str, Any] = {"profiles": args.profiles, "genes": N_GENES, "base_profiles": args.base_profiles}
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    with TemporaryDirectory() as name:
        folder = Path(name)
        for n in args.profiles:
            write_gctx(folder / "profiles.gctx", n, args.seed)
            arguments = {"data": str(folder / "profiles.gctx"), "output": str(folder / f"run-{n}")}
            found = run_contender(__file__, "stream", {**arguments, "steps": args.stream_steps})
            found["stored_profiles_per_second"] = n / found["storing_seconds"]
            found["trained_profiles_per_second"] = found["training_profiles"] / found["training_seconds"]
            record |= {f"{figure}_{n}": value for figure, value in found.items()}
            save_results(record | machine(), args.json)
        plain = {"batch_size": args.base_profiles, "max_steps": args.steps, "log_every": 1}
        only_train = {"report": False, "max_validation_profiles": 1}
        stages = {
            "base_pretraining": ("pretrain", "drug_response_base.yaml", only_train),
            "base_fine_tuning": ("finetune", "finetune_drug_response_base.yaml", {"hold_out_drugs": 0}),
        }
        for stage, (script, recipe, options) in stages.items() if args.steps else ():
            options = {**plain, **options, "output": str(folder / stage)}
            if stage == "base_fine_tuning":
                options["model"] = str(folder / "base_pretraining" / "model")
            found = run_contender(__file__, "base", {"script": script, "recipe": recipe, "options": options})
            record |= {f"{stage}_{figure}": value for figure, value in found.items()}
            save_results(record | machine(), args.json)
    print_table(["figure", "value"], list(record.items()))


if __name__ == "__main__":
    main()
