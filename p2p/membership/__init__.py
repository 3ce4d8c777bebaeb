"""Who is alive: SWIM gossip with Lifeguard's refinements. It reports; it never reassigns work and never edits the
voter set (PROTOCOL §2.25). Voters find each other's failures by Raft heartbeats, far sooner.

Theory of operation. Every second a node pings one member, in shuffled rounds. No answer in half of it: three others are
asked to try. Still none: the member is *suspect*, and everybody is told. A suspect that hears of it refutes by raising
its incarnation; otherwise it is *dead* once the suspicion has run out, the sooner the more members have confirmed it.
News rides on what is sent anyway and, while there is any, on a message to three random members every 200 ms. What
gossip misses, the full comparison with one member every 30 s finds: a 16-byte digest, and states only if it differs.

::

                  no answer, not even through others            suspicion ran out
      ┌───────┐ ─────────────────────────────────> ┌─────────┐ ──────────────────> ┌──────┐
      │ alive │                                    │ suspect │                     │ dead │
      └───────┘ <───────────────────────────────── └─────────┘                     └──────┘
        │   ^      refuted: incarnation + 1                                            │
        │   └──────────────────────────────────────────────────────────────────────────┘
        │  says farewell       ┌──────┐       came back: a higher incarnation (a new process, or a healed partition)
        └────────────────────> │ left │ ── alive again only as a new process; 24 h later both are forgotten
                               └──────┘

A node that is itself slow must not accuse others. *Awareness* (0 to 8) grows with unanswered probes, missing nacks, own
refutations and a late event loop; it stretches the node's probes, and from 4 on the node suspects nobody. A node that
notices that it slept gives everything it was waiting for that time again.

An *outbound-only* member (address None: behind NAT) is never called. It pings three *anchors* in turn, chosen by
rendezvous hash, and hears the news in their replies; who wants to probe it asks an anchor; it is suspect only when all
its anchors report it gone.

The *leader hint* (term, leader, address) is in every message; a newer one is passed on at once.

Joining. ``Join`` to a seed -> ``Welcome`` with everybody, or ``Refuse`` with the reason and the fix: another cluster,
clocks 30 s apart, a node id that a living process has. A *blank* node (cluster "") exchanges joins and pings only, with
blank ones everything; ``Joined`` tells it which cluster it was let into, and ``SetCluster`` makes it so. A process that
restarts overrides its earlier life (it starts with the time as incarnation); two living processes under one name find
each other, and the newer one is told (``Conflict``).

Invariants (checked after every step under test): of two records of a node the greater is believed, and "greater" is a
total order, so belief does not depend on the order of arrival; every suspect has one clock; a round is due exactly
while there is something to tell; a node is alive in its own view until it leaves; derived tables agree with the table;
every buffer has a limit, named in `figures`.

In reading order: `figures` (every number), `member` (a record, which wins), `hint`, `message` (what is said, the wire),
`events` (in and out), `core` (decides). The ideas apart: `suspicion`, `awareness`, `broadcast`, `rota` (whose turn),
`roster` (the table), `anchors`, `timers`, `pending`. `simulated` runs many cores on one virtual clock; the real shell
is `p2p.transport.gossip`.

For a shell::

    core = MembershipCore(first_record(...), random.Random(), now)
    for effect in core.step(event, now): ...      # events and effects: `events`
    core.next_deadline()                          # step(Tick(), then) at the latest

Sources: Das, Gupta, Motivala, "SWIM" (2002); Dadgar, Phillips, Currey, "Lifeguard" (2017); hashicorp/memberlist.
"""
