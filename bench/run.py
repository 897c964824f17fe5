"""`make bench`: Kvik beside its peers. Starts bench/side_by_side.py with the Python that setup_peers.py prepared."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.peers import launch

if __name__ == "__main__":
    sys.exit(launch("bench.side_by_side"))
