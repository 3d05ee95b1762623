//! Jinja2 filters that minijinja lacks or defines differently. Layer 6.
//!
//! Invariant: the result of a filter is bounded before it is built.

use std::fmt::Write;

use minijinja::value::{Kwargs, Rest, Value, ValueKind};
use minijinja::{Environment, Error, State};

use super::is_space;
use super::python::{fault, sized, split_lines};
use crate::data::jinja::{repr_of, str_of};

pub fn install(env: &mut Environment<'static>) {
    env.add_filter("default", or_default);
    env.add_filter("d", or_default);
    env.add_filter("indent", indent);
    env.add_filter("int", int);
    env.add_filter("float", float);
    env.add_filter("urlencode", urlencode);
    env.add_filter("format", format_values);
}

fn or_default(value: Value, args: Rest<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let named: Option<Value> = kwargs.get("default_value")?;
    let boolean: Option<Value> = kwargs.get("boolean")?;
    kwargs.assert_all_used()?;
    let falsy = boolean.or_else(|| args.get(1).cloned()).is_some_and(|v| v.is_true());
    if value.is_undefined() || (falsy && !value.is_true()) {
        return Ok(named.or_else(|| args.first().cloned()).unwrap_or_else(|| Value::from("")));
    }
    Ok(value)
}

/// Returns an argument by position or name.
fn argument(args: &[Value], kwargs: &Kwargs, i: usize, name: &str) -> Result<Option<Value>, Error> {
    Ok(kwargs.get::<Option<Value>>(name)?.or_else(|| args.get(i).cloned()))
}

/// Parses a number like Python's `float`.
fn parsed(text: &str) -> Option<f64> {
    let text = text.trim_matches(is_space);
    if text.starts_with('_') || text.ends_with('_') || text.contains("__") {
        return None;
    }
    text.replace('_', "").parse().ok()
}

/// Jinja2's `float(default=0.0)`.
fn float(value: Value, args: Rest<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let default = argument(&args, &kwargs, 0, "default")?;
    kwargs.assert_all_used()?;
    let number = match value.kind() {
        ValueKind::Undefined => return fault("an undefined value is not a number"),
        ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        ValueKind::String => value.as_str().and_then(parsed),
        ValueKind::Number => f64::try_from(value).ok(),
        _ => None,
    };
    Ok(number.map(Value::from).or(default).unwrap_or_else(|| Value::from(0.0)))
}

/// Jinja2's `int(default=0, base=10)`.
fn int(value: Value, args: Rest<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let default = argument(&args, &kwargs, 0, "default")?;
    let base = match argument(&args, &kwargs, 1, "base")? {
        Some(base) => base.as_i64().and_then(|n| u32::try_from(n).ok()),
        None => Some(10),
    };
    kwargs.assert_all_used()?;
    let Some(base) = base.filter(|b| (2..=36).contains(b)) else {
        return fault("the base of int must be a number from 2 to 36");
    };
    // integers of more than 127 bits are not supported
    let whole = |x: f64| (x.abs() < 1e38).then(|| Value::from(x as i128));
    let number = match value.kind() {
        ValueKind::Undefined => return fault("an undefined value is not a number"),
        ValueKind::Bool => Some(Value::from(i64::from(value.is_true()))),
        ValueKind::Number if value.is_integer() => Some(value),
        ValueKind::Number => match f64::try_from(value) {
            Ok(x) if x.is_nan() => None,
            Ok(x) => match whole(x) {
                Some(value) => Some(value),
                None => return fault("the number is too large for int"),
            },
            Err(e) => return Err(e),
        },
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            match digits(text, base) {
                Some(n) => Some(Value::from(n)),
                None => match parsed(text) {
                    Some(x) if x.is_finite() => match whole(x) {
                        Some(value) => Some(value),
                        None => return fault("the number is too large for int"),
                    },
                    _ => None,
                },
            }
        }
        _ => None,
    };
    Ok(number.or(default).unwrap_or_else(|| Value::from(0)))
}

/// Parses an integer like Python's `int`.
fn digits(text: &str, base: u32) -> Option<i128> {
    let text = text.trim_matches(is_space);
    let (sign, rest) = match text.strip_prefix('-') {
        Some(rest) => ("-", rest),
        None => ("", text.strip_prefix('+').unwrap_or(text)),
    };
    let prefix = match base {
        2 => "0b",
        8 => "0o",
        16 => "0x",
        _ => "",
    };
    let bare = match rest.get(..prefix.len()) {
        Some(head) if !prefix.is_empty() && head.eq_ignore_ascii_case(prefix) => {
            let bare = &rest[prefix.len()..];
            bare.strip_prefix('_').unwrap_or(bare)
        }
        _ => rest,
    };
    let odd = bare.starts_with(['_', '+', '-']) || bare.ends_with('_') || bare.contains("__");
    let number = format!("{sign}{}", bare.replace('_', ""));
    i128::from_str_radix(&number, base).ok().filter(|_| !odd)
}

