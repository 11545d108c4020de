"""One keep-alive connection, a request every 20 ms until the file given is there. Prints how each ended."""

import http.client
import os
import ssl
import sys
import time

host, path, name, stop = sys.argv[1:]
connection = http.client.HTTPSConnection(host, timeout=30, context=ssl.create_default_context())
number = connections = 0
while not os.path.exists(stop):
    number += 1
    try:
        if connection.sock is None:
            connections += 1
        connection.request("GET", f"{path}/{number}", headers={"Authorization": f"Bearer {os.environ[name]}"})
        answer = connection.getresponse()
        answer.read()
        print(number, connections, answer.status, flush=True)
    except (OSError, http.client.HTTPException) as problem:
        connection.close()
        print(number, connections, type(problem).__name__, flush=True)
    time.sleep(0.02)
