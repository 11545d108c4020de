"""Network attempts from inside a sandbox. Prints one line of JSON for each: how it ended and after how long.

  probe.py '[{"kind": "tcp", "to": "203.0.113.66", "port": 443, "send": "x"}, ...]'
  probe.py --loop <ms> '[...]'       the same again and again

The test judges by what the outside world saw; these outcomes only tell what a client would feel.
"""
import contextlib
import errno
import json
import os
import socket
import ssl
import struct
import sys
import threading
import time

TIMEOUT = 10.0
# `tcpi_total_retrans` of struct tcp_info (linux/tcp.h).
RETRANSMITTED = 100
CA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "ca.pem")

NAMES = {
    errno.ECONNREFUSED: "refused",
    errno.ECONNRESET: "reset",
    errno.EPIPE: "reset",
    errno.ETIMEDOUT: "timeout",
    errno.ENETUNREACH: "unreachable",
    errno.EHOSTUNREACH: "unreachable",
    errno.EADDRNOTAVAIL: "unreachable",
    errno.EAFNOSUPPORT: "unreachable",
    errno.EACCES: "prohibited",
    errno.EPERM: "denied",
}


def name_of(error):
    if isinstance(error, ssl.SSLEOFError):
        return "closed"
    if isinstance(error, ssl.SSLError):
        return "tls"
    if isinstance(error, socket.gaierror):
        return "no_name"
    if isinstance(error, TimeoutError):
        return "timeout"
    return NAMES.get(getattr(error, "errno", None), type(error).__name__)


def open_tcp(attempt, result):
    """A connection to the first address of `to`."""
    family, _, _, _, address = socket.getaddrinfo(attempt["to"], attempt["port"], type=socket.SOCK_STREAM)[0]
    stream = socket.socket(family, socket.SOCK_STREAM)
    stream.settimeout(attempt.get("timeout", TIMEOUT))
    if "from" in attempt:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        stream.bind(("", attempt["from"]))
    try:
        stream.connect(address)
    except OSError:
        result["repeated"] = repeated(stream)
        stream.close()
        raise
    result["connected"] = True
    return stream


def repeated(stream):
    """Segments that were sent more than once."""
    return struct.unpack_from("=I", stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192), RETRANSMITTED)[0]


def exchange(stream, data, result):
    """Sends, then reads until the end or 64 KiB, or until nothing comes any more. What says that it is the last gets
    an end, however long a busy machine takes for it."""
    stream.sendall(data)
    pause = stream.gettimeout() if b"\r\nConnection: close\r\n" in data else 0.3
    received = b""
    try:
        while len(received) < 65536:
            part = stream.recv(65536)
            if not part:
                break
            received += part
            stream.settimeout(pause)
    except TimeoutError:
        if not received:
            result["outcome"] = "silent"
            return
    except OSError:
        if not received:
            raise
    result["outcome"] = "answered" if received else "closed"
    result["data"] = received.decode("latin-1")


def tcp(attempt, result):
    with open_tcp(attempt, result) as stream:
        exchange(stream, attempt["send"].encode("latin-1"), result)


def tls(attempt, result):
    context = ssl.create_default_context(cafile=attempt.get("ca", CA))
    if attempt["sni"] is None or attempt.get("unverified"):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if "bloat" in attempt:
        # A greeting of several kilobytes, as post-quantum key shares make them.
        context.set_alpn_protocols(["http/1.1"] + [f"protocol-{number:06}" for number in range(attempt["bloat"])])
    request = f"GET {attempt.get('path', '/')} HTTP/1.1\r\nHost: {attempt['host']}\r\nConnection: close\r\n\r\n"
    with open_tcp(attempt, result) as stream:
        carrier = Crumbled(stream, attempt["crumbs"]) if "crumbs" in attempt else contextlib.nullcontext(stream)
        with carrier as carried, context.wrap_socket(carried, server_hostname=attempt["sni"]) as secured:
            exchange(secured, request.encode(), result)


