"""Edge tables from files of the publishers' layouts: every edge comes out, with the genes it joins."""

import gzip
import zipfile
from pathlib import Path
from urllib.parse import unquote

import datasets
import numpy as np
import pandas as pd
import pytest

from cellglot.datasets_scripts import gene_networks
from cellglot.datasets_scripts.corpus import Source, command_line
from cellglot.datasets_scripts.corpus_errors import CorpusError
from cellglot.datasets_scripts.gene_networks import BIOGRID_ZIP, MGI_TABLE, STRING_INFO, STRING_LINKS, GeneNetworks

# All 37 columns of a .tab3.txt file
BIOGRID_HEADER = [
    "#BioGRID Interaction ID",
    *(f"{what} Interactor {side}" for what in ("Entrez Gene", "BioGRID ID", "Systematic Name") for side in "AB"),
    *(f"{what} Interactor {side}" for what in ("Official Symbol", "Synonyms") for side in "AB"),
    *("Experimental System", "Experimental System Type", "Author", "Publication Source"),
    *("Organism ID Interactor A", "Organism ID Interactor B", "Throughput", "Score"),
    *("Modification", "Qualifications", "Tags", "Source Database"),
    *(f"{what} Accessions Interactor {side}" for side in "AB" for what in ("SWISS-PROT", "TREMBL", "REFSEQ")),
    *("Ontology Term IDs", "Ontology Term Names", "Ontology Term Categories"),
    *("Ontology Term Qualifier IDs", "Ontology Term Qualifier Names", "Ontology Term Types"),
    *("Organism Name Interactor A", "Organism Name Interactor B"),
]
ENSEMBL_HEADER = [
    "Gene stable ID",
    "Gene name",
    "Mouse gene stable ID",
    "Mouse gene name",
    "Mouse homology type",
    "Mouse orthology confidence [0 low, 1 high]",
]
MGI_HEADER = [
    *("DB Class Key", "Common Organism Name", "NCBI Taxon ID", "Symbol", "EntrezGene ID", "Mouse MGI ID", "HGNC ID"),
    *("OMIM Gene ID", "Genetic Location", "Genome Coordinates (mouse: GRCm39 human: GRCh38)"),
    *("Nucleotide RefSeq IDs", "Protein RefSeq IDs", "SWISS_PROT IDs"),
]


@pytest.fixture
def publisher(file_server):
    file_server.serve(GeneNetworks)
    return file_server


def built(tmp_path: Path, config: str, data_dir: Path | None = None) -> pd.DataFrame:
    """The edges as a user loads them."""
    builder = GeneNetworks(cache_dir=str(tmp_path / "cache"), config_name=config, data_dir=data_dir and str(data_dir))
    folder = builder.prepare(tmp_path / "out")
    edges = datasets.load_dataset(str(folder), split="train").to_pandas()
    assert isinstance(edges, pd.DataFrame)
    streamed = next(iter(datasets.load_dataset(str(folder), split="train", streaming=True)))
    assert list(streamed) == list(edges)
    return edges


def lines(rows: list[list], separator: str = "\t") -> bytes:
    return "".join(separator.join(map(str, row)) + "\n" for row in rows).encode()


def publish_string(folder: Path, edges: list[list], names: dict[str, str]) -> None:
    info = [["#string_protein_id", "preferred_name", "protein_size", "annotation"]]
    info += [[protein, name, 100, 'annotation with "quotes"; and more'] for protein, name in names.items()]
    (folder / STRING_LINKS).write_bytes(gzip.compress(lines([["protein1", "protein2", "combined_score"], *edges], " ")))
    (folder / STRING_INFO).write_bytes(gzip.compress(lines(info)))


NAMES = {"9606.ENSP00000000233": "ARF5", "9606.ENSP00000356607": "RALGPS2", "9606.ENSP00000427567": "NA"}
EDGES = [
    ["9606.ENSP00000000233", "9606.ENSP00000356607", 173],
    ["9606.ENSP00000356607", "9606.ENSP00000000233", 173],
    ["9606.ENSP00000000233", "9606.ENSP00000427567", 0],
    ["9606.ENSP00000427567", "9606.ENSP00000000233", 1000],
]


