//! Requests of HTTP/2 (RFC 9113) with prior knowledge, their headers without compression.

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
/// `END_STREAM` and `END_HEADERS`.
const WHOLE: u8 = 5;

/// The beginning of a connection, and a request on stream 1, 3, … for each authority and path.
pub fn requests(all: &[(&str, &str)]) -> Vec<u8> {
    let mut bytes = PREFACE.to_vec();
    bytes.extend(frame(SETTINGS, 0, 0, &[]));
    for (stream, (authority, path)) in (0..).zip(all) {
        // The static table (RFC 7541, appendix A): method GET, scheme http; then literals without indexing.
        let mut block = vec![0x82, 0x86];
        for (index, value) in [(1, authority), (4, path)] {
            block.extend([index, u8::try_from(value.len()).unwrap_or(0) & 0x7f]);
            block.extend(value.as_bytes());
        }
        bytes.extend(frame(HEADERS, WHOLE, stream * 2 + 1, &block));
    }
    bytes
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(0).to_be_bytes();
    let mut bytes = length[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}
