//! Rewrites the tokens of one tag where minijinja differs from Jinja2: comparisons, method names
//! without a call, macro arguments, unknown filters and tests. Layer 6.
//!
//! Invariant: brackets stay balanced, and each nesting level adds a bounded number of levels.

use std::collections::HashMap;

use super::lexer::{Fault, Token};
use super::remainder;

type Tokens = Vec<(Token, usize)>;

/// The parameters of each macro, and whether they have a default.
pub type Macros = HashMap<String, Vec<(String, bool)>>;

/// Represents an undefined value passed to a macro, which minijinja would treat as a missing
/// argument. Begins with a noncharacter.
pub const UNDEFINED: &str = "\u{FDD2}undefined";

/// Jinja2's filters.
const FILTERS: &str = " abs attr batch capitalize center count d default dictsort e escape \
    filesizeformat first float forceescape format groupby indent int items join last length list \
    lower map max min pprint random reject rejectattr replace reverse round safe select selectattr \
    slice sort string striptags sum title tojson trim truncate unique upper urlencode urlize \
    wordcount wordwrap xmlattr ";
const TESTS: &str = " boolean callable defined divisibleby eq equalto escaped even false filter float \
    ge greaterthan gt in integer iterable le lessthan lower lt mapping ne none number odd sameas \
    sequence string test true undefined upper ";
/// Attributes that `x.name` finds before an item of that name, by the type of `x`.
const OF_MAPS: &str = " clear copy fromkeys get items keys pop popitem setdefault update values ";
const OF_LISTS: &str = " append clear copy count extend index insert pop remove reverse sort ";
const OF_STRINGS: &str = " capitalize casefold center count encode endswith expandtabs find format \
    format_map index isalnum isalpha isascii isdecimal isdigit isidentifier islower isnumeric \
    isprintable isspace istitle isupper join ljust lower lstrip maketrans partition removeprefix \
    removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith \
    strip swapcase title translate upper zfill ";

fn listed(list: &str, name: &str) -> bool {
    list.contains(&format!(" {name} "))
}

/// Whether a value of this kind has a method of that name in Python.
pub fn has_method(kind: minijinja::value::ValueKind, name: &str) -> bool {
    use minijinja::value::ValueKind::{Map, Seq, String};
    match kind {
        Map => listed(OF_MAPS, name),
        Seq => listed(OF_LISTS, name),
        String => listed(OF_STRINGS, name),
        _ => false,
    }
}

fn is_method(name: &str) -> bool {
    [OF_MAPS, OF_LISTS, OF_STRINGS].iter().any(|list| listed(list, name))
}

/// Collects the macros that a template defines.
pub fn macros(tokens: &[(Token, usize)]) -> Result<Macros, Fault> {
    let mut all = Macros::new();
    for (i, (token, line)) in tokens.iter().enumerate() {
        let head = match (token, tokens.get(i + 1), tokens.get(i + 2), tokens.get(i + 3)) {
            (
                Token::BlockBegin,
                Some((Token::Name(word), _)),
                Some((Token::Name(name), _)),
                Some((Token::Op("("), _)),
            ) if word == "macro" => name,
            _ => continue,
        };
        let close = matching(tokens, i + 3);
        let parameters: Vec<(String, bool)> = split(&tokens[i + 4..close])
            .iter()
            .filter_map(|part| match part {
                [(Token::Name(name), _), rest @ ..] => Some((name.clone(), !rest.is_empty())),
                _ => None,
            })
            .collect();
        let before = all.insert(head.clone(), parameters.clone());
        if before.is_some_and(|b| b != parameters) {
            let what = format!("two macros '{head}' with different arguments are not supported");
            return Err((what, *line));
        }
    }
    Ok(all)
}

/// Returns the index of the bracket that closes the one at `open`.
fn matching(tokens: &[(Token, usize)], open: usize) -> usize {
    let mut depth = 0usize;
    for (i, (token, _)) in tokens.iter().enumerate().skip(open) {
        match token {
            Token::Op("(" | "[" | "{") => depth += 1,
            Token::Op(")" | "]" | "}") if depth <= 1 => return i,
            Token::Op(")" | "]" | "}") => depth -= 1,
            _ => {}
        }
    }
    tokens.len()
}

