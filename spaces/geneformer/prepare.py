"""Trains the small model of this Space on the PBMCs that scanpy ships, and lays out what app.py opens.

    python spaces/geneformer/prepare.py            # three minutes on two CPU cores

Needs `cellglot[train]`. The folder is a complete model directory, plus `about.json` and `examples.h5ad`.
"""

import argparse
import json
from pathlib import Path

from cellglot.datasets_scripts.pbmc import pbmc_cells
from cellglot.serving import keep, preparing
from cellglot.train import finetune, pretrain

HERE = Path(__file__).parent
RECIPE = Path(finetune.__file__).parent / "recipes" / "finetune_pbmc.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "model")
    parser.add_argument("--pretrain-epochs", type=int, help="fewer make a quicker, worse model")
    parser.add_argument("--finetune-epochs", type=int)
    options = parser.parse_args()
    with preparing(options.output) as work:
        first, second = f"{work}/pretrained", f"{work}/cell-types"
        epochs = ["--epochs", str(options.pretrain_epochs)] if options.pretrain_epochs else []
        pretrain.main(["--output", first, *epochs])
        epochs = ["--epochs", str(options.finetune_epochs)] if options.finetune_epochs else []
        finetune.main(["--recipe", str(RECIPE), "--model", f"{first}/model", "--output", second, *epochs])
        bundle = Path(second) / "model"
        pbmc_cells().write_h5ad(bundle / "examples.h5ad", compression="gzip")
        figures = json.loads((bundle / "metrics.json").read_text())["metrics"]["cell_type"]
        about = {
            "examples": "700 human blood cells (PBMC) of Zheng et al. 2017, as scanpy ships them.",
            "held_out": {
                "n": figures["this model"]["n"],
                "model": figures["this model"]["accuracy"],
                "logistic regression": figures["logistic regression"]["accuracy"],
            },
        }
        (bundle / "about.json").write_text(json.dumps(about, indent=2))
        keep(bundle, options.output)
    print(f"Start the Space: python {HERE / 'app.py'}")


if __name__ == "__main__":
    main()
