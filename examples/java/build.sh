#!/usr/bin/env bash
# Compiles the client into ./classes. PROTO is stepwire's proto/ directory, GOOGLEAPIS one that has
# google/rpc/error_details.proto, GRPC_PROTO one that has grpc/health/v1/health.proto; CLASSPATH names the libraries.
set -euo pipefail
cd "$(dirname "$0")"
PROTO=${PROTO:-../../proto}
GRPC_PROTO=${GRPC_PROTO:-/usr/share/grpc-proto}
: "${GOOGLEAPIS:?set it to a directory that has google/rpc/error_details.proto: README.md says where to find one}"
. ./classpath.sh
mkdir -p generated classes
protoc -I "$PROTO" -I "$GOOGLEAPIS" -I "$GRPC_PROTO" \
  --plugin=protoc-gen-grpc-java="$(command -v grpc_java_plugin)" --java_out=generated --grpc-java_out=generated \
  stepwire/v1/inference.proto grpc/health/v1/health.proto grpc/reflection/v1alpha/reflection.proto
find generated -name '*.java' -exec javac -nowarn -d classes Client.java {} +
