"""A run is its directory, `runs/NAME`: this is the protocol between its launcher, its job and those who look at it.

Nothing else remembers a run, so a folder that is copied or moved is still the whole run. Processes of one run talk
through these files only. Files that are replaced are replaced as a whole: a reader sees the old one or the new one.

| File | Who writes it, and when |
|---|---|
| `recipe.yaml` | the launcher, at each launch; a folder with this file is a run |
| `command` | the launcher adds the line that was typed, at each launch |
| `environment.json`, `executor.json`, `sources.json` | the launcher, at each launch: code, packages and the \
working directory; where the run is sent; where each value of the recipe was set |
| `plan.json` | the launcher, at each launch: the memory and speed that the plan predicts, and for which GPU; then the \
job's first process when it begins, for the GPU that it has |
| `job.sh`, `sbatch.sh`, `code/` | the launcher, at each launch: what the job runs |
| `job_id` | the launcher, when the job is handed over: the scheduler's id, then the number of the attempt |
| `status` | the launcher at each launch (PENDING), then the job's first process alone; see below |
| `stop` | whoever wants the run to save its step and leave: signals, `runs cancel`; deleted by the launcher at each \
launch, and by the job when an attempt begins or has obeyed |
| `log.txt`, `logs/` | the job: what the first process printed, and the others; all attempts, one after the other |
| `logs/*.outcome` | each process that does not end well, for those on other nodes; deleted when an attempt begins |
| `scheduler.txt` | the scheduler: what it printed outside the job |
| `metrics.csv`, `checkpoints/`, `attention.json`, `tokenizer.json`, `resumed_from`, `wandb_id`, \
`wandb_url`, `mlflow_id`, `early_end` | the job at work |
| `.lock` | locked by the launcher while it writes, and by the job's first process while it works, which touches it |
| `.launcher` | locked by the launcher of an attached job for as long as that lives |

States, in `status`; `State` says what each means:

| From | To | Who writes it |
|---|---|---|
| no run, or an ended one | PENDING, with the next attempt's number, which is also its `submission` | the launcher |
| PENDING | FAILED, if the job could not be handed over | the launcher |
| PENDING | RUNNING, the same attempt | the job |
| any but PENDING, without a launch: queued again, or by hand | RUNNING, one attempt more | the job |
| RUNNING | SUCCEEDED, FAILED, CANCELLED, or INTERRUPTED, to be queued again | the job |
| any that has not ended | CANCELLED or DIED | `runs cancel`, after it has killed the job or with `--force` |

An attempt's number tells what is new from what is old, whatever the clocks say: `job_id` is that of the newest job if
it names the status's `submission`, and a stop request is of an earlier job if its attempt is lower than that. Files of
versions that wrote no numbers count as new until the next launch. Times of files are used as signs of life and as ages.

What a look finds is not always what was written: a run that says it goes on, and has no process, has DIED
(`RunDirectory.status`); where a scheduler has its job, `fiddlehead.launch.reconcile` says what follows from both.

What is left when something is killed:

- The launcher: before the job is handed over, the run is PENDING without a process, so it is found to have died.
  Afterwards a detached job, or one in a queue, goes on; an attached one sees that `.launcher` is free, saves its step
  and ends. Between handing over and `job_id`, the run seems to have died until the job begins and writes its status.
- The job: `status` says RUNNING, and the kernel lets go of `.lock`. The checkpoints are whole, the next attempt goes on
  from the newest good one and counts a failure; the log may end in half a line, and the metrics in half a row.
- The machine: as for the job. From another machine the run is found to have died when `.lock` was not touched for
  `alive.MISSING` seconds; a scheduler may know it sooner, and may queue the job again.
"""

from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.names import find_run, list_runs
from fiddlehead.run.status import State, Status

__all__ = ["RunDirectory", "State", "Status", "find_run", "list_runs"]
