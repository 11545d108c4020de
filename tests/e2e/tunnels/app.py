"""What a sandbox serves: HTTP/1.1 on port 3000, bytes on port 5432. Every request's head is kept in heard.log."""
import hashlib, base64, http.server, socketserver, threading, time


class Site(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def kept(self):
        with open("/workspace/heard.log", "a") as log:
            log.write(f"{self.requestline}\n{self.headers}")

    def answer(self, body, kind="text/plain"):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Set-Cookie", "wide=1; Domain=localhost")
        self.send_header("Set-Cookie", "narrow=1")
        self.end_headers()
        self.wfile.write(body)

    def chunk(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def do_GET(self):
        self.kept()
        if self.headers.get("Upgrade", "").lower() == "websocket":
            return self.websocket()
        if self.path.startswith("/events"):
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for number in range(1_000_000):
                self.chunk(b"data: %d\n\n" % number)
                time.sleep(0.1)
        self.answer(b"hello from the sandbox\n")

    def do_POST(self):
        self.kept()
        length = int(self.headers.get("Content-Length", "0"))
        digest = hashlib.sha256()
        while length:
            data = self.rfile.read(min(length, 65536))
            if not data:
                return
            digest.update(data)
            length -= len(data)
        self.answer(digest.hexdigest().encode())

    def websocket(self):
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode())
        self.end_headers()
        self.close_connection = True
        while True:
            head = self.rfile.read(6)
            if len(head) < 6:
                return
            mask, length = head[2:6], head[1] & 127
            payload = bytes(byte ^ mask[at % 4] for at, byte in enumerate(self.rfile.read(length)))
            self.wfile.write(bytes([0x81, length]) + payload)


class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(65536):
            self.request.sendall(data)
        self.request.sendall(b"goodbye")


class Bytes(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True


# Of more than wait here the kernel drops some, for whole seconds; by default five may.
socketserver.TCPServer.request_queue_size = 512
threading.Thread(target=Bytes(("0.0.0.0", 5432), Echo).serve_forever, daemon=True).start()
http.server.ThreadingHTTPServer(("0.0.0.0", 3000), Site).serve_forever()
