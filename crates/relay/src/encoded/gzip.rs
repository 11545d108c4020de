//! The frame of a gzip member (RFC 1952).

use flate2::Crc;

use super::EncodedError;

/// The longest header that is read, in bytes. Headers hold a file's name and a comment, which answers have no use for.
pub(super) const LONGEST_HEAD: usize = 4096;
/// Bytes behind a member: its check sum and its length.
pub(super) const FOOT: usize = 8;

/// The length of the header at the beginning of `bytes`, or `None` where it is not complete.
pub(super) fn head(bytes: &[u8]) -> Result<Option<usize>, EncodedError> {
    let magic = [0x1F, 0x8B, 8];
    if bytes
        .iter()
        .zip(magic)
        .any(|(found, expected)| *found != expected)
    {
        return Err(EncodedError::Corrupt);
    }
    let Some(flags) = bytes.get(3) else {
        return Ok(None);
    };
    // FHCRC, FEXTRA, FNAME, FCOMMENT; the three above are reserved.
    let has = |bit: u8| flags >> bit & 1 == 1;
    if flags >> 5 != 0 {
        return Err(EncodedError::Corrupt);
    }
    let mut end = 10;
    if has(2) {
        let Some([low, high]) = bytes.get(end..end + 2) else {
            return Ok(None);
        };
        end += 2 + usize::from(u16::from_le_bytes([*low, *high]));
    }
    for _text in [3, 4].into_iter().filter(|bit| has(*bit)) {
        let zero = bytes
            .get(end..)
            .and_then(|rest| rest.iter().position(|byte| *byte == 0));
        let Some(zero) = zero else {
            return Ok(None);
        };
        end += zero + 1;
    }
    if has(1) {
        end += 2;
    }
    Ok((end <= bytes.len()).then_some(end))
}

/// Compares what stands behind a member with what came out of it.
pub(super) fn check(foot: &[u8], sum: &Crc) -> Result<(), EncodedError> {
    let expected = [sum.sum().to_le_bytes(), sum.amount().to_le_bytes()].concat();
    if foot == expected {
        Ok(())
    } else {
        Err(EncodedError::Corrupt)
    }
}
