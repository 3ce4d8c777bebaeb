"""The runbook as a test: every block of ``docs/runbooks/WORK_QUEUE_STALLS.md`` runs against a real node.

`blocks` reads the page, `deployment` is a box with a node on it, `repl` is the prompt that Python blocks are pasted
into, `scenes` has for every section the trouble it is about and what must be true after each block.
"""
