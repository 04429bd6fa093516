// stepwire's gRPC API from Go: client HOST:PORT COMMAND [TEXT]; README.md has the commands.
// STEPWIRE_API_KEY holds the key, if one is set.
package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"
	"google.golang.org/grpc/status"

	pb "stepwire.example/client/stepwirepb"
)

const (
	service       = "stepwire.v1.InferenceService"
	deadline      = time.Minute
	shortDeadline = 2 * time.Second
	maxTokens     = 64
	manyTokens    = 3000
)

// withMetadata adds the key, and a trace of one's own as W3C's traceparent: both go along with every call.
func withMetadata(ctx context.Context) context.Context {
	ids := make([]byte, 24)
	if _, err := rand.Read(ids); err != nil {
		panic(err)
	}
	trace := fmt.Sprintf("00-%s-%s-01", hex.EncodeToString(ids[:16]), hex.EncodeToString(ids[16:]))
	ctx = metadata.AppendToOutgoingContext(ctx, "traceparent", trace)
	if key := os.Getenv("STEPWIRE_API_KEY"); key != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+key)
	}
	return ctx
}

func checkHealth(ctx context.Context, conn *grpc.ClientConn) error {
	ctx, stop := context.WithTimeout(ctx, 5*time.Second)
	defer stop()
	answer, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{Service: service})
	if err != nil {
		return err
	}
	fmt.Println(answer.Status)
	return nil
}

// watchHealth prints the status now, and each that follows, until the server goes or Ctrl-C: no deadline on this call.
func watchHealth(ctx context.Context, conn *grpc.ClientConn) error {
	stream, err := healthpb.NewHealthClient(conn).Watch(ctx, &healthpb.HealthCheckRequest{Service: service})
	if err != nil {
		return err
	}
	for {
		answer, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		fmt.Println(answer.Status)
	}
}

func listServices(ctx context.Context, conn *grpc.ClientConn) error {
	ctx, stop := context.WithTimeout(ctx, 5*time.Second)
	defer stop()
	stream, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
	if err != nil {
		return err
	}
	list := &reflectionpb.ServerReflectionRequest_ListServices{}
	if err := stream.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: list}); err != nil {
		return err
	}
	answer, err := stream.Recv()
	if err != nil {
		return err
	}
	for _, found := range answer.GetListServicesResponse().GetService() {
		fmt.Println(found.Name)
	}
	return nil
}

// generate prints the text as it comes. The call's deadline is the request's; cancelling its context aborts it within
// one step.
func generate(ctx context.Context, conn *grpc.ClientConn, request *pb.GenerateRequest, limit time.Duration, cancel bool) error {
	ctx, stop := context.WithTimeout(ctx, limit)
	defer stop()
	stream, err := pb.NewInferenceServiceClient(conn).Generate(ctx, request)
	if err != nil {
		return err
	}
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		for _, delta := range response.Deltas {
			fmt.Print(delta.Text)
			if cancel {
				stop()
			}
		}
		if usage := response.Usage; usage != nil {
			fmt.Fprintf(os.Stderr, "\n%d + %d tokens\n", usage.NumPromptTokens, usage.NumCompletionTokens)
		}
		if failure := response.Error; failure != nil {
			return fmt.Errorf("failed: %s", failure.Message)
		}
	}
}

func embed(ctx context.Context, conn *grpc.ClientConn, text string) error {
	ctx, stop := context.WithTimeout(ctx, deadline)
	defer stop()
	input := &pb.PooledInput{Input: &pb.PooledInput_Text{Text: text}}
	answer, err := pb.NewInferenceServiceClient(conn).Embed(ctx, &pb.EmbedRequest{Inputs: []*pb.PooledInput{input}})
	if err != nil {
		return err
	}
	values := answer.Embeddings[0].Values
	fmt.Printf("%d %.4f %.4f %.4f\n", len(values), values[0], values[1], values[2])
	return nil
}

// codeNames are the words that the other languages print; codes.Code has its own spelling.
var codeNames = map[codes.Code]string{
	codes.Canceled: "CANCELLED", codes.InvalidArgument: "INVALID_ARGUMENT", codes.DeadlineExceeded: "DEADLINE_EXCEEDED",
	codes.NotFound: "NOT_FOUND", codes.ResourceExhausted: "RESOURCE_EXHAUSTED", codes.Unavailable: "UNAVAILABLE",
	codes.Unauthenticated: "UNAUTHENTICATED", codes.FailedPrecondition: "FAILED_PRECONDITION", codes.Unimplemented: "UNIMPLEMENTED",
}

// explain prints a refusal: a status with google.rpc details, which fields are wrong, when to try again.
func explain(err error) {
	refusal, isStatus := status.FromError(err)
	if !isStatus {
		fmt.Fprintln(os.Stderr, err)
		return
	}
	name, isKnown := codeNames[refusal.Code()]
	if !isKnown {
		name = refusal.Code().String()
	}
	fmt.Fprintf(os.Stderr, "refused: %s: %s\n", name, refusal.Message())
	for _, detail := range refusal.Details() {
		switch detail := detail.(type) {
		case *errdetails.BadRequest:
			for _, violation := range detail.FieldViolations {
				fmt.Fprintf(os.Stderr, "  %s: %s\n", violation.Field, violation.Description)
			}
		case *errdetails.RetryInfo:
			fmt.Fprintf(os.Stderr, "  try again in %d s\n", detail.RetryDelay.Seconds)
		}
	}
}

func run(ctx context.Context, conn *grpc.ClientConn, command, text string) error {
	few, many := uint32(maxTokens), uint32(manyTokens)
	fewTokens := &pb.StopConditions{MaxTokens: &few}
	allTokens := &pb.StopConditions{MaxTokens: &many, IgnoreEos: true}
	prompt := &pb.GenerateRequest_Text{Text: text}
	switch command {
	case "health":
		return checkHealth(ctx, conn)
	case "watch":
		return watchHealth(ctx, conn)
	case "reflect":
		return listServices(ctx, conn)
	case "generate":
		return generate(ctx, conn, &pb.GenerateRequest{Input: prompt, Stop: fewTokens}, deadline, false)
	case "chat":
		content := []*pb.ContentPart{{Part: &pb.ContentPart_Text{Text: text}}}
		chat := &pb.ChatInput{Messages: []*pb.ChatMessage{{Role: "user", Content: content}}}
		request := &pb.GenerateRequest{Input: &pb.GenerateRequest_Chat{Chat: chat}, Stop: fewTokens}
		return generate(ctx, conn, request, deadline, false)
	case "deadline":
		return generate(ctx, conn, &pb.GenerateRequest{Input: prompt, Stop: allTokens}, shortDeadline, false)
	case "cancel":
		return generate(ctx, conn, &pb.GenerateRequest{Input: prompt, Stop: allTokens}, deadline, true)
	case "embed":
		return embed(ctx, conn, text)
	}
	return fmt.Errorf("unknown command %s: README.md has the commands", command)
}

func main() {
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "client HOST:PORT COMMAND [TEXT]: README.md has the commands")
		os.Exit(2)
	}
	text := ""
	if len(os.Args) > 3 {
		text = os.Args[3]
	}
	// WithInsecure is deprecated and stays throughout 1.x: what replaces it is missing in the version that Debian 12 has.
	conn, err := grpc.Dial(os.Args[1], grpc.WithInsecure())
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	err = run(withMetadata(context.Background()), conn, os.Args[2], text)
	conn.Close()
	if err != nil {
		explain(err)
		os.Exit(1)
	}
}
