//! The part of JSON Schema that output formats use. Written by hand, because the `jsonschema` crate
//! would add some eighty dependencies. Layer 6.
//!
//! Invariant: an unsupported keyword is an error when the schema is read, so nothing passes because
//! a keyword was ignored.

use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::fsio;

const CHECKED: [&str; 15] = [
    "type",
    "required",
    "properties",
    "additionalProperties",
    "items",
    "enum",
    "const",
    "minimum",
    "maximum",
    "minItems",
    "maxItems",
    "minLength",
    "maxLength",
    "anyOf",
    "allOf",
];
const NOTES: [&str; 8] =
    ["$schema", "$id", "$comment", "title", "description", "default", "examples", "format"];

#[derive(Clone, Debug)]
pub struct Schema {
    root: Value,
}

impl Schema {
    pub fn read(path: &Path) -> Result<Schema> {
        let root = serde_json::from_slice(&fsio::read(path)?)
            .map_err(|e| Error::data(path, Some(e.line()), format!("no JSON: {e}")))?;
        Schema::new(root).map_err(|e| Error::data(path, None, e.to_string()))
    }

    pub fn new(root: Value) -> Result<Schema> {
        known(&root, "$")?;
        Ok(Schema { root })
    }

    pub fn accepts(&self, value: &Value) -> bool {
        accepts(&self.root, value)
    }
}

fn known(schema: &Value, at: &str) -> Result<()> {
    if schema.is_boolean() {
        return Ok(());
    }
    let Some(keys) = schema.as_object() else {
        return Err(Error::Config(format!("{at}: a schema must be an object, not {schema}")));
    };
    for (key, value) in keys {
        let here = format!("{at}.{key}");
        match key.as_str() {
            "properties" => {
                for (name, one) in value.as_object().into_iter().flatten() {
                    known(one, &format!("{here}.{name}"))?;
                }
            }
            "items" | "additionalProperties" => known(value, &here)?,
            "anyOf" | "allOf" => {
                for one in value.as_array().into_iter().flatten() {
                    known(one, &here)?;
                }
            }
            other if CHECKED.contains(&other) || NOTES.contains(&other) => {}
            _ => {
                let checked = CHECKED.join(", ");
                return Err(Error::Config(format!(
                    "{here} is not supported; supported: {checked}"
                )));
            }
        }
    }
    Ok(())
}

fn accepts(schema: &Value, v: &Value) -> bool {
    if let Some(all_or_nothing) = schema.as_bool() {
        return all_or_nothing;
    }
    let length = |key: &str| schema.get(key).and_then(Value::as_u64).map(|n| n as usize);
    let within = |n: usize, low: &str, high: &str| {
        length(low).is_none_or(|l| n >= l) && length(high).is_none_or(|h| n <= h)
    };
    let of_type = match schema.get("type") {
        Some(Value::String(name)) => is(name, v),
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).any(|name| is(name, v)),
        _ => true,
    };
    let listed = schema.get("enum").and_then(Value::as_array).is_none_or(|e| e.contains(v))
        && schema.get("const").is_none_or(|c| c == v);
    let combined = schema
        .get("anyOf")
        .and_then(Value::as_array)
        .is_none_or(|s| s.iter().any(|s| accepts(s, v)))
        && schema
            .get("allOf")
            .and_then(Value::as_array)
            .is_none_or(|s| s.iter().all(|s| accepts(s, v)));
    let inside = match v {
        Value::Object(map) => {
            let required = schema.get("required").and_then(Value::as_array);
            let has_all = required.is_none_or(|r| {
                r.iter().filter_map(Value::as_str).all(|name| map.contains_key(name))
            });
            has_all
                && map.iter().all(|(name, value)| {
                    let own = schema.get("properties").and_then(|p| p.get(name));
                    own.or(schema.get("additionalProperties")).is_none_or(|s| accepts(s, value))
                })
        }
        Value::Array(list) => {
            within(list.len(), "minItems", "maxItems")
                && schema.get("items").is_none_or(|s| list.iter().all(|one| accepts(s, one)))
        }
        Value::String(s) => within(s.chars().count(), "minLength", "maxLength"),
        Value::Number(n) => {
            let (n, bound) = (n.as_f64().unwrap_or(f64::NAN), |key: &str| {
                schema.get(key).and_then(Value::as_f64)
            });
            bound("minimum").is_none_or(|b| n >= b) && bound("maximum").is_none_or(|b| n <= b)
        }
        _ => true,
    };
    of_type && listed && combined && inside
}

fn is(name: &str, v: &Value) -> bool {
    match name {
        "object" => v.is_object(),
        "array" => v.is_array(),
        "string" => v.is_string(),
        "boolean" => v.is_boolean(),
        "null" => v.is_null(),
        "number" => v.is_number(),
        "integer" => v.is_i64() || v.is_u64() || v.as_f64().is_some_and(|f| f.fract() == 0.0),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_schema_accepts_what_it_describes_and_nothing_else() {
        let schema = Schema::new(json!({
            "type": "object", "required": ["name", "tags"], "additionalProperties": false,
            "properties": {
                "name": {"type": "string", "minLength": 1},
                "age": {"type": ["integer", "null"], "minimum": 0},
                "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2}
            }
        }))
        .unwrap();
        assert!(schema.accepts(&json!({"name": "x", "tags": ["a"], "age": null})));
        for wrong in [
            json!([]),
            json!({"name": "x"}),
            json!({"name": "", "tags": []}),
            json!({"name": "x", "tags": ["c"]}),
            json!({"name": "x", "tags": ["a", "b", "a"]}),
            json!({"name": "x", "tags": [], "age": -1}),
            json!({"name": "x", "tags": [], "age": 1.5}),
            json!({"name": "x", "tags": [], "more": 1}),
        ] {
            assert!(!schema.accepts(&wrong), "{wrong}");
        }
    }

    #[test]
    fn a_keyword_that_is_not_checked_is_an_error() {
        let error = Schema::new(json!({"properties": {"a": {"patternProperties": {}}}}))
            .unwrap_err()
            .to_string();
        assert!(error.contains("$.properties.a.patternProperties"), "{error}");
    }
}
