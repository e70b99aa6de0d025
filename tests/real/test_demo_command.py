"""The demonstration, from its start to its end."""

import pytest
from servers import START_S, tta_serve

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
