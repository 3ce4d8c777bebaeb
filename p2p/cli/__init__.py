"""``p2pctl``: a person's orders to a cluster, through any of its nodes. Decides what is asked and how it is shown; the
nodes decide what is done.

In reading order: `main` (words on the command line -> an order, and the exit code), `orders` (what each order asks of
a node, and the answer as plain data), `show` (plain data -> lines of text), `client` (one HTTP request), `recover`
(the one order that needs no node: it works on the data directory of a stopped one).

Only `main` knows argparse and only `show` knows how a table looks, so that either can be replaced alone.

Exit codes: 0 done; 1 refused or failed, nothing was changed; 2 the command line or a setting is wrong; 3 no node could
be reached; 4 the outcome is unknown: it may have been done.
"""
