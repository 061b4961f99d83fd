"""What sparsity costs: the needle model's answers through real servers, contender by contender.

    make needle          # the default grid: at most an hour on two cores
    make needle-quick    # a look at a corner of it, minutes

Every contender answers the same questions about the same held-out mp4 files, over HTTP, from a
server of its kind that this benchmark starts: stock vLLM, vLLM with the plugin, vLLM with EVS.

Read `grid.py` (who and where), then `run.py` (the loop).  `beds.py` says where scenes come from:
the needle model's, or those of "places" (`make places`).  `videos.py` chooses and writes the files,
`servers.py` starts servers, `ask.py` asks, `offline.py` does without servers, `work.py` remembers;
`results.py`, `intervals.py`, `tables.py`, `plots.py` and `report.py` make the JSON, the pictures
and docs/quality.md.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEEDLE = ROOT / "examples" / "needle"
PLACES = ROOT / "examples" / "places"

# At the end of the path: their modules have everyday names.
for _folder in (NEEDLE, PLACES, ROOT / "examples" / "demo", ROOT / "benchmarks"):
    if str(_folder) not in sys.path:
        sys.path.append(str(_folder))
