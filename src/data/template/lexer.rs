//! Tokenises a template like Jinja2's lexer, with `trim_blocks` and `lstrip_blocks`. Layer 6.
//!
//! Invariant: whitespace is trimmed here and nowhere else.

use super::is_space;

#[derive(Clone, Debug, PartialEq)]
pub enum Token {
    Data(String),
    VariableBegin,
    VariableEnd,
    BlockBegin,
    BlockEnd,
    Name(String),
    Str(String),
    Int(String), // decimal digits
    Float(f64),
    Op(&'static str),
}

pub struct Lexed {
    pub tokens: Vec<(Token, usize)>, // each with its line
}

/// A syntax error and its line.
pub type Fault = (String, usize);

const OPERATORS: [&str; 27] = [
    "**", "//", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}",
    ">", "<", "=", ".", ":", "|", ",", ";", "!",
];

struct Lexer<'a> {
    source: &'a str,
    at: usize,
    line: usize,
    line_start: bool, // at the start, or the last token ended with a newline
    tokens: Vec<(Token, usize)>,
}

/// Returns the tokens of a template whose newlines are `\n`.
pub fn lex(source: &str) -> Result<Lexed, Fault> {
    let source = source.strip_suffix('\n').unwrap_or(source);
    let mut lexer = Lexer { source, at: 0, line: 1, line_start: true, tokens: Vec::new() };
    lexer.template()?;
    Ok(Lexed { tokens: lexer.tokens })
}

