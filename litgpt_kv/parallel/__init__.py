"""Many devices, through Lightning Fabric."""

from litgpt_kv.parallel.launch import end_worker
from litgpt_kv.parallel.ways import WAYS, Place, Way, way_of

__all__ = ["WAYS", "Place", "Way", "end_worker", "way_of"]
