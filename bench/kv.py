"""`make bench-kv`: KV formats and eviction. Starts bench/kv_run.py with the Python of the peers' tools."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.peers import launch

if __name__ == "__main__":
    sys.exit(launch("bench.kv_run"))
