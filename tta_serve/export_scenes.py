"""Write scenes of the built-in detector as a data set: `python -m tta_serve.export_scenes DIR --modality ir`.

What `tta-serve train-translator` reads, for trying it out without data of one's own.
"""

import argparse
from pathlib import Path

from tta_serve.builtin import scenes


def main() -> None:
    """Read the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where to; it may exist")
    parser.add_argument("--modality", choices=("rgb", "ir"), default="ir")
    parser.add_argument("--count", type=int, default=400, help="scenes (default: 400)")
    parser.add_argument("--seed", type=int, default=100, help="others give other scenes (default: 100)")
    parser.add_argument("--held-out", action="store_true", help="of digits that the detector was not trained on")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    print(scenes.export(asked.folder, asked.count, asked.seed, asked.held_out, asked.modality))


if __name__ == "__main__":
    main()
