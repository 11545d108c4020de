"""Speaks bytes over TLS or TCP as it is told, without an HTTP library that would tidy them up.

Reads a JSON list of attempts from the file given: {"to", "port", "sni" (null: in clear), "send" (base64), "alpn"}.
Prints a line of JSON for each: {"data" (base64), "error"}.
"""

import base64
import concurrent.futures
import json
import socket
import ssl
import sys


def converse(attempt):
    data, error = b"", ""
    try:
        with socket.create_connection((attempt["to"], attempt["port"]), timeout=30) as stream:
            if attempt["sni"] is not None:
                context = ssl.create_default_context()
                if attempt.get("alpn"):
                    context.set_alpn_protocols(attempt["alpn"])
                stream = context.wrap_socket(stream, server_hostname=attempt["sni"])
            stream.sendall(base64.b64decode(attempt["send"]))
            while chunk := stream.recv(65536):
                data += chunk
    except OSError as problem:
        error = f"{type(problem).__name__}: {problem}"
    return {"data": base64.b64encode(data).decode(), "error": error}


with open(sys.argv[1]) as file, concurrent.futures.ThreadPoolExecutor(8) as pool:
    for answer in pool.map(converse, json.load(file)):
        print(json.dumps(answer), flush=True)
