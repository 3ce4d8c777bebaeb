-- Every statement of the queue, by name. `-- name: X` begins one; what follows on that line says what it is for.

-- name: insert_job | a new job
INSERT INTO jobs (seq, id, kind, grp, state, priority, shape, max_attempts, backoff_ms, timeout_ms, blockers, ready_ms,
                  moves, created_ms, unique_key, reason, spec, no_retry)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 1, ?, ?, ?, ?, ?)

-- name: insert_history | one transition
INSERT INTO history (seq, n, at_ms, state, attempt, worker, reason) VALUES (?, ?, ?, ?, ?, ?, ?)

-- name: trim_history | forget a transition from the middle of a long story; the first ones stay
DELETE FROM history WHERE seq = ? AND n = ?

-- name: job_row | what every rule needs to know of a job, by id
SELECT seq, id, kind, grp, state, shape, attempt, failures, max_attempts, backoff_ms, moves, worker, ready_ms, blockers
FROM jobs WHERE id = ?

-- name: job_row_by_seq | the same, by number
SELECT seq, id, kind, grp, state, shape, attempt, failures, max_attempts, backoff_ms, moves, worker, ready_ms, blockers
FROM jobs WHERE seq = ?

-- name: unfinished_by_key | the job or the array that holds a unique key now
SELECT id FROM jobs WHERE unique_key = ?1 AND state IN ('waiting', 'pending', 'claimed', 'running') UNION ALL
SELECT id FROM arrays WHERE unique_key = ?1 AND finished_ms IS NULL

-- name: put_schedule | a schedule, new or in place of the one of its name
INSERT INTO schedules (name, body, origin, due_ms, changed_ms) VALUES (?1, ?2, ?3, ?4, ?5)
ON CONFLICT DO UPDATE SET body = ?2, origin = ?3, due_ms = ?4, changed_ms = ?5, note = ''

-- name: ran_schedule | a due time is dealt with
UPDATE schedules SET due_ms = ?, runs = runs + ?, skipped = skipped + ?, last_due_ms = ?,
                     last_job = coalesce(?, last_job), note = ? WHERE name = ?

-- name: due_schedules | what is to be run now
SELECT name, due_ms, body FROM schedules INDEXED BY schedules_due WHERE due_ms > 0 AND due_ms <= ? ORDER BY due_ms, name

-- name: schedules | all of them
SELECT name, body, origin, due_ms, changed_ms, runs, skipped, last_due_ms, last_job, note FROM schedules ORDER BY name

-- name: insert_array | a new array
INSERT INTO arrays (seq, id, size, indexes, kind, grp, unique_key, created_ms, template)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)

-- name: array_row | the books of one array
SELECT seq, id, size, indexes, kind, grp, unique_key, state, reason, finished_ms, blockers, closed, made, parked, pruned,
       waiting, pending, claimed, running, completed, failed, cancelled
FROM arrays WHERE seq = ?

-- name: save_array | its books as they are now
UPDATE arrays SET state = ?, reason = ?, finished_ms = ?, blockers = ?, closed = ?, made = ?, parked = ?, pruned = ?,
                  waiting = ?, pending = ?, claimed = ?, running = ?, completed = ?, failed = ?, cancelled = ?
WHERE seq = ?

-- name: members_in | the members of an array in one state
SELECT seq FROM jobs INDEXED BY jobs_by_state WHERE state = ? AND seq > ? AND seq <= ? ORDER BY seq LIMIT ?

-- name: open_arrays | arrays that a clear closes
SELECT seq FROM arrays INDEXED BY arrays_unfinished WHERE finished_ms IS NULL AND seq <= ? ORDER BY seq

-- name: empty_arrays | finished arrays without any job, old enough to forget
SELECT seq FROM arrays INDEXED BY arrays_empty WHERE finished_ms IS NOT NULL AND made = pruned AND finished_ms < ?
ORDER BY finished_ms, seq LIMIT ?

-- name: claim_job | begin an attempt
UPDATE jobs SET state = 'claimed', attempt = attempt + 1, token = ?, worker = ?, gpus = ?, claimed_ms = ?,
                started_ms = NULL, finished_ms = NULL, exit_code = NULL, moves = moves + 1, reason = NULL
WHERE seq = ? AND state = 'pending'
RETURNING id, kind, grp, shape, attempt, timeout_ms, moves, spec, priority, checkpoint

-- name: insert_member | one rank of a gang's new attempt
INSERT INTO members VALUES (?, ?, ?, ?, ?, 'claimed', NULL, NULL)

-- name: member_of | whether, and as what, a worker takes part in an attempt
SELECT rank, state FROM members WHERE seq = ? AND attempt = ? AND worker = ?

-- name: begin_member | its process runs
UPDATE members SET state = 'running', started_ms = ? WHERE seq = ? AND rank = ? AND state = 'claimed'

