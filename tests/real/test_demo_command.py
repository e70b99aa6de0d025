"""The demonstration, from its start to its end."""

import pytest
from PIL import Image
from servers import START_S, tta_serve

from tta_serve import demo_detection
from tta_serve.runfolder import RunFolder
from tta_serve.shifts import PHASES

pytestmark = pytest.mark.real


def test_the_demo_plays_every_phase_once_and_stops_its_server(free_port, tmp_path):
    port = free_port()
    ended = tta_serve("demo", "--once", "--draws", "96", "--port", str(port), folder=tmp_path, seconds=START_S)
    assert ended.returncode in (0, 1), ended.stderr  # 96 images are too few to win every time
    assert "Traceback" not in ended.stderr
    table = [line.split() for line in ended.stdout.splitlines() if line.strip().startswith(("✓", "✗"))]
    assert [" ".join(row[1 : 1 + len(phase.name.split())]) for row, phase in zip(table, PHASES, strict=True)] == [
        phase.name for phase in PHASES
    ]
    for row, phase in zip(table, PHASES, strict=True):
        frozen, adapting = (float(cell) for cell in row[1 + len(phase.name.split()) :][:2])
        assert 0 <= frozen <= 100
        assert 0 <= adapting <= 100
    assert not RunFolder(port).alive()


def test_the_demo_of_detection_plays_every_phase_and_draws_a_picture(free_port, tmp_path):
    port, picture = free_port(), tmp_path / "scenes.png"
    words = ("--detection", "--once", "--draws", "32", "--port", str(port), "--picture", str(picture))
    ended = tta_serve("demo", *words, folder=tmp_path, seconds=START_S)
    assert ended.returncode == 0, ended.stdout + ended.stderr  # the translator wins by far
    table = [line.split() for line in ended.stdout.splitlines() if line.strip().startswith(("✓", "✗"))]
    rows = {
        phase.name: row[1 + len(phase.name.split()) :] for phase, row in zip(demo_detection.PHASES, table, strict=True)
    }
    frozen, translated, recognised = ({name: float(row[i]) for name, row in rows.items()} for i in range(3))
    assert frozen["ir"] < 0.3 < translated["ir"]
    assert frozen["rgb"] == translated["rgb"] == frozen["rgb again"] == translated["rgb again"]
    assert min(recognised.values()) >= 90
    assert "all 32 scenes got the very boxes that they got at first" in " ".join(ended.stdout.split())
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG"
    assert not RunFolder(port).alive()