def test_string_edges_carry_proteins_genes_and_integer_scores(publisher, tmp_path):
    publish_string(publisher.folder, EDGES, NAMES)
    found = built(tmp_path, "string")
    assert found["combined_score"].dtype == np.int32
    expected = [[a.split(".")[1], b.split(".")[1], NAMES[a], NAMES[b], score] for a, b, score in EDGES]
    assert found.to_numpy().tolist() == expected


def test_string_in_many_blocks_equals_pandas(publisher, tmp_path, monkeypatch):
    monkeypatch.setattr(gene_networks, "BLOCK_BYTES", 997)
    rng = np.random.default_rng(0)
    names = {f"9606.ENSP{i:011d}": f"GENE{i}" for i in range(53)}
    pairs = rng.choice(list(names), size=(499, 2))
    publish_string(
        publisher.folder, [[a, b, s] for (a, b), s in zip(pairs, rng.integers(1001, size=499), strict=True)], names
    )
    source = pd.read_csv(publisher.folder / STRING_LINKS, sep=" ")
    found = built(tmp_path, "string")
    assert found["combined_score"].tolist() == source["combined_score"].tolist()
    for side, column in (("a", "protein1"), ("b", "protein2")):
        assert ("9606." + found[f"protein_{side}"]).tolist() == source[column].tolist()
        assert found[f"gene_{side}"].tolist() == source[column].map(names).tolist()


