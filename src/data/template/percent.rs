//! The operator `%`: remainder, or Python's string formatting. Layer 6.
//!
//! Invariant: a remainder has Python's sign; operands that Python rejects are errors.

use minijinja::value::{Kwargs, Rest, Value, ValueKind};
use minijinja::{Environment, Error, State};

use super::filters::format_values;
use super::python::{fault, held};

pub fn install(env: &mut Environment<'static>) {
    env.add_filter("_rem", |state: &mut State, left: Value, right: Rest<Value>| {
        right.iter().try_fold(left, |left, right| match left.as_str() {
            Some(_) => formatted(state, left, right),
            None => remainder(&left, right),
        })
    });
}

fn remainder(a: &Value, b: &Value) -> Result<Value, Error> {
    let whole = |v: &Value| match v.kind() {
        ValueKind::Bool => Some(i128::from(v.is_true())),
        _ if v.is_integer() => i128::try_from(v.clone()).ok(),
        _ => None,
    };
    let number = |v: &Value| match v.kind() {
        ValueKind::Bool => Some(f64::from(u8::from(v.is_true()))),
        ValueKind::Number => f64::try_from(v.clone()).ok(),
        _ => None,
    };
    if let (Some(a), Some(b)) = (whole(a), whole(b)) {
        return match a.checked_rem(b) {
            Some(rest) if rest != 0 && (rest < 0) != (b < 0) => Ok(Value::from(rest + b)),
            Some(rest) => Ok(Value::from(rest)),
            None => fault("division by zero"),
        };
    }
    // The engine's integers go up to 128 bits unsigned.
    if a.is_integer() && b.is_integer() {
        let large = |v: &Value| u128::try_from(v.clone()).ok();
        return match large(a).zip(large(b)).and_then(|(a, b)| a.checked_rem(b)) {
            Some(rest) => Ok(Value::from(rest)),
            None => fault("the remainder of so large a number is not supported"),
        };
    }
    match (number(a), number(b)) {
        (Some(_), Some(0.0)) => fault("division by zero"),
        (Some(a), Some(b)) => {
            let rest = a % b;
            let rest = match rest {
                0.0 => 0.0f64.copysign(b),
                _ if (rest < 0.0) != (b < 0.0) => rest + b,
                _ => rest,
            };
            Ok(Value::from(rest))
        }
        _ => fault(format!("% does not support values of type {} and {}", a.kind(), b.kind())),
    }
}

/// Python's `text % value`: a tuple holds positional values, a mapping named values.
fn formatted(state: &mut State, text: Value, value: &Value) -> Result<Value, Error> {
    held(state, value.clone())?;
    let source = text.as_str().unwrap_or_default();
    let conversions = conversions(source);
    if conversions.named {
        if value.kind() != ValueKind::Map || conversions.plain > 0 {
            return fault("a format with names takes a mapping, and no other values");
        }
        let mut named = Vec::new();
        for key in value.try_iter()? {
            if let Some(name) = key.as_str() {
                named.push((name.to_string(), value.get_item(&key)?));
            }
        }
        let named: Kwargs = named.into_iter().collect();
        return format_values(state, text, Rest(vec![Value::from(named)]));
    }
    let values: Vec<Value> = match value.is_tuple() {
        true => value.try_iter()?.collect(),
        false => vec![value.clone()],
    };
    // Python accepts an unused argument that supports subscripts.
    let may_stay = !value.is_tuple() && matches!(value.kind(), ValueKind::Seq | ValueKind::Map);
    if conversions.plain < values.len() && !may_stay {
        return fault("not all values are used by the format");
    }
    let used = values.into_iter().take(conversions.plain).collect();
    format_values(state, text, Rest(used))
}

/// The conversions of a format.
struct Conversions {
    /// Number of positional values, including `*` widths.
    plain: usize,
    /// Whether any value is named.
    named: bool,
}

fn conversions(format: &str) -> Conversions {
    let mut found = Conversions { plain: 0, named: false };
    let mut chars = format.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '%' {
            continue;
        }
        let named = chars.peek() == Some(&'(');
        if named {
            chars.by_ref().find(|c| *c == ')');
        }
        for c in chars.by_ref() {
            match c {
                '*' => found.plain += 1,
                '-' | '+' | ' ' | '#' | '.' | 'h' | 'l' | 'L' | '0'..='9' => {}
                '%' => break,
                _ => {
                    found.plain += usize::from(!named);
                    break;
                }
            }
        }
        found.named |= named;
    }
    found
}
