"""The runner: one small daemon per node that owns job processes, so that the orchestrator may die before they do.

    orchestrator                     runner (this package, a process of its own)                    jobs
    ------------                     ------------------------------------------------               ----
    client.py ----- runner.sock ---> session.py -> daemon.py --start--> recorder.py --intent--> store.py (runner.db)
       ^  ^                                            |                     |
       |  '-- reports (at least once, until acked) ----'                     v admitted
       |                                                               supervisor.py -> spawn.py --> leader
       |                                                                  |   ^                        '- strays
       '-- connect(): all that runs or is not acked    end on disk <------'   '-- SIGCHLD, wait4 <-------'

    beside it: logs.py caps stdout and stderr (stream.py: as they lie on disk, for its readers), memory.py watches
    limits that no cgroup holds (groups.py), activity.py samples signs of life, orphans.py clears up after a killed
    runner (chores.py runs these); family.py says whose a process is, processes.py what the kernel knows of it,
    kernel_log.py whom its OOM killer ended; launch.py and serve.py start the daemon.

Theory of operation.  A process's exit status goes to its parent and to nobody else, so whoever starts a job must
outlive it.  The orchestrator is large, changes often and is restarted by hand; the runner is small and does one thing.
The two share no memory and no descriptors: a Unix socket, and a table of attempts that is the outbox of their ends.

Invariants (each has a test):

1. An attempt (job, number) is spawned at most once, however often it is asked for: also after it ended, also after its
   end was acknowledged (for the last 10,000), also across a restart of the runner.
2. Its row is on record before its process exists; its end is on disk before it is told, and told until acknowledged.
3. A job is its leader and everything that came of it.  It has ended when all of that is gone.
4. No signal goes to a process or group that could be a stranger with a recycled id.
5. A job sees exactly the environment it was given, no descriptor of the runner's, and default signals.
6. What is wrong with a job (no such program, no permission, no directory) is an end with a sentence, not an exception.
7. A client's illegal message costs that client its connection, and nothing else.
8. If the runner itself is killed, the next one ends what is left and says so: ``runner_lost``.
9. A job that uses more memory than its limit is ended, all of it, and says so: ``memory_limit``; nobody else is.
10. The offset of a byte in a log never changes, whatever the cap drops.

Import from ``p2p.runner.client``; this module imports nothing, as the daemon's memory is counted in every node's.
Reads next: ``protocol.py`` for the words, ``supervisor.py`` for the life of an attempt.
"""