-- name: end_member | its process has ended well
UPDATE members SET state = 'ended', result = ? WHERE seq = ? AND rank = ?

-- name: members_left | how many of an attempt's members have not ended
SELECT count(*) FROM members WHERE seq = ? AND attempt = ? AND state <> 'ended'

-- name: first_result | what rank 0 left
SELECT result FROM members WHERE seq = ? AND rank = 0

-- name: members | who takes part in a gang's newest attempt
SELECT rank, attempt, worker, gpus, state, started_ms FROM members WHERE seq = ? ORDER BY rank

-- name: gangs_of | the gangs that a worker takes part in now
SELECT j.id FROM members m INDEXED BY members_of JOIN jobs j ON j.seq = m.seq
WHERE m.worker = ? AND m.state <> 'ended' AND j.attempt = m.attempt AND j.state IN ('claimed', 'running')
ORDER BY m.seq

-- name: mark_node | what is said of a node
INSERT INTO nodes VALUES (?1, ?2, ?3, ?4, ?5, ?6)
ON CONFLICT DO UPDATE SET cordoned = ?2, draining = ?3, deadline_ms = ?4, since_ms = ?5, reason = ?6

-- name: nodes | the nodes of which something is said
SELECT node, cordoned, draining, deadline_ms, since_ms, reason FROM nodes ORDER BY node

-- name: begin_job | its process runs
UPDATE jobs SET state = 'running', started_ms = ?, moves = moves + 1 WHERE seq = ?

-- name: end_job | completed, failed or cancelled
UPDATE jobs SET state = ?1, finished_ms = ?2, started_ms = coalesce(started_ms, ?3), result = ?4, error = ?5,
                exit_code = ?6, failures = ?7, reason = ?8, moves = ?9,
                checkpoint = iif(?1 = 'completed', NULL, checkpoint) WHERE seq = ?10

-- name: requeue_job | back to pending or waiting
UPDATE jobs SET state = ?, ready_ms = ?, failures = ?, error = coalesce(?, error), exit_code = ?, reason = ?,
                worker = NULL, gpus = NULL, moves = ? WHERE seq = ?

-- name: restart_job | a retry by hand: all attempts anew
UPDATE jobs SET state = ?, ready_ms = 0, failures = 0, blockers = ?, error = NULL, exit_code = NULL,
                result = NULL, finished_ms = NULL, worker = NULL, gpus = NULL, reason = ?, moves = ? WHERE seq = ?

-- name: leave_checkpoint | what an attempt that did not complete leaves to the next one
UPDATE jobs SET checkpoint = ? WHERE seq = ?

-- name: job_hints | what decides whether and where a failed job is tried again
SELECT no_retry, asked, failed_on FROM jobs WHERE seq = ?

-- name: reshape_job | other requirements: its author's with hints for placement, or its author's again
UPDATE jobs SET shape = ?, asked = ?, failed_on = ? WHERE seq = ?

-- name: due_jobs | waiting jobs whose time has come
SELECT seq FROM jobs INDEXED BY jobs_due WHERE state = 'waiting' AND blockers = 0 AND ready_ms <= ?
ORDER BY ready_ms, seq LIMIT ?

-- name: next_due | when the next waiting job is due
SELECT min(ready_ms) FROM jobs INDEXED BY jobs_due WHERE state = 'waiting' AND blockers = 0

-- name: wake_job | its time has come
UPDATE jobs SET state = 'pending', moves = moves + 1, reason = NULL WHERE seq = ?
RETURNING id, kind, grp, shape, attempt, moves

-- name: set_blockers | a dependency is done
UPDATE jobs SET blockers = ? WHERE seq = ?

-- name: shorten_backoffs | after a clock was put right: no backoff ends later than the longest there is
UPDATE jobs SET ready_ms = ? WHERE state = 'waiting' AND blockers = 0 AND reason LIKE 'retry:%' AND ready_ms > ?

-- name: dependents | who waits for this job
SELECT seq FROM deps WHERE dep = ? ORDER BY seq

-- name: ready_heads | the best pending jobs of a shape
SELECT seq, priority FROM jobs INDEXED BY jobs_ready WHERE state = 'pending' AND shape = ?
ORDER BY priority DESC, seq LIMIT ?

-- name: ahead | how many pending jobs go before one of this priority and number, as far as priority and age go
SELECT count(*) FROM jobs INDEXED BY jobs_ready
WHERE state = 'pending' AND (priority > ?1 OR (priority = ?1 AND seq < ?2))

-- name: unstarted_slice | what a clear drops
SELECT seq FROM jobs INDEXED BY jobs_by_state WHERE state = ? AND seq <= ? ORDER BY seq LIMIT ?

-- name: held_by | the jobs a worker has, but for gangs: see gangs_of
SELECT id FROM jobs j INDEXED BY jobs_held WHERE worker = ? AND state IN ('claimed', 'running')
AND NOT EXISTS (SELECT 1 FROM members m WHERE m.seq = j.seq AND m.attempt = j.attempt) ORDER BY seq

