//! The fields of a request's JSON body. Layer 9.
//!
//! Invariant: every field is read, refused by name, or listed as having no effect; null counts as
//! absent.

use axum::http::StatusCode;
use serde_json::{Map, Value};

use super::error::ApiError;
use crate::data::row::kind;
use crate::error::nearest;

pub(super) struct Fields {
    map: Map<String, Value>,
    asked: Vec<&'static str>,
}

impl Fields {
    pub fn parse(body: &[u8]) -> Result<Fields, ApiError> {
        let wrong = |what: String| ApiError::new(StatusCode::BAD_REQUEST, what);
        match serde_json::from_slice(body) {
            Ok(Value::Object(mut map)) => {
                map.retain(|_, value| !value.is_null());
                Ok(Fields { map, asked: Vec::new() })
            }
            Ok(other) => {
                Err(wrong(format!("the body must be a JSON object, found {}", kind(&other))))
            }
            Err(e) => Err(wrong(format!("the body is not JSON: {e}"))),
        }
    }

    pub fn take(&mut self, name: &'static str) -> Option<Value> {
        self.asked.push(name);
        self.map.shift_remove(name)
    }

    pub fn need(&mut self, name: &'static str, what: &str) -> Result<Value, ApiError> {
        self.take(name)
            .ok_or_else(|| ApiError::field(name, format!("`{name}` is missing; give {what}")))
    }

    pub fn text(&mut self, name: &'static str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(name, "a string", &other)),
        }
    }

    /// A string or a list of strings.
    pub fn texts(&mut self, name: &'static str) -> Result<Vec<String>, ApiError> {
        let what = "a string or a list of strings";
        match self.take(name) {
            None => Ok(Vec::new()),
            Some(Value::String(text)) => Ok(vec![text]),
            Some(Value::Array(items)) => {
                let text = |item: Value| match item {
                    Value::String(text) => Ok(text),
                    other => Err(wrong(name, what, &other)),
                };
                items.into_iter().map(text).collect()
            }
            Some(other) => Err(wrong(name, what, &other)),
        }
    }

    pub fn flag(&mut self, name: &'static str) -> Result<bool, ApiError> {
        match self.take(name) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(flag),
            Some(other) => Err(wrong(name, "true or false", &other)),
        }
    }

    /// A whole number from `least` to `most`. -1 is returned as 0.
    pub fn count(
        &mut self,
        name: &'static str,
        least: i64,
        most: i64,
    ) -> Result<Option<usize>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let number = value.as_i64().filter(|n| (least..=most).contains(n));
        // -1, where it is allowed, means the same as 0.
        number.map(|n| Some(n.max(0) as usize)).ok_or_else(|| {
            let found = short(&value);
            let message =
                format!("`{name}` is {found}; it must be a whole number from {least} to {most}");
            ApiError::field(name, message)
        })
    }

    /// A finite number for which `fits` is true; `what` describes such numbers in the error.
    pub fn number(
        &mut self,
        name: &'static str,
        what: &str,
        fits: impl Fn(f64) -> bool,
    ) -> Result<Option<f64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let number = value.as_f64().filter(|n| n.is_finite() && fits(*n));
        number.map(Some).ok_or_else(|| {
            ApiError::field(name, format!("`{name}` is {}; it must be {what}", short(&value)))
        })
    }

    /// Any 64-bit integer.
    pub fn seed(&mut self, name: &'static str) -> Result<Option<u64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let seed = value.as_u64().or_else(|| value.as_i64().map(|seed| seed as u64));
        seed.map(Some).ok_or_else(|| wrong(name, "an integer of 64 bits", &value))
    }

    pub fn object(&mut self, name: &'static str) -> Result<Map<String, Value>, ApiError> {
        match self.take(name) {
            None => Ok(Map::new()),
            Some(Value::Object(map)) => Ok(map),
            Some(other) => Err(wrong(name, "an object", &other)),
        }
    }

    /// A field whose effect is not supported. Error: its value is not neutral.
    pub fn only(
        &mut self,
        name: &'static str,
        neutral: &str,
        is_neutral: impl Fn(&Value) -> bool,
    ) -> Result<(), ApiError> {
        match self.take(name) {
            Some(value) if !is_neutral(&value) => Err(ApiError::field(
                name,
                format!("`{name}` is not supported here; leave it out, or send {neutral}"),
            )
            .code("unsupported_parameter")),
            _ => Ok(()),
        }
    }

    /// Reads fields that have no effect on the answer.
    pub fn ignore(&mut self, names: &[&'static str]) {
        names.iter().for_each(|name| drop(self.take(name)));
    }

    /// Error: the body has a field that was not read.
    pub fn finish(self) -> Result<(), ApiError> {
        let Some(name) = self.map.keys().next() else { return Ok(()) };
        let near = nearest(name, self.asked.iter().copied());
        let next =
            near.map_or("leave it out".to_string(), |near| format!("did you mean `{near}`?"));
        let message = format!("`{name}` is not supported here; {next}");
        Err(ApiError::field(name, message).code("unsupported_parameter"))
    }
}

pub(super) fn wrong(name: &str, want: &str, found: &Value) -> ApiError {
    ApiError::field(name, format!("`{name}` must be {want}, found {}", kind(found)))
}

/// A value in the form of error messages.
fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(40) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
