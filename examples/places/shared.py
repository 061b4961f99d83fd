"""Makes the needle model's modules importable: both test beds share glyphs, codec and network."""

import sys
from pathlib import Path

NEEDLE = str(Path(__file__).resolve().parents[1] / "needle")
if NEEDLE not in sys.path:
    sys.path.append(NEEDLE)
