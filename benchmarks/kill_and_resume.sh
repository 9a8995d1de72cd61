#!/usr/bin/env bash
# Trains through Ray, kills the driver in mid-run (kill -9), runs the same command again, and prints both summaries.
#   STORAGE=<dir> KILL_AT=<step> benchmarks/kill_and_resume.sh parallelism=tp2_dp1 model=qwen2_7b ...
# The checkpoint interval must lie below KILL_AT. A full state is 12 bytes a parameter, and two are there for a moment.
set -u
cd "$(dirname "$0")/.."
storage=${STORAGE:?} kill_at=${KILL_AT:?}
command=(python3 launch.py checkpoint.storage_path="$storage" experiment_name=kill_and_resume "$@")

last_step() { tail -1 "$storage/kill_and_resume/metrics.jsonl" 2>/dev/null | grep -o '"step": [0-9]*' | tr -dc 0-9; }

watch_memory() { # the most that any worker has held in host memory
  local most=0 now
  while sleep 0.5; do
    now=$(ps -eo rss,args | awk '/ray::RayTrainWorker/ && !/awk/ {if ($1 > m) m = $1} END {printf "%d", m / 1048576}')
    [ "${now:-0}" -gt $most ] && most=$now && echo "a worker holds $most GiB of host memory"
  done
}
watch_memory &
trap "kill $!" EXIT
echo "\$ ${command[*]}"
"${command[@]}" &
driver=$!
while kill -0 $driver 2>/dev/null; do
  step=$(last_step); [ "${step:-0}" -ge "$kill_at" ] && break
  sleep 0.2
done
kill -9 $driver && echo "killed -9 at step $(last_step)"
wait $driver 2>/dev/null
sleep 5                          # workers notice within 4 s
df -h "$storage" | tail -1
echo "\$ ${command[*]}"
"${command[@]}"
cat "$storage/kill_and_resume/summary.json" "$storage/kill_and_resume/metrics.jsonl"
