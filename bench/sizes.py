"""`make bench-sizes`: models of 1B, 4B and 8B. Starts bench/by_size.py with the Python that setup_peers.py prepared."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.peers import launch

if __name__ == "__main__":
    sys.exit(launch("bench.by_size"))
