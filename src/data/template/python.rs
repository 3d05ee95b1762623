//! Python's string and list methods, and Jinja2's tests and globals, that minijinja lacks or
//! defines differently. Layer 6.
//!
//! Invariant: the result of a call is bounded before it is built.

use std::sync::Arc;

use minijinja::value::{Enumerator, Kwargs, Object, ObjectRepr, Rest, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State};

use super::is_space;
use super::rewrite::has_method;

/// Limits: the longest string that one call may build, and the size and depth of a value.
const MAX_TEXT: usize = 32 << 20;
const MAX_NODES: usize = 1 << 18;
const MAX_DEPTH: usize = 100;

pub fn install(env: &mut Environment<'static>) {
    env.set_unknown_method_callback(method);
    env.add_filter("_held", held);
    env.add_filter("_stored", stored);
    env.remove_global("debug");
    env.add_filter("_lazy", |value: Value| -> Result<Value, Error> {
        Ok(Value::from_object(Generator(value.try_iter()?.collect())))
    });
    env.add_test("sequence", |v: Value| is_sequence(&v));
    env.add_test("mapping", |v: Value| v.kind() == ValueKind::Map);
    env.add_test("iterable", |v: Value| {
        is_sequence(&v) || matches!(v.kind(), ValueKind::Undefined | ValueKind::Iterable)
    });
    env.add_function("joiner", minijinja_contrib::globals::joiner);
    env.add_function("cycler", |state: &State, items: Rest<Value>| {
        for item in items.iter() {
            stored(state, item.clone())?;
        }
        minijinja_contrib::globals::cycler(items.0.clone())
    });
    env.add_function("namespace", |state: &State, args: Rest<Value>, kwargs: Kwargs| {
        let named = Value::from(kwargs);
        let given = match (args.first(), named.len().unwrap_or(0)) {
            (None, 0) => return minijinja::functions::namespace(None),
            (None, _) => named,
            (Some(value), 0) if args.len() == 1 => value.clone(),
            _ => return fault("namespace() takes one mapping, or names"),
        };
        stored(state, given.clone())?;
        let (given,) = minijinja::value::from_args(std::slice::from_ref(&given))?;
        minijinja::functions::namespace(Some(given))
    });
    env.add_filter("_iter", |value: Value| match value.kind() {
        ValueKind::None | ValueKind::Bool | ValueKind::Number => {
            fault(format!("a value of type {} is not iterable", value.kind()))
        }
        _ => Ok(value),
    });
}

/// A value that is a generator in Jinja2: true even if it is empty.
#[derive(Debug)]
struct Generator(Vec<Value>);

impl Object for Generator {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Iterable
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.0.clone())
    }

    fn is_true(self: &Arc<Self>) -> bool {
        true
    }
}

fn is_sequence(value: &Value) -> bool {
    matches!(
        value.kind(),
        ValueKind::String | ValueKind::Seq | ValueKind::Map | ValueKind::Undefined
    )
}

pub(super) fn fault<T>(what: impl Into<String>) -> Result<T, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, what.into()))
}

/// Returns the value if it is neither too deep nor too large to print, compare or drop.
pub(super) fn held(state: &State, value: Value) -> Result<Value, Error> {
    walked(state, value, false)
}

/// Like `held`, for values stored in an object: they must be plain data, so that no object can
/// contain itself.
fn stored(state: &State, value: Value) -> Result<Value, Error> {
    walked(state, value, true)
}

/// Whether a value is a mutable object: a namespace, a loop, a cycler, a macro.
fn is_object(value: &Value) -> bool {
    let changes = |o: &minijinja::value::DynObject| {
        o.type_name().ends_with("Namespace") || o.type_name().ends_with("Loop")
    };
    value.kind() == ValueKind::Plain || value.as_object().is_some_and(changes)
}

fn walked(state: &State, value: Value, plain: bool) -> Result<Value, Error> {
    if plain && is_object(&value) {
        return fault("a namespace, loop or macro inside another object is not supported");
    }
    let holds =
        |v: &Value| matches!(v.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::Iterable);
    if !holds(&value) {
        return Ok(value);
    }
    let mut nodes = 0;
    let mut open = vec![(value.clone(), 0)];
    while let Some((at, depth)) = open.pop() {
        if depth > MAX_DEPTH {
            return fault("a value holds itself, or is nested too deeply");
        }
        let Ok(items) = at.try_iter() else { continue };
        for item in items {
            nodes += 1;
            if nodes > MAX_NODES {
                return fault("a value is too large");
            }
            let item = match at.kind() {
                ValueKind::Map => at.get_item(&item)?,
                _ => item,
            };
            if plain && is_object(&item) {
                return fault("a namespace, loop or macro inside another object is not supported");
            }
            if holds(&item) {
                open.push((item, depth + 1));
            }
        }
    }
    state.consume_fuel(nodes as u64 / 8)?;
    Ok(value)
}