-- name: done_before | finished jobs old enough to forget
SELECT seq, finished_ms FROM jobs INDEXED BY jobs_done WHERE state = ? AND state IN ('completed', 'failed', 'cancelled') AND finished_ms < ?
ORDER BY finished_ms, seq LIMIT ?

-- name: keys_beyond | the idempotency keys beyond the number kept, oldest first to go
DELETE FROM keys WHERE key IN (SELECT key FROM keys INDEXED BY keys_age ORDER BY at_ms DESC, key DESC LIMIT -1 OFFSET ?)

-- name: add_count | a sum moves; 0 is then deleted
INSERT INTO counts VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO UPDATE SET n = n + ?4 RETURNING n

-- name: add_shape_count | the same for pending jobs by shape
INSERT INTO shape_counts VALUES (?1, ?2) ON CONFLICT DO UPDATE SET n = n + ?2 RETURNING n

-- name: all_held | every attempt in progress, for a leader that begins its term
SELECT j.id, j.attempt, coalesce(m.worker, j.worker), j.kind, j.state, j.claimed_ms,
       iif(m.rank IS NULL, j.started_ms, m.started_ms),
       j.timeout_ms, j.spec, j.priority, (SELECT requires FROM shapes s WHERE s.shape = j.shape),
       coalesce(m.gpus, j.gpus), coalesce(m.rank, 0), m.rank IS NOT NULL
FROM jobs j INDEXED BY jobs_by_state LEFT JOIN members m ON m.seq = j.seq AND m.attempt = j.attempt
WHERE j.state = ? AND coalesce(m.state, '') <> 'ended' ORDER BY j.seq, m.rank

-- name: job_record | everything about one job
SELECT seq, id, kind, grp, state, priority, (SELECT requires FROM shapes s WHERE s.shape = j.shape), attempt, failures,
       max_attempts, backoff_ms, timeout_ms, blockers, ready_ms, created_ms, claimed_ms, started_ms, finished_ms, worker,
       gpus, unique_key, reason, error, exit_code, token, spec, result, no_retry, asked, checkpoint
FROM jobs j WHERE id = ?

-- name: job_history | its story
SELECT n, at_ms, state, attempt, worker, reason FROM history WHERE seq = ? ORDER BY n

-- name: array_record | everything about one array
SELECT seq, id, size, indexes, kind, grp, unique_key, state, reason, finished_ms, blockers, closed, made, parked, pruned,
       waiting, pending, claimed, running, completed, failed, cancelled, created_ms, template
FROM arrays WHERE id = ?

-- name: recent_failures | newest first
SELECT id, kind, worker, attempt, error, exit_code, finished_ms FROM jobs INDEXED BY jobs_done
WHERE state = 'failed' AND state IN ('completed', 'failed', 'cancelled') ORDER BY finished_ms DESC, seq DESC LIMIT ?

-- name: failed_before | a slice of the failed jobs, newest first
SELECT id, kind, grp, finished_ms, seq FROM jobs INDEXED BY jobs_done
WHERE state = 'failed' AND state IN ('completed', 'failed', 'cancelled') AND finished_ms <= ?
  AND (finished_ms, seq) < (?, ?) AND finished_ms >= ? ORDER BY finished_ms DESC, seq DESC LIMIT ?

-- name: last_done | when a job last ended so
SELECT max(finished_ms) FROM jobs INDEXED BY jobs_done
WHERE state = ? AND state IN ('completed', 'failed', 'cancelled')

-- name: oldest_pending | how long the oldest has waited
SELECT created_ms FROM jobs INDEXED BY jobs_by_state WHERE state = 'pending' ORDER BY seq LIMIT 1

-- name: counts | jobs by state, kind and group
SELECT state, kind, grp, n FROM counts WHERE n > 0

-- name: shape_counts | pending jobs by shape
SELECT c.shape, c.n, s.requires FROM shape_counts c JOIN shapes s ON s.shape = c.shape WHERE c.n > 0 ORDER BY c.shape

-- name: minutes_since | ends by minute
SELECT minute, kind, what, n FROM minutes WHERE minute >= ?

-- name: totals | ends since the queue was made
SELECT kind, what, n FROM totals

-- name: workers | the books of every worker
SELECT w.worker, w.completed, w.failed,
       (SELECT count(*) FROM jobs j INDEXED BY jobs_held WHERE j.worker = w.worker AND j.state IN ('claimed', 'running')
        AND NOT EXISTS (SELECT 1 FROM members m WHERE m.seq = j.seq AND m.attempt = j.attempt))
       + (SELECT count(*) FROM members m INDEXED BY members_of JOIN jobs j ON j.seq = m.seq
          WHERE m.worker = w.worker AND m.state <> 'ended' AND j.attempt = m.attempt
          AND j.state IN ('claimed', 'running'))
FROM workers w ORDER BY w.worker
