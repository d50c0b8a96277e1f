"""In silico perturbation with Geneformer: what changes in a cell's embeddings when a gene is removed or moved.

`cellglot.perturb` has the public functions and the command line; here are their parts: `edits` (rankings), `targets`
(which genes, in which cells), `cells` (input), `effects` (embeddings and cosines), `states`, `plan`, `run`
(streaming and restart), `statistics`, `figures` and `command_line`.

Source: Theodoris et al., Nature 2023, Methods, "In silico perturbation".
"""
