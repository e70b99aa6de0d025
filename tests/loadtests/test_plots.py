import sys

import pytest

from loadtests import plots
from loadtests.errors import MissingTool

PANEL = plots.Bars("a title", "error (%)", ["fog", "snow"], {"frozen": [40, 30], "adapting": [20, 10]})


def test_a_picture_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "out.png"
    ranged = PANEL._replace(ranges={"frozen": [(39, 41), (30, 30)]}, levels={"published": 41.13}, logarithmic=True)
    plots.draw(file, [PANEL, ranged])
    assert file.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_remedy_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(MissingTool, match="pip install matplotlib"):
        plots.draw(tmp_path / "out.png", [PANEL])
