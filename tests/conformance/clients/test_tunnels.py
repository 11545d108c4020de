"""Tunnels."""

import urllib.error
import urllib.parse
import urllib.request

from stateset_sandbox import types

from support import WithSandbox, since


@since(1, 1)
class Tunnels(WithSandbox):
    def test_a_port_gets_an_address_that_works_until_it_is_closed(self):
        self.client.write_file(self.id, "/workspace/www/index.txt", "hello from inside")
        self.shell(
            self.id,
            "cd /workspace/www && (setsid python3 -m http.server 8000 >/dev/null 2>&1 &) ;"
            "for n in $(seq 100); do curl -s -o /dev/null http://127.0.0.1:8000/ && exit 0; sleep 0.1; done; exit 1",
        )
        tunnel = self.client.create_tunnel(
            self.id, types.CreateTunnelOptions(port=8000, public=False, expires_in=600)
        )
        self.assertEqual((tunnel.port, tunnel.protocol, tunnel.sandbox_id), (8000, "http", self.id))
        self.assertTrue(tunnel.token)

        def fetch():
            # The name below localhost is this machine's, whatever the resolver says.
            host = urllib.parse.urlsplit(tunnel.url)
            request = urllib.request.Request(
                f"http://127.0.0.1:{host.port}/index.txt",
                headers={"Host": host.netloc, "X-Tunnel-Token": tunnel.token},
            )
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.read().decode()

        self.assertEqual(fetch(), "hello from inside")
        self.assertIn(tunnel.tunnel_id, [one.tunnel_id for one in self.client.list_tunnels(self.id)])
        self.assertIs(self.client.close_tunnel(tunnel.tunnel_id), True)
        self.assertEqual(self.client.list_tunnels(self.id), [])
        with self.assertRaises(urllib.error.URLError):
            fetch()

    def test_ports_that_cannot_be(self):
        with self.refused(400, "VALIDATION_ERROR"):
            self.client.create_tunnel(self.id, types.CreateTunnelOptions(port=0))
