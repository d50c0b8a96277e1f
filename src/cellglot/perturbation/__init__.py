"""In silico perturbation with Geneformer: what changes in a cell's embeddings when a gene is removed or moved.

`cellglot.perturb` has the public functions and the command line; here are their parts: `edits` (rankings), `targets`
(which genes, in which cells), `cells` (input), `effects` (embeddings and cosines), `gradient` (their first-order
estimates), `states`, `plan`, `run` (streaming and restart), `statistics` and `streamed_means` (of more rows than fit in
memory), `figures`, and for `command_line` `summary`, which writes the tables and figures of a folder.

Source: Theodoris et al., Nature 2023, Methods, "In silico perturbation".
"""
