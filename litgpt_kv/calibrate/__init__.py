"""What strategies need to know of a model before they are used, worked out from the model itself.

`centres.py` has the centres of queries that `triattention` reads; `heads.py` which heads retrieve, for `duo`, and the
budget that each layer and head deserves; `passkeys.py` texts for the first of these; `files.py` writes what was found
to a file.
"""

from litgpt_kv.calibrate.centres import query_centres
from litgpt_kv.calibrate.files import write_calibration
from litgpt_kv.calibrate.heads import deserved_budgets, retrieval_gates
from litgpt_kv.calibrate.passkeys import passkey_text

__all__ = ["deserved_budgets", "passkey_text", "query_centres", "retrieval_gates", "write_calibration"]
