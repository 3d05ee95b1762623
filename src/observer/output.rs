//! The only code that writes to the streams of the process. Layer 0.
//!
//! Invariant: nothing here panics. The output of a command goes to standard output, and a failed
//! write is an error of the command. Notes go to standard error; a failed write loses them.

use std::fmt::Display;
use std::io::{ErrorKind, IsTerminal, Write};

use crate::error::{Error, Result};

/// The path in errors of standard output.
const STDOUT: &str = "standard output";

/// Writes text to standard output.
pub fn print(text: impl Display) -> Result<()> {
    let mut out = std::io::stdout().lock();
    write!(out, "{text}").and_then(|()| out.flush()).map_err(|e| Error::io(STDOUT, e))
}

/// Writes a line to standard output.
pub fn print_line(text: impl Display) -> Result<()> {
    print(format_args!("{text}\n"))
}

/// Writes a line to standard error, ignoring errors.
pub fn note_line(text: impl Display) {
    let mut err = std::io::stderr().lock();
    let _ = writeln!(err, "{text}").and_then(|()| err.flush());
}

/// Whether the reader closed standard output, as `head` does; that is not a failure of the command.
pub fn is_reader_gone(error: &Error) -> bool {
    matches!(error, Error::Io { path, source }
        if path.as_os_str() == STDOUT && source.kind() == ErrorKind::BrokenPipe)
}

/// Whether standard output is a terminal.
pub fn shows_to_a_person() -> bool {
    std::io::stdout().is_terminal()
}

/// Whether standard error is a terminal, which shows progress bars.
pub fn has_room_for_a_bar() -> bool {
    std::io::stderr().is_terminal()
}

/// Most characters of a completion that are shown.
const EXCERPT: usize = 300;

/// The beginning of a text from a model or file, in one line.
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

/// Text from a model or file, made safe for a terminal: without escape sequences, without control
/// characters except new lines and tabs, and without characters that change the writing direction.
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

/// The length in bytes of the escape sequence at the start of `text`; 1 for one without an end.
fn escape(text: &str) -> usize {
    let mut chars = text.char_indices().skip(1);
    let first = match text.starts_with('\u{9b}') {
        true => Some((1, '[')), // a single character for ESC [
        false => chars.next(),
    };
    match first {
        Some((_, '[')) => chars
            .find(|(_, c)| !matches!(c, '0'..='?' | ' '..='/'))
            .filter(|(_, c)| matches!(c, '@'..='~'))
            .map_or(2, |(at, c)| at + c.len_utf8()),
        // A control string: it ends with BEL or ESC \.
        Some((_, ']' | 'P' | 'X' | '^' | '_')) => {
            let ends = ["\x07", "\x1b\\"].map(|end| text.find(end).map(|at| at + end.len()));
            ends.into_iter().flatten().min().unwrap_or(1)
        }
        // A sequence such as a choice of character set: intermediate characters, then a final one.
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