/// Jinja2's `urlencode`, of a text or of pairs.
fn urlencode(value: Value) -> Result<String, Error> {
    let pair = |key: &Value, value: &Value| {
        format!("{}={}", quote(&str_of(key), true), quote(&str_of(value), true))
    };
    let mut pairs = Vec::new();
    match value.kind() {
        ValueKind::Map => {
            for key in value.try_iter()? {
                pairs.push(pair(&key, &value.get_item(&key)?));
            }
        }
        ValueKind::Seq | ValueKind::Iterable => {
            for item in value.try_iter()? {
                if item.len() != Some(2) || item.kind() != ValueKind::Seq {
                    return fault("urlencode takes a text, a mapping, or a list of pairs");
                }
                pairs.push(pair(&item.get_item_by_index(0)?, &item.get_item_by_index(1)?));
            }
        }
        _ => return Ok(quote(&str_of(&value), false)),
    }
    Ok(pairs.join("&"))
}

fn quote(text: &str, in_query: bool) -> String {
    let mut out = String::with_capacity(text.len());
    for b in text.bytes() {
        match b {
            b'_' | b'.' | b'-' | b'~' => out.push(b.into()),
            _ if b.is_ascii_alphanumeric() => out.push(b.into()),
            b'/' if !in_query => out.push('/'),
            b' ' if in_query => out.push('+'),
            _ => _ = write!(out, "%{b:02X}"),
        }
    }
    out
}

/// Jinja2's `format`, which is Python's `%`: `%s` and `%r` print as in Python.
pub(super) fn format_values(
    state: &mut State,
    format: Value,
    args: Rest<Value>,
) -> Result<Value, Error> {
    let Some(text) = format.as_str() else { return fault("format takes a string") };
    super::python::widths(text)?;
    let mut args = args.0;
    let named = args.last().is_some_and(Value::is_kwargs);
    let (mut out, mut rest, mut next) = (String::new(), text, 0);
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..=at]);
        rest = &rest[at + 1..];
        let flags =
            rest.find(|c: char| !matches!(c, '-' | '+' | ' ' | '#' | '0'..='9' | '.' | '*'));
        let flags = flags.unwrap_or(rest.len());
        next += rest[..flags].matches('*').count();
        out.push_str(&rest[..flags]);
        rest = &rest[flags..];
        let Some(kind) = rest.chars().next() else { break };
        match kind {
            '%' => {}
            '(' if named => {
                // leave a named conversion as it is
                let end = rest.find(')').map_or(rest.len(), |at| at + 1);
                let kind = rest[end..].trim_start_matches(|c: char| !c.is_ascii_alphabetic());
                if kind.starts_with(['r', 'a']) {
                    return fault("the format %r of a named value is not supported");
                }
                out.push_str(&rest[..end]);
                rest = &rest[end..];
                continue;
            }
            's' | 'r' => {
                if let Some(value) = args.get_mut(next).filter(|v| !v.is_kwargs()) {
                    *value = Value::from(if kind == 's' { str_of(value) } else { repr_of(value) });
                }
                next += 1;
                out.push('s');
                rest = &rest[1..];
                continue;
            }
            _ => next += 1,
        }
        out.push(kind);
        rest = &rest[kind.len_utf8()..];
    }
    out.push_str(rest);
    let (values,) = minijinja::value::from_args(&args)?;
    minijinja::filters::format(state, &Value::from(out), values)
}

/// Jinja2's `indent(width=4, first=false, blank=false)`.
fn indent(text: Value, args: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let argument = |i: usize, name: &str| argument(&args, &kwargs, i, name);
    let Some(text) = text.as_str() else { return fault("indent takes a string") };
    let by = match argument(0, "width")? {
        Some(v) => match (v.as_str(), v.as_i64()) {
            (Some(text), _) => text.to_string(),
            (None, Some(n)) if n <= 1000 => " ".repeat(n.max(0) as usize),
            _ => return fault("the width of indent must be a string or a small number"),
        },
        None => "    ".into(),
    };
    let first = argument(1, "first")?.is_some_and(|v| v.is_true());
    let blank = argument(2, "blank")?.is_some_and(|v| v.is_true());
    kwargs.assert_all_used()?;
    let text = format!("{text}\n");
    sized(text.matches('\n').count().checked_mul(by.len()).map(|n| n + text.len()))?;
    // splitlines, as in Jinja2; the first line has its own rule
    let lines = split_lines(&text, false);
    let mut out = String::new();
    for (i, line) in lines.iter().enumerate() {
        if i > 0 {
            out.push('\n');
        }
        if if i == 0 { first } else { blank || !line.is_empty() } {
            out.push_str(&by);
        }
        out.push_str(line);
    }
    Ok(out)
}
