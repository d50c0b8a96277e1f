"""Pre-trains a model of one of the methods below: `--method NAME`, or `method: NAME` in the recipe.

    accelerate launch train/pretrain.py                                        # 700 real PBMCs, minutes on a laptop
    accelerate launch train/pretrain.py --recipe train/recipes/geneformer_v1_6l.yaml --data DIR --output runs/mine
    accelerate launch train/pretrain.py --recipe train/recipes/cross_species_base.yaml \\
        --sources human=data/human_cortex mouse=data/mouse_brain
    accelerate launch train/pretrain.py --recipe train/recipes/multiome_set.yaml --cells rna.h5ad atac.h5ad
    accelerate launch train/pretrain.py --recipe train/recipes/gene_graph_pbmc.yaml --data cells.h5ad
    accelerate launch train/pretrain.py --recipe train/recipes/drug_response_small.yaml --data l1000.h5ad
    python train/pretrain.py --method cross_species --help

Leaves in the output folder: `model/` (a complete model directory: weights, config, tokenizer or processor, code, card
with figures), `metrics.jsonl`, `run.json`, `report.json`, `checkpoints/`.
"""

import importlib
import sys

from cellglot.train.config import chosen_option

# Method -> the module whose `main` trains it
METHODS = {
    "geneformer": "cellglot.train.pretrain_geneformer",
    "cross_species": "cellglot.train.pretrain_cross_species",
    "multiome": "cellglot.train.pretrain_multiome",
    "drug_response": "cellglot.train.pretrain_drug_response",
    "gene_graph": "cellglot.train.pretrain_gene_graph",
}
DEFAULT = "geneformer"


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    method = chosen_option("method", argv) or DEFAULT
    if method not in METHODS:
        sys.exit(f"pretrain.py: unknown method {method!r}; expected one of {', '.join(METHODS)}.")
    importlib.import_module(METHODS[method]).main(argv)


if __name__ == "__main__":
    main()