pub(super) fn sized(length: Option<usize>) -> Result<(), Error> {
    match length {
        Some(n) if n <= MAX_TEXT => Ok(()),
        _ => fault("a string is too long"),
    }
}

/// Python's `str.splitlines`.
pub(super) fn split_lines(text: &str, keep: bool) -> Vec<&str> {
    let ends = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\u{B}' | '\u{C}' | '\u{1C}'
                ..='\u{1E}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let (mut lines, mut rest) = (Vec::new(), text);
    while let Some(at) = rest.find(ends) {
        let width = if rest[at..].starts_with("\r\n") {
            2
        } else {
            rest[at..].chars().next().map_or(1, char::len_utf8)
        };
        lines.push(&rest[..if keep { at + width } else { at }]);
        rest = &rest[at + width..];
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}

/// Methods that minijinja lacks: our own first, then those of minijinja-contrib.
fn method(state: &mut State, value: &Value, name: &str, all: &[Value]) -> Result<Value, Error> {
    // `x.name` and `x['name']` if Python has a method of that name
    let found = name.strip_prefix("_attr_").map(|n| (n, true));
    if let Some((key, attribute)) = found.or(name.strip_prefix("_item_").map(|n| (n, false))) {
        let item = if value.kind() == ValueKind::Map {
            value.get_item(&Value::from(key))?
        } else {
            Value::UNDEFINED
        };
        let method = !is_object(value) && has_method(value.kind(), key);
        if method && (attribute || item.is_undefined()) {
            let kind = value.kind();
            return fault(format!("'{key}' is a method of a {kind}; write x['{key}'] for an item"));
        }
        return Ok(item);
    }
    let (args, kwargs) = match all.last() {
        Some(last) if last.is_kwargs() => {
            (&all[..all.len() - 1], Kwargs::try_from(last.clone()).ok())
        }
        _ => (all, None),
    };
    let named = |i: usize, key: &str| -> Option<Value> {
        let from_name = kwargs.as_ref().and_then(|k| k.get::<Option<Value>>(key).ok().flatten());
        args.get(i).cloned().or(from_name)
    };
    let text_at = |i: usize| match args.get(i).and_then(|v| v.as_str()) {
        Some(text) => Ok(text),
        None => fault(format!("{name}() takes a string")),
    };
    if let Some(s) = value.as_str() {
        state.consume_fuel(s.len() as u64 / 64)?;
        let pad = |left: usize, right: usize| -> Result<Value, Error> {
            let fill = args.get(1).and_then(|v| v.as_str()).unwrap_or(" ");
            sized(left.checked_add(right).and_then(|n| n.checked_mul(4)))?;
            Ok(Value::from(format!("{}{s}{}", fill.repeat(left), fill.repeat(right))))
        };
        let missing = || match args.first().and_then(|v| v.as_i64()) {
            Some(width) => Ok((width.max(0) as usize).saturating_sub(s.chars().count())),
            None => fault(format!("{name}() takes a width")),
        };
        let tuple =
            |parts: [&str; 3]| Value::from(minijinja::value::Tuple::from(parts.map(Value::from)));
        return match name {
            "splitlines" => {
                let keep = named(0, "keepends").is_some_and(|v| v.is_true());
                Ok(split_lines(s, keep).into_iter().map(Value::from).collect())
            }
            "title" if args.is_empty() => {
                let mut inside = false;
                let title = s.chars().flat_map(|c| {
                    let cased: Vec<char> = match inside {
                        false => c.to_uppercase().collect(),
                        true => c.to_lowercase().collect(),
                    };
                    inside = c.is_lowercase() || c.is_uppercase();
                    cased
                });
                Ok(Value::from(title.collect::<String>()))
            }
            "swapcase" if args.is_empty() => Ok(Value::from(
                s.chars()
                    .map(|c| {
                        if c.is_uppercase() {
                            c.to_lowercase().to_string()
                        } else {
                            c.to_uppercase().to_string()
                        }
                    })
                    .collect::<String>(),
            )),
            "strip" | "lstrip" | "rstrip" => {
                let set: Option<Vec<char>> = match args.first() {
                    Some(v) if !v.is_none() => Some(text_at(0)?.chars().collect()),
                    _ => None,
                };
                let drop = |c: char| set.as_ref().map_or(is_space(c), |set| set.contains(&c));
                Ok(Value::from(match name {
                    "strip" => s.trim_matches(drop),
                    "lstrip" => s.trim_start_matches(drop),
                    _ => s.trim_end_matches(drop),
                }))
            }
            "split" if all.is_empty() => {
                let words = s.split(is_space).filter(|w| !w.is_empty());
                Ok(words.map(Value::from).collect())
            }
            "removeprefix" => Ok(Value::from(s.strip_prefix(text_at(0)?).unwrap_or(s))),
            "removesuffix" => Ok(Value::from(s.strip_suffix(text_at(0)?).unwrap_or(s))),
            "partition" | "rpartition" => {
                let sep = text_at(0)?;
                if sep.is_empty() {
                    return fault("empty separator");
                }
                let found =
                    if name == "partition" { s.split_once(sep) } else { s.rsplit_once(sep) };
                Ok(match found {
                    Some((a, b)) => tuple([a, sep, b]),
                    None if name == "partition" => tuple([s, "", ""]),
                    None => tuple(["", "", s]),
                })
            }
            "rsplit" => {
                let count = named(1, "maxsplit").and_then(|v| v.as_i64()).unwrap_or(-1);
                let limit = usize::try_from(count).map_or(usize::MAX, |n| n.saturating_add(1));
                let sep = named(0, "sep").filter(|v| !v.is_none());
                let mut parts: Vec<&str> = Vec::new();
                match sep.as_ref() {
                    Some(sep) => match sep.as_str() {
                        Some(sep) if !sep.is_empty() => parts.extend(s.rsplitn(limit, sep)),
                        _ => return fault("rsplit() takes a separator"),
                    },
                    None => {
                        let mut rest = s.trim_end_matches(is_space);
                        while !rest.is_empty() && parts.len() + 1 < limit {
                            let at = rest.rfind(is_space).map_or(0, |i| {
                                i + rest[i..].chars().next().map_or(1, char::len_utf8)
                            });
                            parts.push(&rest[at..]);
                            rest = rest[..at].trim_end_matches(is_space);
                        }
                        if !rest.is_empty() {
                            parts.push(rest);
                        }
                    }
                }
                Ok(parts.into_iter().rev().map(Value::from).collect())
            }
            "index" | "rindex" if args.len() == 1 => {
                let sub = text_at(0)?;
                match if name == "index" { s.find(sub) } else { s.rfind(sub) } {
                    Some(at) => Ok(Value::from(s[..at].chars().count())),
                    None => fault("substring not found"),
                }
            }
            "find" | "rfind" if args.len() == 1 => {
                let sub = text_at(0)?;
                let at = if name == "find" { s.find(sub) } else { s.rfind(sub) };
                Ok(at.map_or(Value::from(-1), |at| Value::from(s[..at].chars().count())))
            }
            "zfill" => {
                let zeros = missing()?;
                sized(Some(zeros))?;
                let sign = usize::from(s.starts_with(['-', '+']));
                Ok(Value::from(format!("{}{}{}", &s[..sign], "0".repeat(zeros), &s[sign..])))
            }
            "ljust" => pad(0, missing()?),
            "rjust" => pad(missing()?, 0),
            "center" => {
                let pads = missing()?;
                let width = pads + s.chars().count();
                let left = pads / 2 + (pads & width & 1);
                pad(left, pads - left)
            }
            "replace" => {
                let (old, new) = (text_at(0)?, text_at(1)?);
                let count = named(2, "count").and_then(|v| v.as_i64()).unwrap_or(-1);
                let found =
                    if old.is_empty() { s.chars().count() + 1 } else { s.matches(old).count() };
                let times = usize::try_from(count).map_or(found, |n| n.min(found));
                sized(times.checked_mul(new.len()).and_then(|n| n.checked_add(s.len())))?;
                state.consume_fuel((times * new.len()) as u64 / 64)?;
                Ok(Value::from(s.replacen(old, new, times)))
            }
            "format" => {
                widths(s)?;
                minijinja_contrib::pycompat::unknown_method_callback(state, value, name, all)
            }
            "join" => {
                let mut length = s.len();
                for item in args.first().map(|v| v.try_iter()).transpose()?.into_iter().flatten() {
                    let Some(text) = item.as_str() else {
                        return fault("join() takes strings");
                    };
                    length = length.saturating_add(text.len() + s.len());
                    sized(Some(length))?;
                }
                minijinja_contrib::pycompat::unknown_method_callback(state, value, name, all)
            }
            _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, all),
        };
    }
    if value.kind() == ValueKind::Seq && name == "index" && args.len() == 1 {
        return match value.try_iter()?.position(|item| item == args[0]) {
            Some(at) => Ok(Value::from(at)),
            None => fault("the value is not in the list"),
        };
    }
    if value.kind() == ValueKind::Map && name == "copy" && all.is_empty() {
        return Ok(value.clone());
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, all)
}

/// Rejects a format string with a width or precision of more than four digits.
pub(super) fn widths(format: &str) -> Result<(), Error> {
    let long = format.as_bytes().windows(5).any(|w| w.iter().all(u8::is_ascii_digit));
    if long { fault("the width of a format is too large") } else { Ok(()) }
}
