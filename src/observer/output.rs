//! The one writer of the process's own streams. Layer 0.
//!
//! Invariant: nothing here panics. What a command is asked for goes to standard output, and a
//! stream that takes no more is an error of that command; notes go to standard error, and are lost
//! where nobody takes them.

use std::fmt::Display;
use std::io::{ErrorKind, IsTerminal, Write};

use crate::error::{Error, Result};

/// What errors of standard output name as their file.
const STDOUT: &str = "standard output";

/// Writes text as it is.
pub fn print(text: impl Display) -> Result<()> {
    let mut out = std::io::stdout().lock();
    write!(out, "{text}").and_then(|()| out.flush()).map_err(|e| Error::io(STDOUT, e))
}

/// Writes a line.
pub fn print_line(text: impl Display) -> Result<()> {
    print(format_args!("{text}\n"))
}

/// Writes a line to standard error, or loses it.
pub fn note_line(text: impl Display) {
    let mut err = std::io::stderr().lock();
    let _ = writeln!(err, "{text}").and_then(|()| err.flush());
}

/// Whether the reader of standard output has left, as `head` does: no failure of the command.
pub fn is_reader_gone(error: &Error) -> bool {
    matches!(error, Error::Io { path, source }
        if path.as_os_str() == STDOUT && source.kind() == ErrorKind::BrokenPipe)
}

/// Whether standard output is a terminal.
pub fn shows_to_a_person() -> bool {
    std::io::stdout().is_terminal()
}

/// Whether standard error is a terminal: the place of progress bars.
pub fn has_room_for_a_bar() -> bool {
    std::io::stderr().is_terminal()
}

/// Characters of a completion that are shown, at most.
const EXCERPT: usize = 300;

/// The beginning of a text that others wrote, in one line.
pub fn excerpt(text: &str) -> String {
    let mut characters = text.chars();
    let mut shown: String = characters.by_ref().take(EXCERPT).collect();
    let rest = characters.count();
    shown = clean(&shown).split_whitespace().collect::<Vec<_>>().join(" ");
    if rest > 0 {
        shown += &format!(" [{rest} more characters]");
    }
    shown
}

/// Text that others wrote, for a terminal: without escape sequences and control characters, new
/// lines and tabs apart, and without the characters that turn the direction of writing.
pub fn clean(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        if c == '\x1b' || c == '\u{9b}' {
            rest = &rest[escape(rest)..];
            continue;
        }
        rest = &rest[c.len_utf8()..];
        let turns = matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if matches!(c, '\n' | '\t') || !(c.is_control() || turns) {
            out.push(c);
        }
    }
    out
}

/// Bytes of the escape sequence that `text` begins with. One without an end is its first character.
fn escape(text: &str) -> usize {
    let mut chars = text.char_indices().skip(1);
    let first = match text.starts_with('\u{9b}') {
        true => Some((1, '[')), // one character for ESC [
        false => chars.next(),
    };
    match first {
        Some((_, '[')) => chars
            .find(|(_, c)| !matches!(c, '0'..='?' | ' '..='/'))
            .filter(|(_, c)| matches!(c, '@'..='~'))
            .map_or(2, |(at, c)| at + c.len_utf8()),
        // A string of the terminal's: it ends with BEL or ESC \.
        Some((_, ']' | 'P' | 'X' | '^' | '_')) => {
            let ends = ["\x07", "\x1b\\"].map(|end| text.find(end).map(|at| at + end.len()));
            ends.into_iter().flatten().min().unwrap_or(1)
        }
        // A character set and its like: characters between, then one that ends it.
        Some((_, ' '..='/')) => chars
            .find(|(_, c)| !matches!(c, ' '..='/'))
            .filter(|(_, c)| matches!(c, '0'..='~'))
            .map_or(1, |(at, c)| at + c.len_utf8()),
        Some((at, c @ '0'..='~')) => at + c.len_utf8(),
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_and_control_characters_reach_no_terminal() {
        let cases = [
            (
                "\x1b[2J\x1b]0;title\x07red\x1b[31;1m \x1b(Btext\u{9b}2K\r\x08\tend\x1b]8;;x\x1b\\!\x1b",
                "red text\tend!",
            ),
            ("plain \u{e9}\n\ttext", "plain \u{e9}\n\ttext"),
            ("\x1b[31mred\x1b[0m", "red"),
            ("\x1b]0;title\x07after", "after"),
            ("\x1b]8;;http://x\x1b\\link", "link"),
            ("\x1b]never ended", "]never ended"),
            ("bell\x07 back\x08 return\r nul\0", "bell back return nul"),
            ("\u{9b}31m", ""),
            ("\u{202e}gnp.exe", "gnp.exe"),
            ("\x1b[", ""),
            ("\x1b", ""),
            ("\x1bc", ""),
        ];
        for (given, shown) in cases {
            assert_eq!(clean(given), shown, "{given:?}");
        }
    }
}
