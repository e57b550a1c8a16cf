"""Many devices, through Lightning Fabric."""

from litgpt_kv.parallel.launch import ends_together, quiet
from litgpt_kv.parallel.ways import WAYS, Place, Way, way_of

__all__ = ["WAYS", "Place", "Way", "ends_together", "quiet", "way_of"]
