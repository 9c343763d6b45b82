#!/bin/sh
# Ends what start.sh FOLDER began.
for name in slurmd slurmctld munged; do
    kill "$(cat "$1/$name.pid")" || true
done
rm /etc/slurm/slurm.conf
