# Debian's libraries, where CLASSPATH names no others.
if [[ -z ${CLASSPATH:-} ]]; then
  CLASSPATH=$(printf '%s:' /usr/share/java/{grpc-api,grpc-context,grpc-core,grpc-netty,grpc-protobuf,grpc-protobuf-lite,grpc-stub}.jar \
    /usr/share/java/{protobuf,proto-google-common-protos,guava,gson,jsr305,perfmark-api,opencensus-api,geronimo-annotation-1.3-spec}.jar \
    /usr/share/java/netty-{buffer,codec,codec-http,codec-http2,common,handler,handler-proxy,resolver,transport}.jar)classes
fi
export CLASSPATH
