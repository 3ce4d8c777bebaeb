"""The background loops of a node, on one anatomy (`base.Loop`); the daemon manager supervises them.

`job_loops`: the worker's pull loop and the leader's reaper. `queue_loops`: populator and maintenance. `health_loops`:
alerts. The rules they carry out live in `coordination`; here is only when.
"""
