"""A self-play pipeline whose steps are ordinary jobs of the orchestrator.

    play         MCTS against itself; publishes its games to the store        (many small jobs, any node)
       |
       v  store  the newest game files of each game, bounded, shared by the jobs of one machine
       |
    evaluate     the newest opening book plus MCTS against plain MCTS         (the "gauntlet")
    tournament   a round robin of named players, rated by maximum likelihood

What is learnt is deliberately small: a table of the opening moves with which long searches won (`book`). It is built
in milliseconds and a person can read it, yet it is worth something: after 400 games at 1000 simulations a move, a
player of 50 or 200 simulations gains 80 to 100 Elo from it, at connect four and at hex alike (800 games, ± 25).

Nothing here knows the orchestrator. A step is a program that reads flags, writes `progress.json` and `result.json` into
`$P2P_JOB_DIR` (a temporary folder when a person runs it) and says with its exit code how it went:

    0    done, `result.json` is there
    2    refused: one sentence on stderr says which flag, file or package is wrong
    143  told to stop (SIGTERM): the games so far are in `progress.json`; a retry starts afresh

Read on in `play`, then `evaluate`. The rules of the games come from OpenSpiel, imported only when a game starts.
"""
