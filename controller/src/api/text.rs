//! Text from bytes that come in parts.

/// Turns bytes into text, holding back a character that is not complete yet. What is no UTF-8 is replaced.
#[derive(Default)]
pub(super) struct Text {
    held: Vec<u8>,
}

impl Text {
    /// The text up to the last character that is complete.
    pub(super) fn push(&mut self, bytes: &[u8]) -> String {
        let mut all = std::mem::take(&mut self.held);
        all.extend_from_slice(bytes);
        let mut text = String::with_capacity(all.len());
        let mut chunks = all.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            text.push_str(chunk.valid());
            let invalid = chunk.invalid();
            if invalid.is_empty() {
                continue;
            }
            let last = chunks.peek().is_none();
            if last && std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none()) {
                self.held = invalid.to_vec();
            } else {
                text.push(char::REPLACEMENT_CHARACTER);
            }
        }
        text
    }

    /// How many bytes are held back: at most three.
    pub(super) fn held(&self) -> usize {
        self.held.len()
    }

    /// What is held back and will never be complete.
    pub(super) fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.held).into_owned();
        self.held.clear();
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_character_in_two_parts_arrives_whole() {
        let mut text = Text::default();
        let bytes = "aé😀".as_bytes();
        let mut arrived = String::new();
        for byte in bytes {
            arrived.push_str(&text.push(&[*byte]));
        }
        assert_eq!(arrived, "aé😀");
        assert_eq!(text.finish(), "");
    }

    #[test]
    fn what_is_no_text_is_replaced_and_nothing_else_is_lost() {
        let mut text = Text::default();
        assert_eq!(text.push(b"a\xffb\xf0\x9f"), "a\u{fffd}b");
        assert_eq!(text.held(), 2);
        assert_eq!(text.push(b"c"), "\u{fffd}c");
        assert_eq!(text.push(b"\xe2\x82"), "");
        assert_eq!(text.finish(), "\u{fffd}");
        assert_eq!(text.held(), 0);
    }
}
