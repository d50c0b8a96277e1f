"""Simulated LINCS L1000, phase I, level 3, at any size: matrix as `.gctx` or `.gct`, and the tables beside it.

12,328 genes, 978 landmarks spread among them; `inst_info` has the full release's 1,319,138 lines, of which the first
describe the profiles of the matrix. Values are multiples of 1/8, so that their sum is exact.
"""

from pathlib import Path

import h5py
import numpy as np
from tqdm.auto import tqdm

N_GENES, N_LANDMARKS = 12_328, 978
N_DESCRIBED = 1_319_138
# Of the matrix, as the Connectivity Map's own writer has them: profiles x genes
CHUNKS = (262, 1000)
# Gene lines of text that differ; the others repeat them
N_LINES = 97
STEM = "GSE92742_Broad_LINCS_{}"
MATRIX = STEM.format("Level3_INF_mlr12k_n1319138x12328")


def generate_gctx(folder: Path, n_bytes: int, seed: int) -> tuple[int, float]:
    """Writes the release with a `.gctx` of so many bytes; returns profiles and the sum of their landmark values."""
    rng = np.random.default_rng(seed)
    landmark = _write_tables(folder, rng)
    n_profiles = n_bytes // (4 * N_GENES)
    total = 0.0
    with h5py.File(folder / f"{MATRIX}.gctx", "w") as file:
        file.attrs["version"] = np.bytes_("GCTX1.0")
        matrix = file.create_dataset("/0/DATA/0/matrix", (n_profiles, N_GENES), np.float32, chunks=CHUNKS)
        for start in tqdm(range(0, n_profiles, CHUNKS[0]), "generating", unit="block"):
            stop = min(start + CHUNKS[0], n_profiles)
            values = rng.integers(0, 120, (stop - start, N_GENES), np.int8).astype(np.float32) / 8
            matrix[start:stop] = values
            total += values[:, landmark].sum(dtype=np.float64)
        file["/0/META/ROW/id"] = _gene_ids().astype("S")
        file["/0/META/COL/id"] = np.array([_profile_id(i) for i in range(n_profiles)], "S")
    return n_profiles, total


def generate_gct(folder: Path, n_bytes: int, seed: int) -> tuple[int, float]:
    """Writes the release with a `.gct` of so many bytes of float32; returns profiles and the sum of landmark values."""
    rng = np.random.default_rng(seed)
    landmark = _write_tables(folder, rng)
    n_profiles = n_bytes // (4 * N_GENES)
    lines, sums = [], []
    for _ in range(N_LINES):
        values = rng.integers(0, 120, n_profiles) / 8
        lines.append("\t".join(f"{value:.3f}" for value in values) + "\n")
        sums.append(values.sum())
    with (folder / f"{MATRIX}.gct").open("w") as file:
        ids = "\t".join(_profile_id(i) for i in range(n_profiles))
        file.write(f"#1.2\n{N_GENES}\t{n_profiles}\nNAME\tDescription\t{ids}\n")
        for i, gene in enumerate(tqdm(_gene_ids(), MATRIX, unit="gene")):
            file.write(f"{gene}\tna\t")
            file.write(lines[i % N_LINES])
    return n_profiles, float(sum(sums[i % N_LINES] for i in np.flatnonzero(landmark)))


def _gene_ids() -> np.ndarray:
    return np.arange(1000, 1000 + N_GENES).astype(str)


def _profile_id(i: int) -> str:
    return f"CPC{i // 384:06d}_A375_6H_X1_B5:{i % 384:03d}"


def _write_tables(folder: Path, rng: np.random.Generator) -> np.ndarray:
    """Writes the tables; returns (genes,) flags of the landmarks."""
    landmark = rng.permutation(np.arange(N_GENES) < N_LANDMARKS)
    with (folder / f"{STEM.format('gene_info')}.txt").open("w") as file:
        file.write("pr_gene_id\tpr_gene_symbol\tpr_gene_title\tpr_is_lm\tpr_is_bing\n")
        file.writelines(f"{g}\tGENE{g}\tgene {g}\t{lm:d}\t1\n" for g, lm in zip(_gene_ids(), landmark, strict=True))
    with (folder / f"{STEM.format('pert_info')}.txt").open("w") as file:
        file.write("pert_id\tpert_iname\tpert_type\tcanonical_smiles\nDMSO\tDMSO\tctl_vehicle\tCS(C)=O\n")
    with (folder / f"{STEM.format('inst_info')}.txt").open("w") as file:
        file.write(
            "inst_id\trna_plate\trna_well\tpert_id\tpert_iname\tpert_type\tpert_dose\tpert_dose_unit\tpert_time\t"
            "pert_time_unit\tcell_id\n"
        )
        for i in range(N_DESCRIBED):
            drug = i % 20_413
            file.write(
                f"{_profile_id(i)}\tCPC{i // 384:06d}_A375_6H_X1\tA{i % 24:02d}\tBRD-K{drug:08d}\tcompound {drug}\t"
                f"trt_cp\t{i % 50 / 10}\tum\t6\th\tA375\n"
            )
    return landmark
