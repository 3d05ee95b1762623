//! What another program writes, line by line: in bounded memory, whatever the bytes. Layer 6.
//!
//! Invariant: no line is longer than its cap, and no byte ends the reading.

use std::io::BufRead;

/// A line, or that there was one which is too long.
#[derive(Debug, PartialEq)]
pub enum Line {
    Whole(String),
    TooLong,
}

/// The next line that is not blank, of at most `cap` bytes; None at the end. Bytes that are not
/// UTF-8 are replaced. A line that is too long is read to its end with `skip`, else given up at
/// once.
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

/// Text of another program as a terminal may show it: without escape sequences and other control
/// characters, tabs and ends of lines apart.
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match (c, chars.peek()) {
            // A control sequence ends with a letter or one of @ ~ and their like.
            ('\x1b', Some('[')) | ('\u{9b}', _) => {
                if c == '\x1b' {
                    chars.next();
                }
                chars.by_ref().find(|c| matches!(c, '@'..='~'));
            }
            // An operating system command (a title, a link) ends with BEL or ESC \.
            ('\x1b', Some(']' | 'P' | '^' | '_')) => {
                while let Some(c) = chars.next() {
                    if c == '\x07' || (c == '\x1b' && chars.next_if_eq(&'\\').is_some()) {
                        break;
                    }
                }
            }
            ('\x1b', _) => drop(chars.next()),
            ('\t' | '\n', _) => out.push(c),
            _ if c.is_control() => {}
            _ => out.push(c),
        }
    }
    out
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

    #[test]
    fn what_is_printed_holds_no_terminal_escape() {
        let hostile = "\x1b[2J\x1b]0;title\x07red\x1b[31;1m \x1b(Btext\u{9b}2K\r\x08\tend\x1b]8;;x\x1b\\!\x1b";
        assert_eq!(printable(hostile), "red text\tend!");
    }
}
