"""What the README and the documentation show is run.

Python blocks of a page run as they stand, in order, in one namespace, in a folder that holds the files they name. The
files are cut from the bundled real cells. What costs time is shared between pages: a small model with random weights
stands for every pretrained one, a fit has one epoch, and an estimator that is fitted with the same arguments to the
same cells a second time takes the first fit over. Lines of shell blocks are checked against the real parser, extras,
make targets and scripts, and run where that is cheap. A block that cannot run here stands below a comment
``<!-- not run: REASON -->``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.conftest import ROOT

DOCS = ROOT / "docs"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "launch" / "README.md",
        *(
            path
            for path in sorted(DOCS.rglob("*.md"))
            if not {"_build", ".ipynb_checkpoints"} & set(path.parts)
        ),
    )
}
ESTIMATORS = {
    "annotate": "CellTypeAnnotator",
    "denoise": "Denoiser",
    "impute": "GeneImputer",
    "integrate": "BatchIntegrator",
    "perturb": "PerturbationPredictor",
    "samples": "SampleClassifier",
}
MODELS = ("small", "demo/model", "model")
"""What pages call a pretrained model; all of them are the one of this module."""
# Commands whose lines are run as well where the files they name are there.
RUN = ("embed", "info")
# Programs that blocks which are not run may call.
ELSEWHERE = {"docker", "gcloud", "kubectl", "mpirun", "ssh-add", "tail", "tensorboard"}


class Block(NamedTuple):
    """A fenced block of a page.

    Attributes:
        language: What it is written in.
        text: What it says.
        reason: Why it is not run; None: it is.
        line: Where it begins, from 1.
    """

    language: str
    text: str
    reason: str | None
    line: int


def blocks(page: str) -> list[Block]:
    found = []
    pattern = re.compile(
        r"^(?:[ ]*<!-- not run: (?P<reason>[^\n]*?) -->\n)?"
        r"(?P<indent>[ ]*)```(?P<language>[^\n`]*)\n(?P<text>.*?)^(?P=indent)```[ ]*$",
        re.MULTILINE | re.DOTALL,
    )
    for match in pattern.finditer(PAGES[page]):
        line = PAGES[page].count("\n", 0, match.start("language")) + 1
        text = textwrap.dedent(match["text"])
        found.append(Block(match["language"].strip(), text, match["reason"], line))
    return found


WITH_PYTHON = [page for page in PAGES if any(b.language == "python" for b in blocks(page))]
WITH_SHELL = [page for page in PAGES if any(b.language == "bash" for b in blocks(page))]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_kind_that_is_checked(page):
    for block in blocks(page):
        known = block.language in ("python", "bash", "text") or block.language.startswith("{")
        assert known, f"{page}:{block.line}: {block.language!r}"
        assert block.reason is None or len(block.reason) > 10, f"{page}:{block.line}"
    # None is hidden from the pattern above, and no reason stands anywhere else.
    assert len(re.findall(r"^ *```", PAGES[page], re.MULTILINE)) == 2 * len(blocks(page))
    reasons = [block.reason for block in blocks(page) if block.reason]
    assert len(re.findall(r"^ *<!-- not run", PAGES[page], re.MULTILINE)) == len(reasons)


# -- what the blocks find -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def cells():
    """120 of the bundled blood cells of three types over 300 of their genes, by symbol."""
    import anndata

    from cellplm_jax.data.datasets import PBMC_MARKERS, pbmc3k

    adata = pbmc3k()
    named = {gene for markers in PBMC_MARKERS.values() for gene in markers}
    wanted = named | {"STAT1", "IRF1", "TP53"}
    chosen = np.isin(adata.var_names, sorted(wanted))
    often = np.argsort(-np.asarray((adata.X > 0).sum(axis=0)).ravel(), kind="stable")
    chosen[[g for g in often if not chosen[g]][: 300 - chosen.sum()]] = True
    types = np.array(adata.obs["cell_type"])
    kept = [np.flatnonzero(types == t)[:40] for t in ("B cell", "CD14+ monocyte", "CD8 T cell")]
    index = np.stack(kept, axis=1).ravel()
    small = adata[index][:, chosen]
    return anndata.AnnData(
        X=small.X.copy(),
        obs=small.obs[["cell_type"]].astype(str).astype("category"),
        var=small.var[["ensembl_id"]],
    )


@pytest.fixture(scope="module")
def model(cells):
    """A model of the genes of :func:`cells` with random weights."""
    from cellplm_jax.presets import preset
    from cellplm_jax.tasks.pretrained import Pretrained

    genes = cells.var["ensembl_id"].tolist()
    untrained = Pretrained.untrained(preset("debug", len(genes)).model, genes)
    untrained.card["name"] = "stand-in"
    return untrained


@pytest.fixture(scope="module")
def kitchen(cells, model, tmp_path_factory) -> Path:
    """A folder with every file that a page opens; read only."""
    folder = tmp_path_factory.mktemp("kitchen")

    def write(name, index, genes=slice(None), **obs):
        part = cells[index][:, genes].copy()
        for key, values in obs.items():
            part.obs[key] = [values[n % len(values)] for n in range(part.n_obs)]
        part.write_h5ad(folder / f"{name}.h5ad")
        return part

    first, second = np.arange(60), np.arange(60, 120)
    batches = ["b1", "b1", "b1", "b2", "b2", "b2"]
    donors = [f"d{n}" for n in range(6)]
    sick = {"donor": donors, "disease": ["no", "yes"]}
    unlabelled = cells[first].copy()
    del unlabelled.obs["cell_type"]
    for key, values in {**sick, "sample": ["s1", "s2"], "batch": batches}.items():
        unlabelled.obs[key] = [values[n % len(values)] for n in range(60)]
    unlabelled.write_h5ad(folder / "cells.h5ad")
    write("labelled", second, batch=batches)
    write("several", second, batch=batches)
    write("cohort", first, **sick)
    write("reference", second)
    panel = write("spatial", first, np.arange(0, 300, 2))
    x, y = np.unravel_index(np.arange(60), (6, 10))
    panel.obsm["spatial"] = np.stack([x, y], axis=1) * 12.5
    panel.write_h5ad(folder / "spatial.h5ad")
    perturbations = ["control", "STAT1", "IRF1", "JAK2", "IFNGR1"]
    write("screen", np.arange(120), perturbation=np.repeat(perturbations, 3).tolist())
    (folder / "demo").mkdir()
    model.save(folder / "demo" / "model")
    return folder


@pytest.fixture(scope="module")
def fits() -> dict[str, dict[str, Any]]:
    """What was fitted already in this module, by what it was fitted with."""
    return {}


def fingerprint(value: Any) -> str:
    """Say what an argument is, so that equal cells are equal."""
    if hasattr(value, "obs") and hasattr(value, "X"):
        parts = [
            value.X.toarray().tobytes(),
            value.obs.to_csv().encode(),
            *map(str.encode, value.var_names),
        ]
        return hashlib.sha256(b"".join(parts)).hexdigest()
    return repr(value)


@pytest.fixture
def page_folder(kitchen, model, fits, tmp_path, monkeypatch) -> Path:
    """A copy of the kitchen to run a page in, with what makes that quick."""
    import cellplm_jax
    from cellplm_jax.tasks import pretrained

    folder = Path(shutil.copytree(kitchen, tmp_path / "page"))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MPLBACKEND", "Agg")

    def load(source, **options):
        return model if os.fspath(source) in MODELS else opened(source, **options)

    opened = pretrained.load
    monkeypatch.setattr(pretrained, "load", load)
    monkeypatch.setitem(vars(cellplm_jax), "load", load)

    def shared(fit):
        def fit_once(self, adata, **keys):
            options = {k: v for k, v in vars(self).items() if k != "base"}
            asked = [id(self.base), options, [(k, fingerprint(v)) for k, v in sorted(keys.items())]]
            name = f"{type(self).__name__} {fingerprint(adata)} {asked!r}"
            if name not in fits:
                fit(self, adata, **keys)
                fits[name] = dict(vars(self))
            vars(self).update(fits[name])
            return self

        return fit_once

    for name in ESTIMATORS.values():
        estimator = getattr(cellplm_jax, name)
        one_epoch = dataclasses.replace(estimator.recipe, epochs=1)
        monkeypatch.setattr(estimator, "recipe", one_epoch)
        monkeypatch.setattr(estimator, "fit", shared(estimator.fit))
    return folder


# -- Python ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_blocks_run_as_written(page, page_folder, monkeypatch):
    pytest.importorskip("igraph", reason="needs the extra 'eval'")
    import matplotlib.pyplot as plt
    import scanpy

    from cellplm_jax.evaluate import embedding

    def two_dimensions(adata):
        # UMAP takes ten seconds to compile; that it runs on this graph is tested with the tasks.
        adata.obsm["X_umap"] = np.asarray(adata.obsm["X_cellplm"])[:, :2]

    monkeypatch.setattr(scanpy.tl, "umap", two_dimensions)
    monkeypatch.setattr(embedding, "umap_coordinates", lambda z, **_: np.asarray(z)[:, :2])
    names: dict[str, Any] = {}
    said = ""
    for block in blocks(page):
        where = f"{page}, line {block.line}"
        if block.language == "python":
            code = compile("\n" * block.line + block.text, page, "exec")
            if block.reason is None:
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(code, names)
                said = out.getvalue()
        elif block.language == "text" and said and block.reason is None:
            assert block.text.strip() in said, f"{where}: said {said!r}"
    plt.close("all")
    expected = EXPECTED.get(page)
    if expected:
        expected(names)


def _readme(names):
    adata = names["adata"]
    assert "cellplm_cluster" in adata.obs
    assert adata.uns["cellplm"]["adapt"] == "context"
    # The picture stores the colours.
    assert len(adata.uns["cell_type_colors"]) == adata.obs["cell_type"].nunique()


def _genes(names):
    assert names["mapping"].column.tolist() == [0, 1, 2, 3, -1]


EXPECTED = {"README.md": _readme, "docs/genes.md": _genes}


def test_the_checks_can_fail():
    name = "README.md"
    assert blocks(name)[0].language == "bash"
    assert len(WITH_PYTHON) > 12
    with pytest.raises((SystemExit, AssertionError)):
        check_line("cellplm embed cells.h5ad --modell small --out embedded.h5ad", runs=True)
    with pytest.raises(AssertionError):
        check_line("pip install 'cellplm-jax[evaluation]'", runs=True)
    with pytest.raises(AssertionError):
        check_line("make dems", runs=True)
    with pytest.raises(AssertionError):
        check_line("gcloud auth login", runs=True)
    with pytest.raises(AssertionError):
        check_line("bash launch/tpu_pod.sh up --nodes=3", runs=True)


# -- shell ----------------------------------------------------------------------------------------


def lines(text: str) -> list[str]:
    """Return the commands of a shell block, one a line, without comments."""
    joined = re.sub(r"\\\n\s*", " ", text)
    plain = [re.sub(r"(^|\s)#.*$", "", line).strip() for line in joined.splitlines()]
    return [part.strip() for line in plain for part in re.split(r"&&|\|", line) if part.strip()]


def extras() -> set[str]:
    return set(
        re.findall(r'^ +"([a-z0-9]+)": [\[A-Z]', (ROOT / "setup.py").read_text(), re.MULTILINE)
    )


def check_script(words: list[str]) -> None:
    """Check that a script is there, knows its options, and is given a configuration there is."""
    script = ROOT / words[0]
    assert script.exists(), words[0]
    text = script.read_text(encoding="utf-8")
    own, _, passed = " ".join(words[1:]).partition(" -- ")
    if script.suffix == ".py" or script.name in ("slurm.sbatch", "local_multiprocess.sh"):
        own, passed = "", f"{own} {passed}"
    for option in re.findall(r"--([a-z-]+)", own):
        assert option in text, f"{words[0]} has no --{option}"
    flags = " ".join(p.read_text() for p in sorted((ROOT / "launch").glob("*.py"))) + text
    for flag in re.findall(r"--(\w[\w-]*)(?=[=\s]|$)", passed):
        assert f'"{flag}"' in flags or f"--{flag}" in flags, f"{words[0]}: --{flag}"
    named = re.search(r"--config=(configs/\w+\.py)(?::(\w+))?", passed)
    if named:
        assert (ROOT / named[1]).exists(), named[1]
        if named[2]:
            from cellplm_jax.presets import preset

            preset(named[2].lower() if named[2] != "VARIANT" else "small")


def check_line(line: str, *, runs: bool) -> None:
    """Check one command; ``runs``: it stands in a block that can be run on any machine."""
    words = shlex.split(line)
    if words[0] == "cellplm":
        from cellplm_jax.cli import build_parser

        build_parser().parse_args(words[1:])
    elif words[0] == "pip":
        for found in re.findall(r"(?:cellplm-jax|\.)\[([^\]]*)\]", line):
            assert set(found.split(",")) <= extras(), line
    elif words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert re.search(rf"^{re.escape(words[1])}:", makefile, re.MULTILINE), line
    elif words[0] in ("python", "bash") and "-c" not in words:
        check_script([word for word in words[1:] if word != "..."])
    elif words[0] == "sbatch":
        at = next(i for i, word in enumerate(words) if word.startswith("launch/"))
        check_script(words[at:])
    elif words[0].startswith((".ci/", ".venv/bin/")):
        assert words[0].startswith(".venv") or (ROOT / words[0]).exists(), line
    elif "=" not in words[0]:
        assert not runs, line
        assert words[0] in ELSEWHERE, line


@pytest.mark.parametrize("page", WITH_SHELL)
def test_shell_lines_are_commands_that_exist(page):
    for block in blocks(page):
        if block.language != "bash":
            continue
        for line in lines(block.text):
            if not re.match(r"\w+=|export ", line):
                check_line(line, runs=block.reason is None)


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_text_parse(page):
    from cellplm_jax.cli import build_parser

    for command in re.findall(r"(?<!`)`cellplm ([a-z][^`#\n]*)`", PAGES[page]):
        words = command.split()
        if len(words) > 1 and "COMMAND" not in words and "|" not in command:
            build_parser().parse_args([word for word in words if word not in ("--help", "-h")])


@pytest.mark.parametrize("page", ["docs/howto/embed.md", "docs/start.md"])
def test_cheap_commands_run(page, page_folder):
    from cellplm_jax.cli import main

    ran = 0
    for block in blocks(page):
        for line in lines(block.text) if block.language == "bash" else []:
            words = shlex.split(line)
            files = [word for word in words if word.endswith(".h5ad")]
            if words[:1] == ["cellplm"] and words[1] in RUN and files and Path(files[0]).exists():
                assert main(words[1:]) in (0, None), line
                assert Path(files[-1]).exists()
                ran += 1
    assert ran


def test_dry_runs_of_the_launching_page():
    """Its settings and its lines with ``--dry-run``, as they stand; they print commands and run none."""
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    text = "\n".join(b.text for b in blocks("launch/README.md") if b.language == "bash")
    joined = re.sub(r"\\\n\s*", " ", text)
    settings = [line for line in joined.splitlines() if re.match(r"export |RUN=|FLAGS=", line)]
    dry = [line for line in joined.splitlines() if "--dry-run" in line]
    assert len(dry) == 2
    for line in dry:
        script = "\n".join([*settings, line])
        ran = subprocess.run(
            ["bash", "-euc", script], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert ran.returncode == 0, ran.stderr
        assert "pretrain.py" in ran.stdout


# -- links ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "launch/README.md"])
def test_files_that_are_linked_exist(page):
    """Links of the pages of the site are checked when it is built."""
    for target in re.findall(r"(?:\]\(|src=\"|srcset=\")([^)#\"\s]+)", PAGES[page]):
        if "://" not in target:
            assert (ROOT / page).parent.joinpath(target).exists(), target


def test_make_targets_in_the_text_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page, text in PAGES.items():
        for target in re.findall(r"`make ([a-z-]+)`", text):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page}: make {target}"


def test_links_of_the_repository_become_links_of_the_site():
    path = DOCS / "extensions" / "repository_links.py"
    spec = importlib.util.spec_from_file_location("repository_links", path)
    pytest.importorskip("sphinx", reason="needs the extra 'docs'")
    links = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(links)
    for target in (*links.PAGES, "docs/choosing.md"):
        assert (ROOT / target).exists(), target
    text = (
        "[a](../benchmarks/quality/quality.md#annotation) [b](embed_exported.py) [c](https://x.y/z)"
    )
    notebook = "[n](notebooks/01_quickstart.ipynb)"
    assert links.rewrite(notebook, DOCS / "choosing.md", "choosing") == notebook
    assert links.rewrite(text, DOCS / "choosing.md", "choosing") == (
        "[a](benchmarks/quality.md#annotation) b (`docs/embed_exported.py`) [c](https://x.y/z)"
    )


# -- the site holds everything ---------------------------------------------------------------------


def test_the_reference_holds_every_public_name():
    import cellplm_jax

    reference = "\n".join(text for page, text in PAGES.items() if page.startswith("docs/api/"))
    for name in cellplm_jax.__all__:
        where = {"datasets": "cellplm_jax.data.datasets"}.get(name, f"cellplm_jax.{name}")
        if name.endswith("Config"):
            where = "cellplm_jax.config"
        if name.endswith("Error"):
            where = "cellplm_jax.errors"
        if name != "__version__":
            assert f":: {where}\n" in reference, name


# -- the first page --------------------------------------------------------------------------------


def tool(name):
    specification = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_readme_is_short_and_opens_with_install_line_and_picture():
    lines_ = PAGES["README.md"].splitlines()
    assert len(lines_) <= 110
    assert len(PAGES["README.md"].split()) <= 900
    install = next(n for n, line in enumerate(lines_, 1) if line.startswith("pip install"))
    picture = next(n for n, line in enumerate(lines_, 1) if "<img" in line)
    assert install <= 25
    assert picture <= 30
    assert not re.search(r"(?<![\d.])\.\d", PAGES["README.md"])  # 0.882, not .882


def test_install_lines_follow_the_one_address():
    setting = tool("set_address")
    held = 0
    for path in setting.pages():
        text = path.read_text(encoding="utf-8")
        assert setting.render(text, setting.address()) == text, f"run tools/set_address.py: {path}"
        held += "<!-- install -->" in text
    assert held == 3  # README, first page, getting started
    other = setting.render(PAGES["README.md"], "github.com/someone/cellplm-jax")
    assert 'pip install "cellplm-jax[eval] @ git+https://github.com/someone/cellplm-jax"' in other
    assert setting.main(["https://github.com/someone/cellplm-jax"]) == 2


UNPUBLISHED = re.compile(r"pip install (?:-\S+ )*['\"]?cellplm-jax(?!\[|-)")


def test_no_placeholder_and_no_unpublished_name():
    """A first installation needs an address or a checkout; extras of an installed package need neither."""
    texts = dict(PAGES)
    for path in [*DOCS.glob("notebooks/*.ipynb"), *(ROOT / "cellplm_jax").rglob("*.py")]:
        texts[path.name] = path.read_text(encoding="utf-8")
    for page, text in texts.items():
        assert not re.search(r"\bOWNER\b", text), page
        assert not UNPUBLISHED.search(text), page
    assert UNPUBLISHED.search("pip install cellplm-jax")
    assert UNPUBLISHED.search("pip install -q 'cellplm-jax'")


def test_badges_are_those_of_the_metadata():
    badges = tool("make_badges")
    for name, text in badges.facts().items():
        assert (badges.FOLDER / f"{name}.svg").read_text() == badges.badge(name, text)
        assert f"badges/{name}.svg" in PAGES["README.md"]


def test_annotation_is_scored_on_cells_that_were_held_out():
    code = "\n".join(b.text for b in blocks("docs/howto/annotate.md") if b.language == "python")
    (estimator, scored) = re.findall(r"(\w+)\.score\((\w+)", code)[0]
    (fitted,) = re.findall(rf"^{estimator} = .*\.fit\((\w+)", code, re.MULTILINE)
    (kept,) = re.findall(rf"^{scored} = .*== (\S+)\]", code, re.MULTILINE)
    assert f'{fitted} = labelled[labelled.obs["batch"] != {kept}]' in code


def test_every_message_has_a_row_with_its_remedy():
    path = DOCS / "extensions" / "message_list.py"
    spec = importlib.util.spec_from_file_location("message_list", path)
    assert spec is not None
    assert spec.loader is not None
    listed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(listed)
    found = list(listed.messages())
    assert len(found) > 250
    assert sum(bool(message.remedy) for message in found) > 0.9 * len(found)
    text = "\n".join(listed.markdown())
    assert "obsm has no '…'" in text
    assert text.count("\n## ") >= 8


@pytest.mark.parametrize("path", sorted(DOCS.glob("figures/*.py")), ids=lambda path: path.stem)
def test_figures_are_there_in_both_themes(path):
    if path.stem != "themes":
        used = "\n".join(PAGES.values())
        for theme in ("light", "dark"):
            drawn = sorted(path.parent.rglob(f"{path.stem}-{theme}.*"))
            if path.stem == "stories":
                drawn = sorted((path.parent / "stories").glob(f"*-{theme}.png"))
                assert len(drawn) == 8
            assert drawn
            for picture in drawn:
                assert picture.stat().st_size < 150_000
                assert f"figures/{picture.relative_to(path.parent).as_posix()}" in used


def test_embedding_scores_of_the_readme_are_those_of_the_study():
    import json

    study = json.loads((ROOT / "benchmarks" / "zero_shot" / "zero_shot.json").read_text())
    shown = 0
    for line in PAGES["README.md"].splitlines():
        cells = [cell.strip().replace("*", "") for cell in line.strip("|").split("|")]
        runs = [run for rows in study["sets"].values() for run in rows.get(cells[0], [])]
        if len(cells) == 4 and runs:
            shown += 1
            for cell, key in zip(cells[1:], ("ari", "nmi", "knn_accuracy"), strict=True):
                assert float(cell) == pytest.approx(np.mean([run[key] for run in runs]), abs=6e-4)
    assert shown >= 4


def test_numbers_of_the_summary_are_those_of_the_table():
    """Every row of the table against peers, to three decimals."""
    import json

    scores = json.loads((ROOT / "benchmarks" / "quality" / "quality.json").read_text())
    rows = {
        "macro F1, Zheng": ("annotation", "zheng_purified_pbmc", "macro_f1"),
        "macro F1, Kang": ("annotation", "kang_muscat_labelled", "macro_f1"),
        "macro F1, cell lines": ("annotation", "hashtag_cell_lines_2000genes", "macro_f1"),
        "correlation, breast ST": ("imputation", "breast_st_stahl_4layers", "pearson"),
        "correlation, breast Xenium": ("imputation", "xenium_breast_jef2023_4fov", "pearson"),
        "error, PBMC3k, less is better": ("denoising", "pbmc3k", "expected_rmse"),
        "mixing (kBET), Kang": ("integration", "kang_muscat_labelled", "kbet"),
        "neighbours of the same type, Kang": (
            "integration",
            "kang_muscat_labelled",
            "knn_accuracy",
        ),
        "correlation, Kang, a new cell type": ("perturbation", "kang_muscat_labelled", "pearson"),
        "correlation, Papalexi, new targets": (
            "perturbation",
            "papalexi_eccite_thp1_299genes",
            "pearson",
        ),
    }
    names = {"logistic regression": "logistic regression, log1p of counts"}
    for shown, (task, data, score) in rows.items():
        line = next(
            ln for ln in PAGES["docs/benchmarks/index.md"].splitlines() if f"| {shown} |" in ln
        )
        cells = [cell.strip() for cell in line.strip("|").split("|")][2:]
        methods = ["small", "original CellPLM, scratch", None, None]
        for cell, method in zip(cells, methods, strict=True):
            if cell == "-":
                continue
            number, _, name = cell.replace("*", "").partition(" ")
            found = scores[task][data][method or names.get(name, name)]["scores"][score][0]
            assert abs(float(number) - found) < 6e-4, (shown, cell, found)
