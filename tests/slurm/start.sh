#!/bin/sh
# A SLURM of one node, all of it in the folder $1 but for a link in /etc/slurm, which Snakemake's jobs look for alone.
# Needs Debian's packages munge, slurmctld, slurmd and slurm-client, and root; no systemd, no accounting.
set -eu
folder=$(realpath "$1")
mkdir -p "$folder/state" "$folder/spool"
chmod 755 "$folder"
dd if=/dev/urandom of="$folder/munge.key" bs=128 count=1 2>/dev/null
chmod 600 "$folder/munge.key"
munged --force --socket="$folder/munge.socket" --key-file="$folder/munge.key" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munged.log" --seed-file="$folder/munged.seed"
sed -e "s|@FOLDER@|$folder|g; s|@HOST@|$(hostname -s)|g; s|@USER@|$(id -un)|g" "$(dirname "$0")/slurm.conf" \
    > "$folder/slurm.conf"
ln -s "$folder/slurm.conf" /etc/slurm/slurm.conf
slurmctld
slurmd -N localhost
timeout 30 sh -c 'until sinfo -h -o %T | grep -q idle; do sleep 0.2; done'
