package stepwire.example;

import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.BadRequest;
import com.google.rpc.RetryInfo;
import io.grpc.CallOptions;
import io.grpc.Channel;
import io.grpc.ClientCall;
import io.grpc.ClientInterceptor;
import io.grpc.ClientInterceptors;
import io.grpc.Context;
import io.grpc.ForwardingClientCall.SimpleForwardingClientCall;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.grpc.StatusRuntimeException;
import io.grpc.health.v1.HealthCheckRequest;
import io.grpc.health.v1.HealthGrpc;
import io.grpc.protobuf.StatusProto;
import io.grpc.reflection.v1alpha.ServerReflectionGrpc;
import io.grpc.reflection.v1alpha.ServerReflectionRequest;
import io.grpc.reflection.v1alpha.ServerReflectionResponse;
import io.grpc.stub.StreamObserver;
import java.security.SecureRandom;
import java.util.HexFormat;
import java.util.Iterator;
import java.util.Locale;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.TimeoutException;
import stepwire.v1.InferenceServiceGrpc;
import stepwire.v1.Inference.ChatInput;
import stepwire.v1.Inference.ChatMessage;
import stepwire.v1.Inference.ContentPart;
import stepwire.v1.Inference.EmbedRequest;
import stepwire.v1.Inference.GenerateRequest;
import stepwire.v1.Inference.GenerateResponse;
import stepwire.v1.Inference.PooledInput;
import stepwire.v1.Inference.SequenceDelta;
import stepwire.v1.Inference.StopConditions;

/**
 * stepwire's gRPC API from Java: HOST:PORT COMMAND [TEXT]; README.md has the commands. STEPWIRE_API_KEY holds the key, if
 * one is set.
 */
public final class Client {
  private static final String SERVICE = "stepwire.v1.InferenceService";
  private static final long DEADLINE_MS = 60_000;
  private static final long SHORT_DEADLINE_MS = 2_000;
  private static final StopConditions FEW_TOKENS = StopConditions.newBuilder().setMaxTokens(64).build();
  private static final StopConditions MANY_TOKENS =
      StopConditions.newBuilder().setMaxTokens(3000).setIgnoreEos(true).build();

  /** Sends the key, and a trace of one's own as W3C's traceparent, with every call. */
  private static final class CallMetadata implements ClientInterceptor {
    private static Metadata.Key<String> key(String name) {
      return Metadata.Key.of(name, Metadata.ASCII_STRING_MARSHALLER);
    }

    @Override
    public <Q, A> ClientCall<Q, A> interceptCall(MethodDescriptor<Q, A> method, CallOptions options, Channel next) {
      return new SimpleForwardingClientCall<>(next.newCall(method, options)) {
        @Override
        public void start(Listener<A> listener, Metadata headers) {
          byte[] ids = new byte[24];
          new SecureRandom().nextBytes(ids);
          HexFormat hex = HexFormat.of();
          headers.put(key("traceparent"), "00-" + hex.formatHex(ids, 0, 16) + "-" + hex.formatHex(ids, 16, 24) + "-01");
          String apiKey = System.getenv("STEPWIRE_API_KEY");
          if (apiKey != null && !apiKey.isEmpty()) {
            headers.put(key("authorization"), "Bearer " + apiKey);
          }
          super.start(listener, headers);
        }
      };
    }
  }

  private static void checkHealth(Channel channel) {
    HealthCheckRequest request = HealthCheckRequest.newBuilder().setService(SERVICE).build();
    var stub = HealthGrpc.newBlockingStub(channel).withDeadlineAfter(5, TimeUnit.SECONDS);
    System.out.println(stub.check(request).getStatus());
  }

  /** Prints the status now, and each that follows, until the server goes or Ctrl-C: no deadline on this call. */
  private static void watchHealth(Channel channel) {
    HealthCheckRequest request = HealthCheckRequest.newBuilder().setService(SERVICE).build();
    HealthGrpc.newBlockingStub(channel).watch(request).forEachRemaining(answer -> System.out.println(answer.getStatus()));
  }

  private static void listServices(Channel channel)
      throws ExecutionException, InterruptedException, TimeoutException {
    CompletableFuture<ServerReflectionResponse> answer = new CompletableFuture<>();
    StreamObserver<ServerReflectionRequest> requests =
        ServerReflectionGrpc.newStub(channel)
            .withDeadlineAfter(5, TimeUnit.SECONDS)
            .serverReflectionInfo(
                new StreamObserver<>() {
                  @Override
                  public void onNext(ServerReflectionResponse response) {
                    answer.complete(response);
                  }

                  @Override
                  public void onError(Throwable error) {
                    answer.completeExceptionally(error);
                  }

                  @Override
                  public void onCompleted() {}
                });
    requests.onNext(ServerReflectionRequest.newBuilder().setListServices("").build());
    requests.onCompleted();
    answer.get(10, TimeUnit.SECONDS).getListServicesResponse().getServiceList()
        .forEach(service -> System.out.println(service.getName()));
  }

