// Asks a turret server through Go's gRPC, with code that protoc generates from the .proto files, and
// prints what came back as JSON.
package main

import (
	"context"
	"encoding/json"
	"io"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	turret "turret/v1"
)

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func main() {
	connection, err := grpc.NewClient(os.Args[1], grpc.WithTransportCredentials(insecure.NewCredentials()))
	check(err)
	client := turret.NewInferenceClient(connection)
	background := context.Background()
	messages := []*turret.ChatMessage{{Role: "user", Content: os.Args[2]}}
	request := &turret.GenerateRequest{
		Input:    &turret.GenerateRequest_Chat{Chat: &turret.Chat{Messages: messages}},
		Adapters: []*turret.AdapterWeight{{Name: "json"}},
		Sampling: &turret.SamplingParams{Temperature: proto.Float32(0)},
		Stop:     &turret.StopConditions{MaxTokens: proto.Uint32(6)},
	}
	whole, err := client.Generate(background, request, grpc.UseCompressor(gzip.Name))
	check(err)

	stream, err := client.GenerateStream(background, request)
	check(err)
	streamed := ""
	for {
		chunk, err := stream.Recv()
		if err == io.EOF {
			break
		}
		check(err)
		streamed += chunk.GetText()
	}

	request.Adapters[0].Name = "nothing"
	_, err = client.Generate(background, request)
	missing := status.Convert(err)

	soon, cancel := context.WithTimeout(background, 300*time.Millisecond)
	defer cancel()
	endless := &turret.GenerateRequest{
		Input: &turret.GenerateRequest_Prompt{Prompt: "a"},
		Stop:  &turret.StopConditions{MaxTokens: proto.Uint32(3000), IgnoreEos: proto.Bool(true)},
	}
	_, err = client.Generate(soon, endless)

	check(json.NewEncoder(os.Stdout).Encode(map[string]any{
		"whole":   whole.GetText(),
		"usage":   whole.GetUsage().GetCompletionTokens(),
		"stream":  streamed,
		"missing": missing.Code() == codes.NotFound,
		"details": len(missing.Details()),
		"late":    status.Code(err) == codes.DeadlineExceeded,
	}))
}
