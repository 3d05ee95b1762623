//! Reads the output of another program line by line, with bounded memory and any bytes. Layer 6.
//!
//! Invariant: no line is longer than the cap, and no byte ends the reading.

use std::io::BufRead;

/// A line, or a note that it was too long.
#[derive(Debug, PartialEq)]
pub enum Line {
    Whole(String),
    TooLong,
}

/// The next line that is not blank, of at most `cap` bytes; None at the end. Bytes that are not
/// UTF-8 are replaced. With `skip`, the rest of a line that is too long is skipped; without it,
/// such a line is [`Line::TooLong`] at once.
pub fn next_line(from: &mut impl BufRead, cap: usize, skip: bool) -> Option<Line> {
    let mut line: Vec<u8> = Vec::new();
    let mut long = false;
    loop {
        let ready = match from.fill_buf() {
            Ok(ready) => ready,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => return None,
        };
        let end = ready.iter().position(|b| *b == b'\n');
        let part = &ready[..end.unwrap_or(ready.len())];
        let room = cap - line.len();
        long |= part.len() > room;
        line.extend_from_slice(&part[..part.len().min(room)]);
        let (used, last) = (end.map_or(ready.len(), |e| e + 1), ready.is_empty());
        from.consume(used);
        if long && !skip {
            return Some(Line::TooLong);
        }
        if end.is_some() || last {
            let text = String::from_utf8_lossy(&line);
            if !text.trim().is_empty() {
                return Some(Line::Whole(text.into_owned()));
            }
            if last {
                return None;
            }
            line.clear();
            long = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_bounded_lossy_and_never_blank() {
        let whole = |text: &str| Some(Line::Whole(text.into()));
        let mut from =
            std::io::BufReader::with_capacity(3, &b"\n\n  \nab\xffc\n123456789\nlast"[..]);
        assert_eq!(next_line(&mut from, 6, true), whole("ab\u{fffd}c"));
        assert_eq!(next_line(&mut from, 6, true), whole("123456"));
        assert_eq!(next_line(&mut from, 6, true), whole("last"));
        assert_eq!(next_line(&mut from, 6, true), None);
        assert_eq!(next_line(&mut &b"1234567\nx"[..], 6, false), Some(Line::TooLong));
    }
}
