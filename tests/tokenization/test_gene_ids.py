import numpy as np

from cellglot.tokenization.gene_ids import GeneResolver, canonical_id

VOCABULARY = ["ENSG00000000003", "ENSG00000141510", "C1orf112"]
ALIASES = {"TP53": "ENSG00000141510", "p53": "ENSG00000141510", "TSPAN6": "ENSG00000000003", "GONE": "ENSG00000999999"}


def test_versions_case_spaces_and_aliases_resolve():
    names = ["ENSG00000141510.18", "ensg00000141510", " ENSG00000141510 ", "TP53", "tp53", "P53", "C1ORF112"]
    np.testing.assert_array_equal(GeneResolver(VOCABULARY, ALIASES).match(names).index_g, [1, 1, 1, 1, 1, 1, 2])


def test_unknown_names_and_aliases_of_unknown_genes_do_not_resolve():
    match = GeneResolver(VOCABULARY, ALIASES).match(["GONE", "", "ENSG00000000004", "nan"])
    assert match.n_matched == 0


def test_only_ensembl_ids_change():
    assert canonical_id("ENSMUSG00000051951.5") == "ENSMUSG00000051951"
    assert canonical_id(" ensg00000141510") == "ENSG00000141510"
    for name in ("RP11-206L10.9", "C1orf112", "ENSG00000182378.13_PAR_Y"):
        assert canonical_id(name) == name


def test_upper_case_that_two_genes_share_needs_the_exact_spelling():
    resolver = GeneResolver(["g1", "g2"], {"Abc": "g1", "aBC": "g2"})
    np.testing.assert_array_equal(resolver.match(["Abc", "aBC", "ABC"]).index_g, [0, 1, -1])


def test_an_alias_of_one_vocabulary_gene_for_another_holds_in_every_spelling():
    resolver = GeneResolver(VOCABULARY, {"ENSG00000000003": "ENSG00000141510"})
    np.testing.assert_array_equal(
        resolver.match(["ENSG00000000003", "ENSG00000000003.2", "ensg00000000003"]).index_g, 1
    )


def test_columns_of_one_gene_are_counted_as_collapsed():
    match = GeneResolver(VOCABULARY, ALIASES).match(["TP53", "ENSG00000141510", "p53", "TSPAN6"])
    assert (match.n_matched, match.n_collapsed) == (4, 2)


def test_a_mouse_file_is_told_from_a_wrong_column():
    resolver = GeneResolver(VOCABULARY)
    mouse = resolver.match(["ENSMUSG00000000001", "ENSMUSG00000000003", "Gnai3"])
    assert "mouse" in resolver.explain_no_match(mouse)
    symbols = resolver.match(["Gnai3", "TP53", "ACTB", "CD4"])
    message = resolver.explain_no_match(symbols)
    assert "0 of 4" in message
    assert "'Gnai3', 'TP53', 'ACTB'" in message
    assert "'ENSG00000000003'" in message