impl<'a> Lexer<'a> {
    fn rest(&self) -> &'a str {
        &self.source[self.at..]
    }

    fn take(&mut self, length: usize) -> &'a str {
        let text = &self.source[self.at..self.at + length];
        self.at += length;
        self.line += text.bytes().filter(|b| *b == b'\n').count();
        if !text.is_empty() {
            self.line_start = text.ends_with('\n');
        }
        text
    }

    fn push(&mut self, token: Token) {
        self.tokens.push((token, self.line));
    }

    fn fault<T>(&self, what: impl Into<String>) -> Result<T, Fault> {
        Err((what.into(), self.line))
    }

    fn spaces(&mut self) {
        let length = self.rest().len() - self.rest().trim_start_matches(is_space).len();
        self.take(length);
    }

    fn template(&mut self) -> Result<(), Fault> {
        while !self.rest().is_empty() {
            let rest = self.rest();
            let bytes = rest.as_bytes();
            let begin = (0..bytes.len().saturating_sub(1))
                .find(|i| bytes[*i] == b'{' && matches!(bytes[i + 1], b'{' | b'%' | b'#'));
            let Some(begin) = begin else {
                let text = self.take(rest.len());
                self.push(Token::Data(text.to_string()));
                break;
            };
            let kind = bytes[begin + 1];
            let sign = bytes.get(begin + 2).copied().filter(|b| matches!(b, b'-' | b'+'));
            let line_start = self.line_start;
            let text = self.take(begin);
            self.data(text, kind != b'{', sign, line_start);
            let opened = self.line;
            self.take(2 + usize::from(sign.is_some()));
            match kind {
                b'#' => self.comment()?,
                b'%' if self.raw_tag().is_some() => self.raw()?,
                _ => {
                    let variable = kind == b'{';
                    self.push(if variable { Token::VariableBegin } else { Token::BlockBegin });
                    self.expression(variable, opened)?;
                }
            }
        }
        Ok(())
    }

    /// Adds the text before a tag, without the whitespace that the tag strips.
    fn data(&mut self, text: &str, strippable: bool, sign: Option<u8>, line_start: bool) {
        let mut kept = text;
        if sign == Some(b'-') {
            kept = text.trim_end_matches(is_space);
        } else if sign.is_none() && strippable {
            let from = text.rfind('\n').map_or(0, |i| i + 1);
            if (from > 0 || line_start) && text[from..].chars().all(is_space) {
                kept = &text[..from];
            }
        }
        if !kept.is_empty() {
            self.push(Token::Data(kept.to_string()));
        }
    }

    fn comment(&mut self) -> Result<(), Fault> {
        let Some(end) = self.rest().find("#}") else {
            return self.fault("Missing end of comment tag");
        };
        let sign = self.rest()[..end].bytes().last();
        self.take(end + 2);
        self.after(sign);
        Ok(())
    }

    /// Skips the whitespace after a block or comment that ended with `sign`.
    fn after(&mut self, sign: Option<u8>) {
        if sign == Some(b'-') {
            self.spaces();
        } else if sign != Some(b'+') && self.rest().starts_with('\n') {
            self.take(1);
        }
    }

    /// Returns the length of ` raw %}` or ` raw -%}`, and whether it has the minus sign.
    fn raw_tag(&self) -> Option<(usize, bool)> {
        let rest = self.rest();
        let word = rest.trim_start_matches(is_space).strip_prefix("raw")?;
        let word = word.trim_start_matches(is_space);
        let (after, minus) = match word.strip_prefix("-%}") {
            Some(after) => (after, true),
            None => (word.strip_prefix("%}")?, false),
        };
        Some((rest.len() - after.len(), minus))
    }

    fn raw(&mut self) -> Result<(), Fault> {
        let (length, minus) = self.raw_tag().unwrap_or_default();
        self.take(length);
        if minus {
            self.spaces();
        }
        let rest = self.rest();
        let mut from = 0;
        while let Some(found) = rest[from..].find("{%") {
            let at = from + found;
            let inside = &rest[at + 2..];
            let sign = inside.bytes().next().filter(|b| matches!(b, b'-' | b'+'));
            let word = inside[usize::from(sign.is_some())..].trim_start_matches(is_space);
            let tail = word.strip_prefix("endraw").map(|t| t.trim_start_matches(is_space));
            let end = tail.and_then(|t| {
                let close = [("-%}", b'-'), ("+%}", b'+'), ("%}", 0)];
                close
                    .into_iter()
                    .find(|(c, _)| t.starts_with(c))
                    .map(|(c, s)| (rest.len() - t.len() + c.len(), s))
            });
            if let Some((end, close)) = end {
                let line_start = self.line_start;
                let text = self.take(at);
                self.data(text, true, sign, line_start);
                self.take(end - at);
                self.after(Some(close));
                return Ok(());
            }
            from = at + 2;
        }
        self.fault("Missing end of raw directive")
    }

    fn expression(&mut self, variable: bool, opened: usize) -> Result<(), Fault> {
        let mut open: Vec<u8> = Vec::new();
        loop {
            self.spaces();
            let rest = self.rest();
            let Some(first) = rest.chars().next() else {
                let what =
                    if variable { "end of print statement" } else { "end of statement block" };
                return Err((format!("unexpected end of template, expected '{what}'"), opened));
            };
            if open.is_empty() {
                let close = if variable { "}}" } else { "%}" };
                let signs: &[&str] = if variable { &["-", ""] } else { &["-", "+", ""] };
                let sign = signs
                    .iter()
                    .find(|s| rest.strip_prefix(**s).is_some_and(|r| r.starts_with(close)));
                if let Some(sign) = sign {
                    self.push(if variable { Token::VariableEnd } else { Token::BlockEnd });
                    self.take(sign.len() + 2);
                    if variable {
                        if *sign == "-" {
                            self.spaces();
                        }
                    } else {
                        self.after(sign.bytes().next());
                    }
                    return Ok(());
                }
            }
            if first.is_ascii_digit() {
                self.number()?;
            } else if first == '_' || first.is_alphanumeric() {
                let word = |c: char| c == '_' || c.is_alphanumeric();
                let length = rest.find(|c| !word(c)).unwrap_or(rest.len());
                let name = self.take(length).to_string();
                if !name.is_ascii() {
                    return self
                        .fault(format!("the name '{name}' is not ASCII, which is not supported"));
                }
                self.push(Token::Name(name));
            } else if first == '"' || first == '\'' {
                self.string(first)?;
            } else {
                let Some(op) = OPERATORS.iter().find(|o| rest.starts_with(**o)) else {
                    return self.fault(format!("unexpected char '{first}'"));
                };
                match op.as_bytes()[0] {
                    b @ (b'(' | b'[' | b'{') => open.push(b),
                    b @ (b')' | b']' | b'}') => {
                        let want = match b {
                            b')' => b'(',
                            b']' => b'[',
                            _ => b'{',
                        };
                        if open.pop() != Some(want) {
                            return self.fault(format!("unexpected '{op}'"));
                        }
                    }
                    b'!' | b';' if op.len() == 1 => {
                        return self.fault(format!("unexpected char '{op}'"));
                    }
                    _ => {}
                }
                self.push(Token::Op(op));
                self.take(op.len());
            }
        }
    }

    fn number(&mut self) -> Result<(), Fault> {
        let rest = self.rest();
        let bytes = rest.as_bytes();
        // digits with single underscores between them
        let digits = |from: usize, ok: fn(&u8) -> bool| {
            let mut i = from;
            while bytes.get(i).is_some_and(ok)
                || (i > from && bytes.get(i) == Some(&b'_') && bytes.get(i + 1).is_some_and(ok))
            {
                i += 1;
            }
            i
        };
        let decimal: fn(&u8) -> bool = u8::is_ascii_digit;
        let radix = match bytes.get(1).map(u8::to_ascii_lowercase) {
            Some(b'x') if bytes[0] == b'0' => Some((16, u8::is_ascii_hexdigit as fn(&u8) -> bool)),
            Some(b'o') if bytes[0] == b'0' => {
                Some((8, (|b: &u8| (b'0'..=b'7').contains(b)) as fn(&u8) -> bool))
            }
            Some(b'b') if bytes[0] == b'0' => {
                Some((2, (|b: &u8| matches!(b, b'0' | b'1')) as fn(&u8) -> bool))
            }
            _ => None,
        };
        if let Some((radix, ok)) = radix {
            let from = if bytes.get(2) == Some(&b'_') { 3 } else { 2 };
            let end = digits(from, ok);
            if end > from {
                let text = self.take(end)[2..].replace('_', "");
                let Ok(n) = i128::from_str_radix(&text, radix) else {
                    return self.fault("an integer of more than 127 bits is not supported");
                };
                self.push(Token::Int(n.to_string()));
                return Ok(());
            }
        }
        let whole = digits(0, decimal);
        let mut end = whole;
        if bytes.get(end) == Some(&b'.') && digits(end + 1, decimal) > end + 1 {
            end = digits(end + 1, decimal);
        }
        if bytes.get(end).is_some_and(|b| b.eq_ignore_ascii_case(&b'e')) {
            let sign = usize::from(matches!(bytes.get(end + 1), Some(b'+' | b'-')));
            let exponent = digits(end + 1 + sign, decimal);
            if exponent > end + 1 + sign {
                end = exponent;
            }
        }
        if end > whole {
            let text = self.take(end).replace('_', "");
            match text.parse::<f64>() {
                Ok(x) if x.is_finite() => self.push(Token::Float(x)),
                _ => return self.fault(format!("the number {text} is too large")),
            }
            return Ok(());
        }
        // zeros, or digits that do not begin with 0
        let end = if bytes[0] == b'0' { digits(0, |b| *b == b'0') } else { whole };
        let text = self.take(end).replace('_', "");
        let Ok(n) = text.parse::<i128>() else {
            return self.fault("an integer of more than 127 bits is not supported");
        };
        self.push(Token::Int(n.to_string()));
        Ok(())
    }

    fn string(&mut self, quote: char) -> Result<(), Fault> {
        let rest = self.rest();
        let mut escaped = false;
        let end = rest.char_indices().skip(1).find(|(_, c)| {
            let end = !escaped && *c == quote;
            escaped = !escaped && *c == '\\';
            end
        });
        let Some((end, _)) = end else {
            return self.fault("the string has no closing quote");
        };
        let decoded = unescape(&rest[1..end]).map_err(|e| (e, self.line))?;
        self.push(Token::Str(decoded));
        self.take(end + 1);
        Ok(())
    }
}