class Crumbled:
    """A socket whose bytes reach `stream` in crumbs of `size`: TLS on one end of a pair, a pump on the other.

    Its threads have ended when it is left: one that still writes to stderr while the interpreter goes down
    makes that abort."""

    def __init__(self, stream, size):
        self.stream, self.size = stream, size
        self.near, self.far = socket.socketpair()
        self.near.settimeout(TIMEOUT)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.pumps = [threading.Thread(target=pump) for pump in (self.up, self.down)]

    def __enter__(self):
        for pump in self.pumps:
            pump.start()
        return self.near

    def __exit__(self, *_error):
        for end in (self.near, self.far, self.stream):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for pump in self.pumps:
            pump.join()
        self.near.close()
        self.far.close()

    def up(self):
        with contextlib.suppress(OSError):
            while data := self.far.recv(65536):
                for at in range(0, len(data), self.size):
                    self.stream.sendall(data[at : at + self.size])
                    time.sleep(0.005)

    def down(self):
        with contextlib.suppress(OSError):
            while data := self.stream.recv(65536):
                self.far.sendall(data)
            self.far.shutdown(socket.SHUT_WR)


def udp(attempt, result):
    family, _, _, _, address = socket.getaddrinfo(attempt["to"], attempt["port"], type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as stream:
        stream.settimeout(attempt.get("timeout", TIMEOUT))
        stream.connect(address)
        stream.send(attempt["send"].encode("latin-1"))
        try:
            result["data"] = stream.recv(65536).decode("latin-1")
            result["outcome"] = "answered"
        except TimeoutError:
            result["outcome"] = "silent"


def name_at(message, at):
    """The name there, and where it ends."""
    labels, end = [], None
    while message[at]:
        if message[at] >= 0xC0:
            end = end or at + 2
            at = struct.unpack(">H", message[at : at + 2])[0] & 0x3FFF
        else:
            labels.append(message[at + 1 : at + 1 + message[at]].decode("latin-1"))
            at += message[at] + 1
    return ".".join(labels), end or at + 1


def dns_query(attempt, name):
    """A query; `edns`: the size it takes, `options`: what else its OPT record holds, `questions`: how often it asks."""
    labels = b"".join(bytes([len(label)]) + label for label in name.encode("latin-1").split(b".") if label)
    opt = b""
    if "edns" in attempt:
        options = bytes.fromhex(attempt.get("options", ""))
        opt = b"\0" + struct.pack(">2HIH", 41, attempt["edns"], attempt.get("edns_flags", 0), len(options)) + options
    count = attempt.get("questions", 1)
    query = os.urandom(2) + struct.pack(">5H", attempt.get("flags", 0x0100), count, 0, 0, 1 if opt else 0)
    question = labels + b"\0" + struct.pack(">2H", attempt["type"], attempt.get("class", 1))
    return query + question * count + opt + bytes.fromhex(attempt.get("trailing", ""))


def dns_answer(message):
    flags, questions, answers = struct.unpack(">3H", message[2:8])
    found = {"rcode": flags & 15, "truncated": bool(flags & 0x200), "size": len(message)}
    found.update(addresses=[], records=[])
    at = 12
    for _ in range(questions):
        found["name"], at = name_at(message, at)
        at += 4
    for _ in range(answers):
        owner, at = name_at(message, at)
        kind, _, found["ttl"], length = struct.unpack(">2HIH", message[at : at + 10])
        data = message[at + 10 : at + 10 + length]
        text = data.decode("latin-1")
        if kind in (1, 28):
            text = socket.inet_ntop(socket.AF_INET if kind == 1 else socket.AF_INET6, data)
            found["addresses"].append(text)
        elif kind == 5:
            text, _ = name_at(message, at + 10)
        at += 10 + length
        found["records"].append([owner, kind, text])
    return found


def read_whole(stream, length):
    """So many bytes, or fewer at the end. (A socket with a time limit does not heed MSG_WAITALL.)"""
    data = b""
    while len(data) < length and (part := stream.recv(length - len(data))):
        data += part
    return data


def read_dns(stream):
    header = read_whole(stream, 2)
    return read_whole(stream, struct.unpack(">H", header)[0]) if len(header) == 2 else None


def dns(attempt, result):
    query = bytes.fromhex(attempt["raw"]) if "raw" in attempt else dns_query(attempt, attempt["name"])
    if attempt["tcp"]:
        with open_tcp(attempt, result) as stream:
            stream.sendall(struct.pack(">H", len(query)) + query)
            message = read_dns(stream)
    else:
        family = socket.AF_INET6 if ":" in attempt["to"] else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as stream:
            stream.settimeout(attempt.get("timeout", 8.0))
            # With the scope of a link-local address, which a mere pair would lose.
            stream.connect(socket.getaddrinfo(attempt["to"], attempt["port"], family, socket.SOCK_DGRAM)[0][4])
            stream.send(query)
            message = stream.recv(65536)
    if not message:
        result["outcome"] = "closed"
        return
    assert message[:2] == query[:2], "another id"
    result.update(dns_answer(message), outcome="answered")


def dns_stream(attempt, result):
    """Questions for all `names` on one connection, sent at once; their answers as they come."""
    with open_tcp(attempt, result) as stream:
        queries = [dns_query(attempt, name) for name in attempt["names"]]
        stream.sendall(b"".join(struct.pack(">H", len(query)) + query for query in queries))
        answers = []
        while len(answers) < len(queries) and (message := read_dns(stream)):
            answers.append(dns_answer(message))
        result.update(outcome="answered", answers=answers)
        if attempt.get("until_closed"):
            result["outcome"] = "answered" if read_dns(stream) else "closed"


def lookup(attempt, result):
    found = socket.getaddrinfo(attempt["name"], 443, type=socket.SOCK_STREAM)
    result.update(outcome="answered", addresses=sorted({entry[4][0] for entry in found}))


def checksum(data):
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def icmp(attempt, result):
    """An echo request; `socket` is `raw` or `dgram`."""
    kind = socket.SOCK_RAW if attempt["socket"] == "raw" else socket.SOCK_DGRAM
    six = ":" in attempt["to"]
    family, protocol = (socket.AF_INET6, socket.IPPROTO_ICMPV6) if six else (socket.AF_INET, socket.IPPROTO_ICMP)
    with socket.socket(family, kind, protocol) as stream:
        stream.settimeout(1.0)
        # The kernel adds the checksum of ICMPv6.
        packet = struct.pack(">BBHHH", 128 if six else 8, 0, 0, 7, 1) + b"canary"
        packet = packet[:2] + struct.pack(">H", checksum(packet)) + packet[4:]
        stream.sendto(packet, (attempt["to"], 0))
        try:
            result["data"] = stream.recv(4096).decode("latin-1")
            result["outcome"] = "answered"
        except TimeoutError:
            result["outcome"] = "silent"


def ipv4(attempt):
    """An IPv4 packet with a UDP datagram or TCP SYN in it, every field of it free."""
    source, target = socket.inet_aton(attempt["source"]), socket.inet_aton(attempt["to"])
    protocol = attempt.get("protocol", 17)
    if protocol == 17:
        data = attempt.get("send", "canary").encode("latin-1")
        body = struct.pack(">4H", 40000, attempt["port"], 8 + len(data), 0) + data
    elif protocol == 6:
        body = struct.pack(">2H2I2H2H", 40000, attempt["port"], 1, 0, 0x5000 | attempt.get("flags", 2), 1024, 0, 0)
        pseudo = source + target + struct.pack(">2H", 6, len(body))
        body = body[:16] + struct.pack(">H", checksum(pseudo + body)) + body[18:]
    else:
        body = attempt.get("send", "canary").encode("latin-1")
    options = bytes.fromhex(attempt.get("options", ""))
    first = 0x45 + len(options) // 4
    header = struct.pack(">BBHHHBBH", first, 0, 20 + len(options) + len(body), 7, attempt.get("fragment", 0), 64, protocol, 0)
    header += source + target + options
    header = header[:10] + struct.pack(">H", checksum(header)) + header[12:]
    return header + body


def ipv6(attempt):
    """An IPv6 packet with a UDP datagram, TCP SYN or anything in it. `extensions`: headers before that, each its number
    and what follows its first byte in hexadecimal; `body`: the inside in hexadecimal, with a checksum at `sum_at`."""
    source, target = (socket.inet_pton(socket.AF_INET6, attempt[end]) for end in ("source", "to"))
    protocol = attempt.get("protocol", 17)
    data = attempt.get("send", "canary").encode("latin-1")
    sum_at = attempt.get("sum_at")
    if "body" in attempt:
        body = bytes.fromhex(attempt["body"])
    elif protocol == 17:
        body, sum_at = struct.pack(">4H", 40000, attempt["port"], 8 + len(data), 0) + data, 6
    elif protocol == 6:
        flags = 0x5000 | attempt.get("flags", 2)
        body, sum_at = struct.pack(">2H2I2H2H", 40000, attempt["port"], 1, 0, flags, 1024, 0, 0), 16
    else:
        body = data
    if sum_at is not None:
        pseudo = source + target + struct.pack(">2I", len(body), protocol)
        body = body[:sum_at] + struct.pack(">H", checksum(pseudo + body)) + body[sum_at + 2 :]
    first = protocol
    for number, rest in reversed(attempt.get("extensions", [])):
        body = bytes([first]) + bytes.fromhex(rest) + body
        first = number
    return struct.pack(">IHBB", 0x60000000, len(body), first, attempt.get("hops", 64)) + source + target + body


def flood(attempt, result):
    """The same Ethernet frame `count` times, `burst` of them every 100 ms. Tells how many were taken."""
    gateway = bytes.fromhex("025347000001")
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as stream:
        stream.bind(("eth0", 0))
        own = stream.getsockname()[4]
        data = gateway + own + struct.pack(">H", 0x0800) + ipv4(attempt)
        left, sent = attempt["count"], 0
        while left:
            began = time.monotonic()
            for _ in range(min(attempt["burst"], left)):
                # A queue that is full for a moment takes it later; a frame that was not taken was not sent.
                while True:
                    try:
                        stream.send(data)
                        break
                    except OSError as error:
                        if error.errno != errno.ENOBUFS:
                            raise
                        time.sleep(0.001)
                left, sent = left - 1, sent + 1
            time.sleep(max(0.0, 0.1 - (time.monotonic() - began)))
    result.update(outcome="sent", data=str(sent))


def frame(attempt, result):
    """Ethernet frames as no well-behaved stack would send them. `tags`: hexadecimal, between the addresses
    and the packet's own type."""
    gateway = bytes.fromhex(attempt.get("gateway", "025347000001"))
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as stream:
        stream.bind(("eth0", 0))
        own = bytes.fromhex(attempt["mac"]) if "mac" in attempt else stream.getsockname()[4]
        kind, packet = (0x86DD, ipv6(attempt)) if ":" in attempt["to"] else (0x0800, ipv4(attempt))
        if "raw" in attempt:
            kind, packet = attempt["type"], bytes.fromhex(attempt["raw"])
        tags = bytes.fromhex(attempt.get("tags", ""))
        stream.send(gateway + own + tags + struct.pack(">H", kind) + packet)
        result["outcome"] = "sent"


KINDS = {"tcp": tcp, "tls": tls, "udp": udp, "dns": dns, "dns_stream": dns_stream, "lookup": lookup, "icmp": icmp, "frame": frame,
         "flood": flood}


def run(attempt):
    result = {}
    started = time.monotonic()
    try:
        KINDS[attempt["kind"]](attempt, result)
    except (OSError, ValueError, struct.error) as error:
        result.update(outcome=name_of(error), error=repr(error))
    result["ms"] = (time.monotonic() - started) * 1000
    print(json.dumps(result), flush=True)


def main():
    arguments = sys.argv[1:]
    pause = None
    if arguments[0] == "--loop":
        pause = int(arguments[1]) / 1000
        arguments = arguments[2:]
    attempts = json.loads(arguments[0])
    while True:
        for attempt in attempts:
            run(attempt)
        if pause is None:
            return
        time.sleep(pause)


main()
