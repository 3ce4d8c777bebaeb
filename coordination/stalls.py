"""Which attempts are stalled now: those in progress with a reason (`LeaseTable.stuck`), and jobs with GPUs sooner.

A GPU that idles costs more than a core that does, and a job that waits for a collective which never ends looks alive to
whoever counts CPU time. So a job with GPUs is told as stalled after ten minutes without GPU use, output, progress or
work beyond waiting (what counts is its node's word: `p2p.gpu_jobs.CpuWork`), others after the hour of `stuck`. Being
told is all: attempts are given up by the reaper, by its own threshold.
"""

from __future__ import annotations

from coordination.dispatcher import Dispatcher
from coordination.leases import Claimant, Verdict


class Stalls:
    """Remembers of the attempts that have been silent for long which of them have GPUs."""

    def __init__(self, desk: Dispatcher, *, gpu_idle_seconds: float = 600.0) -> None:
        self._desk, self._gpu_idle_ms = desk, int(gpu_idle_seconds * 1000)
        self._has_gpus: dict[Claimant, bool] = {}

    async def now(self, threshold_ms: int) -> list[Verdict]:
        """Longest in progress first."""
        found = {verdict.held.job: verdict for verdict in self._desk.stuck(threshold_ms)}
        if self._gpu_idle_ms < threshold_ms:
            for verdict in await self._idle(set(found)):
                found[verdict.held.job] = verdict
        return sorted(found.values(), key=lambda verdict: (verdict.held.claimed_ms, verdict.held.job))

    async def _idle(self, known: set[str]) -> list[Verdict]:
        silent = [v for v in self._desk.stuck(self._gpu_idle_ms) if v.cause == "no_sign_of_life"]
        names = {v.held.job: Claimant(v.held.job, v.held.attempt) for v in silent if v.held.job not in known}
        asked = {name: self._has_gpus[name] for name in names.values() if name in self._has_gpus}
        for name in names.values():
            if name not in asked:
                asked[name] = await self._uses_gpus(name.job)
        self._has_gpus = asked  # the others have shown life or ended
        return [_in_words(v) for v in silent if asked.get(Claimant(v.held.job, v.held.attempt))]

    async def _uses_gpus(self, job: str) -> bool:
        record = await self._desk.ask(lambda reader: reader.job(job, history=False))
        return record is not None and bool(record["requires"].get("gpus"))


def _in_words(verdict: Verdict) -> Verdict:
    quiet = (verdict.held.renewed_at - verdict.held.alive_at) / 1000
    return verdict._replace(reason=f"its GPUs idle below 5 %, and no output, progress or work, for {quiet:.0f} s")
