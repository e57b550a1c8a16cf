"""`litgpt_kv serve`: an OpenAI-compatible HTTP server over the engine.

In the order to read: `settings` (what the user chooses), `loop` (the thread that owns the engines), `conversations`
(states that later turns go on from), `schemas` (what a request may say), `asked` (from a body to engine requests),
`bodies` (what answers look like), `response` (one answer, streamed or whole), `guard` (keys, hosts, sizes), `metrics`,
`app` (the endpoints), `server` (sockets and signals), `page.html`.
"""
