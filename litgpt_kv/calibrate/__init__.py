"""What strategies need to know of a model before they are used, worked out from the model itself.

`centres.py` has the centres of queries that `triattention` reads; `files.py` writes what was found to a file.
"""

from litgpt_kv.calibrate.centres import query_centres
from litgpt_kv.calibrate.files import write_calibration

__all__ = ["query_centres", "write_calibration"]