/// Returns the parts between top-level commas.
pub fn split(tokens: &[(Token, usize)]) -> Vec<&[(Token, usize)]> {
    let (mut parts, mut from, mut i) = (Vec::new(), 0, 0);
    while i < tokens.len() {
        match tokens[i].0 {
            Token::Op("(" | "[" | "{") => i = matching(tokens, i),
            Token::Op(",") => {
                parts.push(&tokens[from..i]);
                from = i + 1;
            }
            _ => {}
        }
        i += 1;
    }
    parts.push(tokens.get(from..).unwrap_or_default());
    parts
}

/// Rewrites one tag; `word` is the statement, or empty for an expression.
pub struct Rewrite<'a> {
    pub macros: &'a Macros,
    pub word: &'a str,
    pub soft: bool, // directly in an `if` block: Jinja2 looks up filters and tests at run time
}

impl Rewrite<'_> {
    pub fn tag(&self, tokens: &[(Token, usize)]) -> Result<Tokens, Fault> {
        self.level(tokens, true)
    }

    fn level(&self, tokens: &[(Token, usize)], top: bool) -> Result<Tokens, Fault> {
        let mut out: Tokens = Vec::with_capacity(tokens.len() + 8);
        let mut parts: Vec<(Tokens, &'static str, usize)> = Vec::new(); // operands and operators
        let mut operand: Tokens = Vec::new();
        let soft = self.soft || tokens.iter().skip(1).any(|t| name_of(&t.0) == Some("if"));
        let mut each = top && self.word == "for"; // before its `in`
        let mut i = 0;
        while let Some((token, line)) = tokens.get(i) {
            let next = tokens.get(i + 1).map(|t| &t.0);
            i += 1;
            match token {
                Token::Op(open @ ("(" | "[" | "{")) => {
                    let close = matching(tokens, i - 1);
                    let inside = &tokens[i..close];
                    i = close + 1;
                    if let (&"[", [(Token::Str(name), _)]) = (open, inside)
                        && ends_operand(&operand)
                        && is_method(name)
                    {
                        called(&mut operand, &format!("_item_{name}"), *line);
                        continue;
                    }
                    let inner = match self.callee(&operand, open, top) {
                        Some(parameters) => self.arguments(inside, parameters)?,
                        None => self.level(inside, false)?,
                    };
                    operand.push((token.clone(), *line));
                    operand.extend(inner);
                    operand.extend(tokens.get(close).cloned());
                }
                Token::Op(".") => {
                    let Some(Token::Name(name)) = next else {
                        operand.push((token.clone(), *line));
                        continue;
                    };
                    i += 1;
                    let bare = !matches!(tokens.get(i), Some((Token::Op("("), _)));
                    let target = top && self.word == "set" && i == 4;
                    let of_loop =
                        matches!(operand.last(), Some((Token::Name(n), _)) if n == "loop");
                    if bare && !target && !of_loop && is_method(name) {
                        called(&mut operand, &format!("_attr_{name}"), *line);
                    } else {
                        operand
                            .extend([(token.clone(), *line), (Token::Name(name.clone()), *line)]);
                    }
                }
                Token::Op("|") => {
                    operand.push((token.clone(), *line));
                    if let Some(Token::Name(name)) = next {
                        i += 1;
                        operand.push((self.known(name, FILTERS, "filter", soft, *line)?, *line));
                    }
                }
                // Only its definedness is tested here, and in Jinja2 it is defined.
                Token::Name(name) if name == "lipsum" => {
                    operand.push((Token::Name("true".into()), *line));
                }
                Token::Name(name) if name == "is" => {
                    operand.push((token.clone(), *line));
                    if name_of_at(tokens, i) == Some("not") {
                        operand.push(tokens[i].clone());
                        i += 1;
                    }
                    if let Some((Token::Name(test), _)) = tokens.get(i) {
                        i += 1;
                        operand.push((self.known(test, TESTS, "test", soft, *line)?, *line));
                    }
                }
                Token::Name(name) if name == "in" && each => {
                    each = false;
                    self.compare(&mut out, &mut parts, &mut operand)?;
                    out.push((token.clone(), *line));
                }
                _ => {
                    let not_in =
                        name_of(token) == Some("not") && next.and_then(name_of) == Some("in");
                    i += usize::from(not_in);
                    if let Some(filter) = if not_in { Some("_notin") } else { comparison(token) } {
                        parts.push((std::mem::take(&mut operand), filter, *line));
                    } else if (top && i == 1 && !self.word.is_empty())
                        || ends(token)
                        || (each_end(token) && self.word == "for" && top && i == tokens.len())
                    {
                        self.compare(&mut out, &mut parts, &mut operand)?;
                        out.push((token.clone(), *line));
                        if top
                            && i == 1
                            && self.word == "filter"
                            && let Some((Token::Name(name), _)) = tokens.get(1)
                        {
                            i += 1;
                            let known = self.known(name, FILTERS, "filter", soft, *line)?;
                            operand.push((known, *line));
                        }
                    } else {
                        operand.push((token.clone(), *line));
                    }
                }
            }
        }
        self.compare(&mut out, &mut parts, &mut operand)?;
        Ok(out)
    }

    /// Returns the name of a filter or test. An unknown one is an error, now or at run time.
    fn known(
        &self,
        name: &str,
        list: &str,
        kind: &str,
        soft: bool,
        line: usize,
    ) -> Result<Token, Fault> {
        if listed(list, name) {
            return Ok(Token::Name(name.into()));
        }
        if soft {
            return Ok(Token::Name(format!("_no_{name}")));
        }
        Err((format!("No {kind} named '{name}'."), line))
    }

    /// Writes the filter for `a < b`, `((a)|_lt(b))`; a chain `a < b < c` becomes one filter.
    fn compare(
        &self,
        out: &mut Tokens,
        parts: &mut Vec<(Tokens, &'static str, usize)>,
        operand: &mut Tokens,
    ) -> Result<(), Fault> {
        let last = remainder::rewrite(std::mem::take(operand));
        let mut all = std::mem::take(parts);
        all.iter_mut().for_each(|part| part.0 = remainder::rewrite(std::mem::take(&mut part.0)));
        let Some(line) = all.first().map(|p| p.2) else {
            out.extend(last);
            return Ok(());
        };
        if last.is_empty() || all.iter().any(|p| p.0.is_empty()) {
            return Err(("expected an expression beside a comparison".into(), line));
        }
        let op = |op: &'static str| (Token::Op(op), line);
        let name = |name: &str| (Token::Name(name.into()), line);
        // equality with a literal has the same meaning in both engines and is cheap
        if let [(left, filter @ ("_eq" | "_ne"), _)] = all.as_slice()
            && (literal(left) || literal(&last))
        {
            out.extend_from_slice(left);
            out.push(op(if *filter == "_eq" { "==" } else { "!=" }));
            out.extend(last);
            return Ok(());
        }
        let filters: Vec<&str> = all.iter().map(|p| p.1).collect();
        let first = std::mem::take(&mut all[0].0);
        out.extend([op("("), op("(")]);
        out.extend(first);
        out.extend([op(")"), op("|")]);
        if filters.len() == 1 {
            out.extend([name(filters[0]), op("(")]);
            out.extend(last);
        } else {
            out.extend([name("_chain"), op("(")]);
            let rest = all.into_iter().skip(1).map(|p| p.0).chain([last]);
            for (i, (operand, filter)) in rest.zip(filters).enumerate() {
                if i > 0 {
                    out.push(op(","));
                }
                out.extend([(Token::Str(filter.into()), line), op(",")]);
                out.extend(operand);
            }
        }
        out.extend([op(")"), op(")")]);
        Ok(())
    }

    /// Returns the parameters of the macro that a bracket after `operand` calls.
    fn callee(
        &self,
        operand: &[(Token, usize)],
        open: &str,
        top: bool,
    ) -> Option<&Vec<(String, bool)>> {
        let head = top && self.word == "macro";
        match operand {
            [.., (Token::Op("." | "|"), _), _] => None,
            [.., (Token::Name(name), _)] if open == "(" && !head => self.macros.get(name),
            _ => None,
        }
    }

    /// Marks undefined arguments for parameters with a default.
    fn arguments(
        &self,
        inside: &[(Token, usize)],
        parameters: &[(String, bool)],
    ) -> Result<Tokens, Fault> {
        let mut out = Vec::new();
        for (i, part) in split(inside).into_iter().enumerate() {
            let Some((_, line)) = part.first() else { continue };
            let op = |op: &'static str| (Token::Op(op), *line);
            if i > 0 {
                out.push(op(","));
            }
            let (value, default) = match part {
                [(Token::Name(name), _), (Token::Op("="), _), value @ ..] => {
                    out.extend_from_slice(&part[..2]);
                    (value, parameters.iter().any(|p| p.0 == *name && p.1))
                }
                [(Token::Op("*" | "**"), _), ..] => {
                    let what = "a call of a macro with * or ** is not supported";
                    return Err((what.into(), *line));
                }
                value => (value, parameters.get(i).is_some_and(|p| p.1)),
            };
            let written = self.level(value, false)?;
            if !default || literal(&written) || written.is_empty() {
                out.extend(written);
                continue;
            }
            out.push(op("("));
            out.extend(written);
            out.extend([op(")"), op("|"), (Token::Name("_given".into()), *line)]);
        }
        Ok(out)
    }
}

fn called(operand: &mut Tokens, name: &str, line: usize) {
    let tokens = [Token::Op("."), Token::Name(name.into()), Token::Op("("), Token::Op(")")];
    operand.extend(tokens.map(|t| (t, line)));
}

fn literal(tokens: &[(Token, usize)]) -> bool {
    match tokens {
        [(Token::Str(_) | Token::Int(_) | Token::Float(_), _)] => true,
        [(Token::Name(n), _)] => {
            matches!(n.as_str(), "true" | "false" | "none" | "True" | "False" | "None")
        }
        _ => false,
    }
}

/// Whether a bracket after these tokens is a subscript or a call.
fn ends_operand(operand: &[(Token, usize)]) -> bool {
    let before = operand.len().checked_sub(2).map(|i| &operand[i].0);
    if matches!(before.and_then(name_of), Some("is" | "not")) {
        return false; // the argument of a test
    }
    matches!(operand.last(), Some((Token::Name(_) | Token::Str(_) | Token::Op(")" | "]" | "}"), _)))
}

fn name_of(token: &Token) -> Option<&str> {
    match token {
        Token::Name(name) => Some(name),
        _ => None,
    }
}

fn name_of_at(tokens: &[(Token, usize)], at: usize) -> Option<&str> {
    tokens.get(at).and_then(|t| name_of(&t.0))
}

/// Returns the filter for a comparison operator.
fn comparison(token: &Token) -> Option<&'static str> {
    Some(match token {
        Token::Op("==") => "_eq",
        Token::Op("!=") => "_ne",
        Token::Op("<") => "_lt",
        Token::Op("<=") => "_le",
        Token::Op(">") => "_gt",
        Token::Op(">=") => "_ge",
        Token::Name(name) if name == "in" => "_in",
        _ => return None,
    })
}

/// Whether the token ends every comparison before it.
fn ends(token: &Token) -> bool {
    match token {
        Token::Op(op) => matches!(*op, "," | ":" | "="),
        Token::Name(name) => {
            matches!(name.as_str(), "and" | "or" | "not" | "if" | "else" | "elif")
        }
        _ => false,
    }
}

fn each_end(token: &Token) -> bool {
    name_of(token) == Some("recursive")
}
