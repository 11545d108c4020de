// HTTP/2 in clear with prior knowledge and trailers, as servers of gRPC speak it.
require("http2").createServer().on("stream", (stream, headers) => {
  stream.respond({ ":status": 200, "content-type": "application/grpc", "x-authority": headers[":authority"] }, { waitForTrailers: true });
  stream.on("wantTrailers", () => stream.sendTrailers({ "grpc-status": "0" }));
  stream.pipe(stream);
}).listen(50051, "0.0.0.0");
