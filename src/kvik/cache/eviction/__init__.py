"""What carries eviction policies out: a file for each scorer and allocator, and the state of one sequence.

Shapes: L layers, H_kv KV heads, H query heads, D head size, n slots of a table. Layers with a window of their own take no
part; L' are the others.
"""

from kvik.cache.eviction.evictor import Evictor, Kept
from kvik.cache.eviction.scoring import Read

__all__ = ["Evictor", "Kept", "Read"]