/// Python's `unicode-escape`, as Jinja2 applies it to a string literal.
fn unescape(text: &str) -> Result<String, String> {
    if !text.contains('\\') {
        return Ok(text.to_string());
    }
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let Some(c) = rest.chars().next() else { return Err("\\ at end of string".into()) };
        let after = &rest[c.len_utf8()..];
        let width = match c {
            'x' => 2,
            'u' => 4,
            'U' => 8,
            _ => 0,
        };
        if width > 0 {
            let Some(hex) = after.get(..width).filter(|h| h.bytes().all(|b| b.is_ascii_hexdigit()))
            else {
                return Err(format!("truncated \\{c} escape"));
            };
            let code = u32::from_str_radix(hex, 16).unwrap_or(u32::MAX);
            let Some(ch) = char::from_u32(code) else {
                return Err(format!("the escape \\{c}{hex} is not a character"));
            };
            out.push(ch);
            rest = &after[width..];
            continue;
        }
        rest = after;
        match c {
            '\n' => {}
            '\\' | '\'' | '"' => out.push(c),
            'a' => out.push('\x07'),
            'b' => out.push('\x08'),
            'f' => out.push('\x0C'),
            'n' => out.push('\n'),
            'r' => out.push('\r'),
            't' => out.push('\t'),
            'v' => out.push('\x0B'),
            'N' => return Err("the escape \\N{..} is not supported".into()),
            '0'..='7' => {
                let more = after.bytes().take(2).take_while(|b| (b'0'..=b'7').contains(b)).count();
                let octal = format!("{c}{}", &after[..more]);
                let code = u32::from_str_radix(&octal, 8).unwrap_or(0);
                out.extend(char::from_u32(code));
                rest = &after[more..];
            }
            // Jinja2 escapes other characters before decoding: `\é` becomes `\` and `xe9`
            c if !c.is_ascii() => {
                let code = c as u32;
                out += &match code {
                    0..=0xFF => format!("\\x{code:02x}"),
                    0x100..=0xFFFF => format!("\\u{code:04x}"),
                    _ => format!("\\U{code:08x}"),
                };
            }
            c => out.extend(['\\', c]),
        }
    }
    out.push_str(rest);
    Ok(out)
}
