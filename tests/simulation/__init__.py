"""A whole cluster in one thread and virtual time: the real cores on disks, a network and clocks that fail.

::

    profile.py    which faults, how hard, how many voters: drawn from the seed (swarm testing)
    schedule.py   one seed: start, faults, healing, an exam, what must then be true     <- run_seed() is the way in
    world.py      the one heap of (time, number), random streams, the network
    node.py       one process: a real Replica, and the four duties that p2p.driver has
    desk.py       what only a leader does: claims, leases, mending the voter set
    disk.py       its disk; model.py: its state machine, or real.py: the real queue and the real leases
    requests.py   clients and workers, and what they ask
    nemesis.py    the faults; exams.py: one exact disturbance of a healthy cluster, with a bound for its end
    checkers.py   what must never be true: each a small class that is told what happened, knows no simulator
    watch.py      tells the checkers, from the true disks
    bugs.py       classic mistakes, planted in the real classes: each must be found
    campaign.py   many seeds on all cores; shrink.py makes a failing one short and readable

A schedule is its seed and its profile; the same two give the same events, whatever PYTHONHASHSEED is. The command is
scripts/simulate; what it once found is replayed from tests/seeds, and in as few steps as show it in test_found.py.
"""