def test_another_version_in_the_data_folder_will_do(publisher, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    publish_string(folder, EDGES, NAMES)
    (folder / STRING_LINKS).rename(folder / "9606.protein.links.v11.0.txt.gz")
    info = gzip.decompress((folder / STRING_INFO).read_bytes())
    (folder / "9606.protein.info.v11.0.txt").write_bytes(info.replace(b"#string_protein_id", b"protein_external_id"))
    (folder / STRING_INFO).unlink()
    assert len(built(tmp_path, "string", folder)) == 4
    assert publisher.downloads == []
    (folder / "9606.protein.links.v12.5.txt.gz").write_bytes(b"")
    with pytest.raises(CorpusError, match=r"holds 9606\.protein\.links\.v11\.0.* leave one of them"):
        built(tmp_path / "again", "string", folder)


def biogrid_row(**values) -> list:
    row = dict.fromkeys(BIOGRID_HEADER, "-")
    row |= {
        "#BioGRID Interaction ID": 103,
        "Entrez Gene Interactor A": 6416,
        "Entrez Gene Interactor B": 2318,
        "Official Symbol Interactor A": "MAP2K4",
        "Official Symbol Interactor B": "FLNC",
        "Experimental System": "Two-hybrid",
        "Experimental System Type": "physical",
        "Publication Source": "PUBMED:9006895",
        "Organism ID Interactor A": 9606,
        "Organism ID Interactor B": 9606,
        "Throughput": "Low Throughput",
        "Qualifications": 'said "so" in the text',
    }
    return list((row | values).values())


def publish_biogrid(
    path: Path, rows: list[list], member: str = "BIOGRID-ORGANISM-Homo_sapiens-4.4.241.tab3.txt"
) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("BIOGRID-ORGANISM-Mus_musculus-4.4.241.tab3.txt", lines([BIOGRID_HEADER]))
        archive.writestr(member, lines([BIOGRID_HEADER, *rows]))


@pytest.mark.parametrize("zipped", [True, False])
def test_biogrid_edges_come_out_of_the_archive_of_all_organisms(publisher, tmp_path, zipped):
    assert len(BIOGRID_HEADER) == 37
    virus = {"Organism ID Interactor B": 2697049, "Entrez Gene Interactor B": "-", "Score": "0.75"}
    rows = [biogrid_row(), biogrid_row(**virus, **{"#BioGRID Interaction ID": 4000000001})]
    data_dir = None
    if zipped:
        publish_biogrid(publisher.folder / BIOGRID_ZIP, rows)
    else:
        data_dir = tmp_path / "mine"
        data_dir.mkdir()
        (data_dir / "BIOGRID-ORGANISM-Homo_sapiens-4.4.200.tab3.txt").write_bytes(lines([BIOGRID_HEADER, *rows]))
    found = built(tmp_path, "biogrid", data_dir)
    first, second = found.astype(object).where(found.notna(), None).to_dict("records")
    assert first == {
        "interaction_id": 103,
        "gene_a": "MAP2K4",
        "gene_b": "FLNC",
        "entrez_a": 6416,
        "entrez_b": 2318,
        "taxon_a": 9606,
        "taxon_b": 9606,
        "experimental_system": "Two-hybrid",
        "experimental_system_type": "physical",
        "publication": "PUBMED:9006895",
        "throughput": "Low Throughput",
        "score": None,
    }
    assert second == first | {"interaction_id": 4000000001, "taxon_b": 2697049, "entrez_b": None, "score": 0.75}


@pytest.mark.realdata
def test_real_biogrid_edges_come_back(publisher, real_data, tmp_path):
    edges = pd.read_csv(real_data / "graph" / "pin_biogrid.tsv.gz", sep="\t", keep_default_na=False).iloc[::97]
    sides = ("Official Symbol Interactor A", "Official Symbol Interactor B")
    rows = [biogrid_row(**dict(zip(sides, pair, strict=True))) for pair in edges.to_numpy()]
    publish_biogrid(publisher.folder / BIOGRID_ZIP, rows)
    np.testing.assert_array_equal(built(tmp_path, "biogrid")[["gene_a", "gene_b"]], edges)


@pytest.mark.realdata
def test_real_string_edges_come_back(publisher, real_data, tmp_path):
    edges = pd.read_csv(real_data / "graph" / "pin_string.tsv.gz", sep="\t", keep_default_na=False)
    proteins = {gene: f"9606.ENSP{i:011d}" for i, gene in enumerate(pd.unique(edges.to_numpy().ravel()))}
    links = [[proteins[a], proteins[b], 801] for a, b in edges.to_numpy()]
    publish_string(publisher.folder, links, {protein: gene for gene, protein in proteins.items()})
    np.testing.assert_array_equal(built(tmp_path, "string")[["gene_a", "gene_b"]], edges)


PAIRS = [
    ["ENSG00000198888", "MT-ND1", "ENSMUSG00000064341", "mt-Nd1", "ortholog_one2one", "1"],
    ["ENSG00000196611", "MMP1", "ENSMUSG00000043089", "Mmp1a", "ortholog_one2many", "0"],
    ["ENSG00000196611", "MMP1", "ENSMUSG00000041620", "Mmp1b", "ortholog_one2many", "0"],
    ["ENSG00000223972", "DDX11L1", "", "", "", ""],
    ["ENSG00000270112", "", "ENSMUSG00000099999", "NA", "ortholog_many2many", "1"],
]


def test_ensembl_orthologs_are_the_pairs_with_a_flag(publisher, tmp_path):
    (publisher.folder / "mart_export.txt").write_bytes(lines([ENSEMBL_HEADER, *PAIRS, ["[success]"]]))
    found = built(tmp_path, "orthologs_ensembl")
    expected = [[*(value or None for value in p[:5]), p[5] == "1", p[4] == "ortholog_one2one"] for p in PAIRS if p[2]]
    assert found.to_numpy().tolist() == expected


def test_the_query_asks_for_the_columns_that_are_read_and_for_a_stamp():
    query = unquote(gene_networks.biomart_query())
    assert query.count("<Attribute ") == len(ENSEMBL_HEADER)
    assert 'completionStamp="1"' in query


def test_the_query_arrives_as_it_was_written(publisher, tmp_path, monkeypatch):
    monkeypatch.setattr(gene_networks, "BIOMART", f"{publisher.url}/martservice?query=")
    query = gene_networks.biomart_query()
    monkeypatch.setattr(GeneNetworks, "SOURCES", {"orthologs_ensembl": [Source("mart_export.txt", query)]})
    (publisher.folder / "martservice").write_bytes(lines([ENSEMBL_HEADER, *PAIRS, ["[success]"]]))
    assert len(built(tmp_path, "orthologs_ensembl")) == 4
    assert [unquote(path) for path in publisher.downloads] == [unquote(query).removeprefix(f"{publisher.url}/")]


def test_symbols_alone_are_one_to_one_if_neither_repeats(publisher, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    pairs = [["A", "a"], ["B", "b1"], ["B", "b2"], ["C", "c"], ["D", "c"], ["", "e"]]
    (folder / "mart_export.txt").write_bytes(lines([["Gene name", "Mouse gene name"], *pairs]))
    found = built(tmp_path, "orthologs_ensembl", folder)
    assert found[["human_symbol", "mouse_symbol"]].to_numpy().tolist() == pairs[:5]
    assert found["one_to_one"].tolist() == [True, False, False, False, False]
    assert found[["human_gene_id", "homology_type", "high_confidence"]].isna().all(axis=None)


@pytest.mark.realdata
def test_real_ensembl_orthologs_come_back(publisher, real_data, tmp_path):
    source = pd.read_csv(real_data / "graph" / "orthologs_ensembl105_human2mouse.csv.gz", header=None, dtype=str)
    folder = tmp_path / "mine"
    folder.mkdir()
    source.to_csv(folder / "mart_export.txt", sep="\t", index=False, header=["Gene name", "Mouse gene name"])
    found = built(tmp_path, "orthologs_ensembl", folder)
    np.testing.assert_array_equal(found[["human_symbol", "mouse_symbol"]], source.dropna())
    # Of 25,355 lines, 498 name no human gene; 16,757 after the manifest that comes with the file
    assert len(found) == 25_355 - 498
    assert found["one_to_one"].sum() == 16_757


@pytest.mark.realdata
def test_real_orthologs_with_ids_come_back(publisher, real_data, tmp_path):
    source = pd.read_csv(real_data / "graph" / "orthologs_mouse_human_ewce.tsv.gz", sep="\t", dtype=str)
    folder = tmp_path / "mine"
    folder.mkdir()
    columns = ["Gene.stable.ID.1", "HGNC.symbol", "Gene.stable.ID", "MGI.symbol"]
    source[columns].to_csv(folder / "mart_export.txt", sep="\t", index=False, header=ENSEMBL_HEADER[:4])
    found = built(tmp_path, "orthologs_ensembl", folder)
    ours = found[["human_gene_id", "human_symbol", "mouse_gene_id", "mouse_symbol"]]
    assert len(ours) == 15_604
    np.testing.assert_array_equal(ours.fillna(""), source[columns].fillna(""))


def mgi_gene(key: int, species: str, symbol: str, entrez: int) -> list:
    mouse = species == "mouse, laboratory"
    ids = [f"MGI:{entrez}", ""] if mouse else ["", f"HGNC:{entrez}"]
    return [key, species, 10090 if mouse else 9606, symbol, entrez, *ids, *[""] * 6]


@pytest.mark.parametrize("key", ["DB Class Key", "HomoloGene ID"])
def test_mgi_classes_become_pairs(publisher, tmp_path, key):
    genes = [
        mgi_gene(45916481, "mouse, laboratory", "Gdnf", 14573),
        mgi_gene(45916481, "human", "GDNF", 2668),
        mgi_gene(45916482, "mouse, laboratory", "Mmp1a", 83995),
        mgi_gene(45916482, "mouse, laboratory", "Mmp1b", 83996),
        mgi_gene(45916482, "human", "MMP1", 4312),
        mgi_gene(45916483, "mouse, laboratory", "Alone", 1),
    ]
    (publisher.folder / MGI_TABLE).write_bytes(lines([[key, *MGI_HEADER[1:]], *genes]))
    found = built(tmp_path, "orthologs_mgi")
    assert found.to_dict("records") == [
        {
            "homology_class": key,
            "human_symbol": human,
            "mouse_symbol": mouse,
            "hgnc_id": f"HGNC:{human_entrez}",
            "mgi_id": f"MGI:{mouse_entrez}",
            "human_entrez": human_entrez,
            "mouse_entrez": mouse_entrez,
            "one_to_one": alone,
        }
        for key, human, mouse, human_entrez, mouse_entrez, alone in [
            (45916481, "GDNF", "Gdnf", 2668, 14573, True),
            (45916482, "MMP1", "Mmp1a", 4312, 83995, False),
            (45916482, "MMP1", "Mmp1b", 4312, 83996, False),
        ]
    ]


@pytest.mark.parametrize(
    ("edges", "names", "message"),
    [
        ([*EDGES, ["9606.ENSP00000000233", "9606.ENSP1", 5]], NAMES, r"no name for 1 proteins \(e\.g\. '9606\.ENSP1'"),
        ([*EDGES, [*EDGES[0][:2], 1001]], NAMES, r"combined_score 1001; expected integers in 0\.\.1000"),
        ([*EDGES, [*EDGES[0][:2], "0.5"]], NAMES, r"invalid value '0\.5'"),
        ([*EDGES, EDGES[0][:2]], NAMES, "Row #6: Expected 3 columns, got 2"),
        ([["10090.ENSMUSP1", EDGES[0][1], 5]], {**NAMES, "10090.ENSMUSP1": "Arf5"}, "'10090.ENSMUSP1' are no human"),
    ],
)
def test_bad_string_edges_are_refused(publisher, tmp_path, edges, names, message):
    publish_string(publisher.folder, edges, names)
    with pytest.raises(CorpusError, match=message):
        built(tmp_path, "string")
    assert not (tmp_path / "out" / "string").exists()


def test_a_missing_column_is_named_with_what_is_there(publisher, tmp_path):
    header = [name.replace("Publication Source", "Pubmed ID") for name in BIOGRID_HEADER]
    with zipfile.ZipFile(publisher.folder / BIOGRID_ZIP, "w") as archive:
        archive.writestr("BIOGRID-ORGANISM-Homo_sapiens-4.4.241.tab3.txt", lines([header, biogrid_row()]))
    with pytest.raises(CorpusError, match=r"no column 'Publication Source'; it has #BioGRID Interaction ID"):
        built(tmp_path, "biogrid")


def test_an_archive_without_the_human_file_is_refused(publisher, tmp_path):
    publish_biogrid(publisher.folder / BIOGRID_ZIP, [], member="README.txt")
    with pytest.raises(CorpusError, match=r"expected one file .*Homo_sapiens.*found 0"):
        built(tmp_path, "biogrid")


def test_a_file_that_is_no_text_is_refused(publisher, tmp_path):
    publish_string(publisher.folder, EDGES, NAMES)
    (publisher.folder / STRING_INFO).write_bytes(bytes(range(255, 0, -1)))
    with pytest.raises(CorpusError, match=r"no column '#string_protein_id', 'preferred_name'; it has "):
        built(tmp_path, "string")


@pytest.mark.parametrize("name", [STRING_LINKS, STRING_INFO])
def test_truncated_gzip_is_said_to_be(publisher, tmp_path, name):
    publish_string(publisher.folder, EDGES * 1000, NAMES)
    path = publisher.folder / name
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(CorpusError, match=r"9606\.protein.* is truncated or edited"):
        built(tmp_path, "string")


def test_a_truncated_archive_is_said_to_be(publisher, tmp_path):
    publish_biogrid(publisher.folder / BIOGRID_ZIP, [biogrid_row()] * 100)
    path = publisher.folder / BIOGRID_ZIP
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CorpusError, match=r"BIOGRID.*is truncated or edited"):
        built(tmp_path, "biogrid")


@pytest.mark.parametrize(
    "content",
    [
        lines([ENSEMBL_HEADER, *PAIRS]),
        b"Query ERROR: caught BioMart::Exception::Database: Could not connect to mysql\n",
    ],
)
def test_an_incomplete_biomart_table_is_refused_and_fetched_again(publisher, tmp_path, content):
    (publisher.folder / "mart_export.txt").write_bytes(content)
    with pytest.raises(CorpusError, match=r"does not end with \[success\].* run the same command again"):
        built(tmp_path, "orthologs_ensembl")
    (publisher.folder / "mart_export.txt").write_bytes(lines([ENSEMBL_HEADER, *PAIRS, ["[success]"]]))
    assert len(built(tmp_path, "orthologs_ensembl")) == 4


def test_command_line_writes_one_card_for_networks_of_different_columns(publisher, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    publish_string(publisher.folder, EDGES, NAMES)
    publish_biogrid(publisher.folder / BIOGRID_ZIP, [biogrid_row()] * 3)
    (publisher.folder / "mart_export.txt").write_bytes(lines([ENSEMBL_HEADER, *PAIRS, ["[success]"]]))
    output = tmp_path / "out"
    for config in ("biogrid", "orthologs_ensembl", "string"):
        command_line(GeneNetworks, ["--config", config, "--output", str(output)])
    card = (output / "README.md").read_text()
    assert "Version 1.0.0 of" in card
    assert "| string/train | 4 | 173 " in card
    assert "| Two-hybrid | 3 |" in card
    for config, n_edges in (("biogrid", 3), ("orthologs_ensembl", 4), ("string", 4)):
        assert len(datasets.load_dataset(str(output), config, split="train")) == n_edges
