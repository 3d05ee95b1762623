//! Python's comparisons as filters. Layer 6.
//!
//! Invariant: comparisons that Python rejects are errors; the work is charged before it is done.

use std::cmp::Ordering;

use minijinja::value::{Rest, Value, ValueKind};
use minijinja::{Environment, Error, State};

use super::python::{fault, held};
use super::rewrite::UNDEFINED;

pub fn install(env: &mut Environment<'static>) {
    for name in ["_eq", "_ne", "_lt", "_le", "_gt", "_ge", "_in", "_notin"] {
        env.add_filter(name, move |state: &State, a: Value, b: Value| compare(state, name, &a, &b));
    }
    env.add_filter("_chain", |state: &State, first: Value, rest: Rest<Value>| {
        let mut left = &first;
        for pair in rest.chunks(2) {
            let [op, right] = pair else { return fault("the comparison has no right side") };
            if !compare(state, op.as_str().unwrap_or_default(), left, right)? {
                return Ok(false);
            }
            left = right;
        }
        Ok(true)
    });
    env.add_filter(
        "_given",
        |value: Value| {
            if value.is_undefined() { Value::from(UNDEFINED) } else { value }
        },
    );
}

fn compare(state: &State, op: &str, a: &Value, b: &Value) -> Result<bool, Error> {
    let many =
        |v: &Value| matches!(v.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::Iterable);
    if many(a) {
        held(state, a.clone())?;
    }
    if many(b) && many(a) {
        held(state, b.clone())?;
    }
    let length = |v: &Value| v.as_str().map_or(0, str::len) as u64;
    state.consume_fuel((length(a) + length(b)) / 64)?;
    let wanted: fn(Ordering) -> bool = match op {
        "_eq" => return Ok(a == b),
        "_ne" => return Ok(a != b),
        "_in" => return contains(state, a, b),
        "_notin" => return Ok(!contains(state, a, b)?),
        "_lt" => Ordering::is_lt,
        "_le" => Ordering::is_le,
        "_gt" => Ordering::is_gt,
        _ => Ordering::is_ge,
    };
    Ok(order(a, b)?.is_some_and(wanted))
}

/// None if one side is not a number.
fn order(a: &Value, b: &Value) -> Result<Option<Ordering>, Error> {
    let whole = |v: &Value| match v.kind() {
        ValueKind::Bool => Some(i128::from(v.is_true())),
        _ if v.is_integer() => i128::try_from(v.clone()).ok(),
        _ => None,
    };
    let float = |v: &Value| match v.kind() {
        ValueKind::Bool => Some(f64::from(u8::from(v.is_true()))),
        ValueKind::Number => f64::try_from(v.clone()).ok(),
        _ => None,
    };
    if let (Some(x), Some(y)) = (a.as_str(), b.as_str()) {
        return Ok(Some(x.cmp(y)));
    }
    if let (Some(x), Some(y)) = (whole(a), whole(b)) {
        return Ok(Some(x.cmp(&y)));
    }
    if let (Some(x), Some(y)) = (float(a), float(b)) {
        return Ok(x.partial_cmp(&y));
    }
    if a.kind() == ValueKind::Seq && b.kind() == ValueKind::Seq && a.is_tuple() == b.is_tuple() {
        for (x, y) in a.try_iter()?.zip(b.try_iter()?) {
            if x != y {
                return order(&x, &y);
            }
        }
        return Ok(Some(a.len().cmp(&b.len())));
    }
    fault(format!("cannot compare values of type {} and {}", a.kind(), b.kind()))
}

fn contains(state: &State, item: &Value, all: &Value) -> Result<bool, Error> {
    match all.kind() {
        ValueKind::Undefined => Ok(false),
        ValueKind::String => match (item.as_str(), all.as_str()) {
            (Some(item), Some(all)) => Ok(all.contains(item)),
            _ => fault(format!(
                "the left side of 'in' must be a string when the right side is one, not a {}",
                item.kind()
            )),
        },
        ValueKind::Map => match item.kind() {
            ValueKind::Map => fault("a mapping cannot be a key"),
            ValueKind::Seq if !item.is_tuple() => fault("a list cannot be a key"),
            _ => Ok(!all.get_item(item)?.is_undefined() || all.try_iter()?.any(|key| key == *item)),
        },
        ValueKind::Seq | ValueKind::Iterable => {
            state.consume_fuel(all.len().unwrap_or(0) as u64 / 4)?;
            Ok(all.try_iter()?.any(|x| x == *item))
        }
        kind => fault(format!("a value of type {kind} is not iterable")),
    }
}
