"""The batch runner: many clips, settings and prompts from one job file, on this machine or on a Ray cluster.

job_file.py    job files (YAML, CSV) and the jobs in them
roots.py       folder of the runs, on a disk
object_storage.py  the same in object storage, through fsspec
states.py      state and results of a job, from its run folder
job_run.py     one job from its beginning, or from where it was stopped
pool.py        jobs that wait, and those whose worker ended
local.py       worker processes of this machine
worker.py      such a process
cluster.py     workers on a Ray cluster
estimate.py    hours and disk space of the jobs to run
results.py     the results file (Parquet)
"""