  /**
   * Prints the text as it comes. The call's deadline is the request's; cancelling the context that it runs in aborts it
   * within one step.
   */
  private static void generate(Channel channel, GenerateRequest request, long deadlineMs, boolean cancel) {
    Context.CancellableContext context = Context.current().withCancellation();
    context.run(
        () -> {
          var stub = InferenceServiceGrpc.newBlockingStub(channel).withDeadlineAfter(deadlineMs, TimeUnit.MILLISECONDS);
          Iterator<GenerateResponse> responses = stub.generate(request);
          while (responses.hasNext()) {
            GenerateResponse response = responses.next();
            for (SequenceDelta delta : response.getDeltasList()) {
              System.out.print(delta.getText());
              System.out.flush();
              if (cancel) {
                context.cancel(null);
              }
            }
            if (response.hasUsage()) {
              System.err.printf(
                  "%n%d + %d tokens%n",
                  response.getUsage().getNumPromptTokens(), response.getUsage().getNumCompletionTokens());
            }
            if (response.hasError()) {
              throw new IllegalStateException("failed: " + response.getError().getMessage());
            }
          }
        });
    context.cancel(null);
  }

  private static void embed(Channel channel, String text) {
    EmbedRequest request = EmbedRequest.newBuilder().addInputs(PooledInput.newBuilder().setText(text)).build();
    var stub = InferenceServiceGrpc.newBlockingStub(channel).withDeadlineAfter(DEADLINE_MS, TimeUnit.MILLISECONDS);
    var values = stub.embed(request).getEmbeddings(0).getValuesList();
    System.out.printf(Locale.ROOT, "%d %.4f %.4f %.4f%n", values.size(), values.get(0), values.get(1), values.get(2));
  }

  /** A refusal is a status with google.rpc details: which fields are wrong, when to try again. */
  private static void explain(StatusRuntimeException error) throws InvalidProtocolBufferException {
    System.err.printf("refused: %s: %s%n", error.getStatus().getCode(), error.getStatus().getDescription());
    com.google.rpc.Status status = StatusProto.fromThrowable(error);
    if (status == null) {
      return;
    }
    for (Any detail : status.getDetailsList()) {
      if (detail.is(BadRequest.class)) {
        for (var violation : detail.unpack(BadRequest.class).getFieldViolationsList()) {
          System.err.printf("  %s: %s%n", violation.getField(), violation.getDescription());
        }
      } else if (detail.is(RetryInfo.class)) {
        System.err.printf("  try again in %d s%n", detail.unpack(RetryInfo.class).getRetryDelay().getSeconds());
      }
    }
  }

  private static void run(Channel channel, String command, String text) throws Exception {
    GenerateRequest.Builder request = GenerateRequest.newBuilder();
    switch (command) {
      case "health" -> checkHealth(channel);
      case "watch" -> watchHealth(channel);
      case "reflect" -> listServices(channel);
      case "generate" -> generate(channel, request.setText(text).setStop(FEW_TOKENS).build(), DEADLINE_MS, false);
      case "chat" -> {
        ContentPart content = ContentPart.newBuilder().setText(text).build();
        ChatMessage message = ChatMessage.newBuilder().setRole("user").addContent(content).build();
        request.setChat(ChatInput.newBuilder().addMessages(message)).setStop(FEW_TOKENS);
        generate(channel, request.build(), DEADLINE_MS, false);
      }
      case "deadline" ->
          generate(channel, request.setText(text).setStop(MANY_TOKENS).build(), SHORT_DEADLINE_MS, false);
      case "cancel" -> generate(channel, request.setText(text).setStop(MANY_TOKENS).build(), DEADLINE_MS, true);
      case "embed" -> embed(channel, text);
      default -> throw new IllegalArgumentException("unknown command " + command + ": README.md has the commands");
    }
  }

  public static void main(String[] arguments) throws Exception {
    if (arguments.length < 2) {
      System.err.println("HOST:PORT COMMAND [TEXT]: README.md has the commands");
      System.exit(2);
    }
    ManagedChannel managed = ManagedChannelBuilder.forTarget(arguments[0]).usePlaintext().build();
    Channel channel = ClientInterceptors.intercept(managed, new CallMetadata());
    int exitCode = 0;
    try {
      run(channel, arguments[1], arguments.length > 2 ? arguments[2] : "");
    } catch (StatusRuntimeException error) {
      explain(error);
      exitCode = 1;
    } catch (ExecutionException error) {
      // Of the asynchronous stub.
      if (!(error.getCause() instanceof StatusRuntimeException status)) {
        throw error;
      }
      explain(status);
      exitCode = 1;
    } catch (IllegalStateException | IllegalArgumentException error) {
      System.err.println(error.getMessage());
      exitCode = 1;
    } finally {
      managed.shutdownNow().awaitTermination(5, TimeUnit.SECONDS);
    }
    System.exit(exitCode);
  }

  private Client() {}
}
