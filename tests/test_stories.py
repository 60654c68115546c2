"""Eight tasks in six lines each: every block of ``docs/stories.md`` runs on its own and draws a picture."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

pytest.importorskip("igraph", reason="needs the extra 'eval'")
from tests.conftest import ROOT
from tests.test_pages import cells, fits, kitchen, model, page_folder  # noqa: F401

FIGURES = ROOT / "docs" / "figures"
specification = importlib.util.spec_from_file_location("stories", FIGURES / "stories.py")
assert specification is not None
assert specification.loader is not None


@pytest.fixture(scope="module")
def stories():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FIGURES))
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        return module.stories()


NAMES = ("embed", "transfer", "annotate", "impute", "denoise", "integrate", "perturb", "pretrain")


def test_there_are_eight_of_at_most_six_lines(stories):
    assert tuple(stories) == NAMES
    for name, code in stories.items():
        assert len([line for line in code.splitlines() if line.strip()]) <= 6, name
        for theme in ("light", "dark"):
            assert (FIGURES / "stories" / f"{name}-{theme}.png").stat().st_size > 4000


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_and_draws(name, stories, page_folder, monkeypatch):  # noqa: F811
    import anndata
    import matplotlib.pyplot as plt
    from matplotlib.text import Text

    import cellplm_jax as cellplm
    from cellplm_jax.evaluate import embedding

    monkeypatch.setattr(embedding, "umap_coordinates", lambda z, **_: np.asarray(z)[:, :2])
    plt.close("all")
    names = {"anndata": anndata, "cellplm": cellplm}
    exec(compile(stories[name], f"docs/stories.md: {name}", "exec"), names)
    drawn = [axes for axes in plt.gcf().axes if axes.collections or axes.lines or axes.images]
    assert drawn
    assert not [
        text for text in plt.gcf().findobj(Text) if "ENSG0" in text.get_text()
    ]  # symbols, not ids
    plt.close("all")
