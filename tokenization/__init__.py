"""From cells to tokens: gene identifiers, count matrices, medians and the rank-value tokenizer."""
