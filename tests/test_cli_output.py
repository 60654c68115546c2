"""What the command writes besides its results: JSON, suggestions, colour, completion, what the doctor finds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from cellplm_jax import doctor, platforms
from cellplm_jax.cli import build_parser
from cellplm_jax.cli.output import plain, print_result, styled
from cellplm_jax.errors import InputError, nearest
from tests.conftest import make_adata


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["embd"], "Did you mean 'embed'?"),
        (["embed", "a", "--batch-kye", "b"], "There is no --batch-kye. Did you mean --batch-key?"),
        (
            ["embed", "a", "--model", "m", "--out", "o", "--spatal-key=b"],
            "There is no --spatal-key. Did you mean --spatial-key?",
        ),
        (["embed", "a", "--model", "m", "--out", "o", "--values", "log1"], "'log1p'?"),
        (["annotate", "fti"], "Did you mean 'fit'?"),
        (["annotate", "fit", "a", "--lable-key", "x"], "Did you mean --label-key?"),
        (["completion", "bsh"], "Did you mean 'bash'?"),
    ],
)
def test_mistyped_words_get_the_nearest_name(command, words, meant):
    status, out, err = command(*words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert meant in err
    assert re.search(r"See cellplm[a-z ]* --help\.\n$", err)


def test_nothing_is_guessed_where_nothing_is_near(command):
    _, _, err = command("embed", "a", "--model", "m", "--out", "o", "--zzzzzz")
    assert "unrecognized arguments: --zzzzzz" in err
    assert "Did you mean" not in err
    # Shortened options are those of argparse.
    assert build_parser().parse_args(["embed", "a", "--mod", "m", "--out", "o"]).model == "m"


def test_nearest():
    assert nearest("Batc", ["batch", "donor"], "Look") == "Did you mean 'batch'?"
    assert nearest("CD3d", ["CD3D", "CD19"], "Look") == "Did you mean 'CD3D'?"
    assert nearest("x", [], "Look") == "Look"


def test_mistyped_keys_get_the_nearest_name(tmp_path):
    import pandas as pd

    from cellplm_jax.data.anndata_io import open_counts
    from cellplm_jax.tasks.cluster import known_columns
    from cellplm_jax.tasks.contexts import labels_of
    from tests.conftest import VOCABULARY

    adata = make_adata(8)
    adata.layers["raw_counts"] = adata.X.copy()
    adata.var["ensembl"] = adata.var_names
    adata.write_h5ad(tmp_path / "in.h5ad")
    with open_counts(adata, VOCABULARY) as source:
        with pytest.raises(InputError, match="Did you mean 'batch'"):
            source.column("bach")
        with pytest.raises(InputError, match="Did you mean 'spatial'"):
            source.coordinates("spatail", required=True)
    with pytest.raises(InputError, match="Did you mean 'raw_counts'"):
        open_counts(adata, VOCABULARY, layer="raw_count")
    with pytest.raises(InputError, match="Did you mean 'ensembl'"):
        open_counts(adata, VOCABULARY, gene_key="ensmbl")
    with pytest.raises(InputError, match="Did you mean 'batch'"):
        known_columns(tmp_path / "in.h5ad", ["batches"])
    with pytest.raises(InputError, match="Did you mean 'kind'"):
        labels_of(pd.DataFrame({"kind": ["a"]}), "knd")


def test_documents_are_json_whatever_the_numbers():
    found = plain(
        {"a": np.float32(1.5), "b": np.arange(2), "c": float("nan"), "d": (1, True, None), 3: "x"}
    )
    assert json.loads(json.dumps(found, allow_nan=False)) == {
        "a": 1.5, "b": [0, 1], "c": None, "d": [1, True, None], "3": "x",
    }  # fmt: skip


def test_lines_or_a_document(capsys):
    arguments = SimpleNamespace(json=False, quiet=False, report=None)
    print_result(arguments, ["wrote it"], {"cells": 3}, messages=["by the way"])
    assert capsys.readouterr() == ("wrote it\n", "by the way\n")
    print_result(
        SimpleNamespace(json=True, quiet=True, report="r.html"), ["wrote it"], {"cells": 3},
        messages=["by the way"],
    )  # fmt: skip
    out, err = capsys.readouterr()
    assert json.loads(out) == {"cells": 3, "report": "r.html", "messages": ["by the way"]}
    assert err == ""


def test_every_verb_has_json_and_quiet_and_an_example():
    def leaves(parser):
        below = [a for a in parser._actions if hasattr(a.choices, "values")]
        for action in below:
            for child in action.choices.values():
                yield from leaves(child)
        if not below:
            yield parser

    verbs = list(leaves(build_parser()))
    assert len(verbs) == 26
    for parser in verbs:
        assert "example:" in parser.format_help()
        if parser.prog == "cellplm completion":
            continue
        assert {"--json", "--quiet"} <= set(parser._option_string_actions), parser.prog
    with_report = {p.prog for p in verbs if "--report" in p._option_string_actions}
    assert len(with_report) == 17


def test_colour_is_for_terminals_alone(monkeypatch):
    terminal = SimpleNamespace(isatty=lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert styled("x", "red", terminal) == "\x1b[1;31mx\x1b[0m"
    assert styled("x", "red", SimpleNamespace(isatty=lambda: False)) == "x"
    monkeypatch.setenv("NO_COLOR", "1")
    assert styled("x", "red", terminal) == "x"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert styled("x", "red", terminal) == "x"


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion(command, shell):
    status, out, err = command("completion", shell)
    assert (status, err) == (0, "")
    for word in ("annotate", "batch-key", "doctor", "normalized"):
        assert word in out
    if shell == "bash":
        # Read by the shell itself, which also completes with it.
        script = (
            f"{out}\nCOMP_WORDS=(cellplm em); COMP_CWORD=1; _shtab_cellplm; echo ${{COMPREPLY[@]}}"
        )
        result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
        assert result.stdout.split() == ["embed"], result.stderr


def test_parsing_and_help_load_no_library():
    code = (
        "import sys\nfrom cellplm_jax.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = ('jax', 'numpy', 'pandas', 'anndata', 'matplotlib', 'rich', 'shtab')\n"
        "sys.stderr.write(' '.join(m for m in heavy if m in sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stderr == ""
    assert "cellplm doctor" in result.stdout


# The doctor


def entries(facts):
    return {entry["name"]: entry for section in facts["sections"] for entry in section["entries"]}


def test_doctor(command):
    status, out, err = command("doctor", "--json")
    assert (status, err) == (0, "")
    facts = json.loads(out)
    found = entries(facts)
    assert facts["usable"]
    assert {"jax", "Python", "memory", ":small", ":85m", "small", "train"} <= set(found)
    assert "(cpu)" in found["JAX"]["text"]
    assert any("compressed" in line for line in facts["slow"])
    status, out, _ = command("doctor")
    assert status == 0
    assert out.endswith("Usable.\n")
    assert "What will be slow, and why" in out


def test_doctor_says_what_is_broken_and_goes_on(command, monkeypatch):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "zarr" else real(name))
    monkeypatch.setattr(doctor, "_there", lambda module: module != "grain")

    def fail(report):
        raise RuntimeError("a broken part\nwith details")

    monkeypatch.setattr(doctor, "_memory", fail)
    status, out, _ = command("doctor", "--json")
    facts = json.loads(out)
    found = entries(facts)
    assert (status, facts["usable"], facts["broken"]) == (1, False, ["zarr: missing"])
    assert found["zarr"]["remedy"].startswith("Run: pip install 'zarr")
    assert found["not looked at"]["text"] == "RuntimeError: a broken part"
    assert "cellplm-jax[train]" in found["train"]["remedy"]
    assert "small" in found


def test_doctor_knows_the_supported_versions(monkeypatch):
    monkeypatch.setattr(doctor, "_requirements", lambda: iter([("jax", ">=0.10,<0.13")]))
    monkeypatch.setattr(doctor, "_version", lambda name: "0.9.1" if name == "jax" else "1.0")
    facts = doctor.diagnose()
    assert facts["broken"] == ["jax: 0.9.1, supported is <0.13,>=0.10"] or facts["broken"] == [
        "jax: 0.9.1, supported is >=0.10,<0.13"
    ]


def test_doctor_points_at_an_idle_accelerator_and_a_cache_that_is_off(monkeypatch):
    monkeypatch.setattr(platforms, "has_nvidia", lambda: True)
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setenv("CELLPLM_CACHE", "off")
    facts = doctor.diagnose()
    found = entries(facts)
    assert found["NVIDIA GPU"]["remedy"] == "Run: pip install 'cellplm-jax[cuda12]'"
    assert any("NVIDIA GPU" in line for line in facts["slow"])
    assert any("cache is off" in line for line in facts["slow"])
    assert facts["usable"]
