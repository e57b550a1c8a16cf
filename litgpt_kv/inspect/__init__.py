"""Look at what caches lose while a text is read, in one HTML page.

In the order to read: `records` (the same tokens through a full cache and through others), `pages` (a record as a page),
`page.html` (the page).
"""

from litgpt_kv.inspect.pages import page, write_page
from litgpt_kv.inspect.records import CacheRecord, Record, answer_of, record

__all__ = ["CacheRecord", "Record", "answer_of", "page", "record", "write_page"]
