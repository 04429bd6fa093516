#!/bin/sh
# Have a model source turned into what the services read, and let VOLUME/served point to the result: a path that worker
# and control plane know before anybody has chosen a model. A model that was prepared before is only checked.
#
#   prepare_model.sh VOLUME SOURCE [flags of python -m gpu_worker.prepare]
set -eu
volume=$1
shift
directory=$(python -m gpu_worker.prepare "$@" --cache-dir "$volume/converted")
ln -sfn "$directory" "$volume/served"
echo "$volume/served -> $directory"
