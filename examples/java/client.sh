#!/usr/bin/env bash
# client.sh HOST:PORT COMMAND [TEXT], after build.sh.
set -euo pipefail
cd "$(dirname "$0")"
. ./classpath.sh
exec java stepwire.example.Client "$@"
