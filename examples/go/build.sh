#!/usr/bin/env bash
# Builds ./client. PROTO is stepwire's proto/ directory, GOOGLEAPIS one that has google/rpc/error_details.proto.
set -euo pipefail
cd "$(dirname "$0")"
PROTO=${PROTO:-../../proto}
: "${GOOGLEAPIS:?set it to a directory that has google/rpc/error_details.proto: README.md says where to find one}"
package=Mstepwire/v1/inference.proto=stepwire.example/client/stepwirepb
protoc -I "$PROTO" -I "$GOOGLEAPIS" \
  --go_out=. --go_opt="$package",module=stepwire.example/client \
  --go-grpc_out=. --go-grpc_opt="$package",module=stepwire.example/client \
  stepwire/v1/inference.proto
if [[ ${GO111MODULE:-} != off ]]; then
  go mod tidy
fi
go vet .
go build -o client .
