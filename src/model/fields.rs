//! Typed access to a JSON object that collects problems instead of stopping at the first. Layer 5.
//!
//! Invariant: every value of the wrong type or range adds one line to `problems` that names its
//! key.

use serde_json::{Map, Value};

pub struct Fields<'a> {
    map: &'a Map<String, Value>,
    at: &'a str, // prefix of keys in messages: "" or "rope_parameters."
    pub problems: Vec<String>,
}

impl<'a> Fields<'a> {
    pub fn new(map: &'a Map<String, Value>, at: &'a str) -> Self {
        Self { map, at, problems: Vec::new() }
    }

    /// Returns the value of `key`; None if it is absent or null.
    pub fn value(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// Whether the key is present with the value null.
    pub fn is_null(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(Value::is_null)
    }

    /// Reads an integer from `1` to `max`.
    pub fn size(&mut self, key: &str, max: usize) -> Option<usize> {
        let value = self.value(key)?;
        match value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| (1..=max).contains(n))
        {
            Some(n) => Some(n),
            None => self.wrong(key, value, &format!("an integer from 1 to {max}")),
        }
    }

    /// Like [`size`](Self::size), but absence is a problem too.
    pub fn required_size(&mut self, key: &str, max: usize) -> usize {
        if self.value(key).is_none() {
            self.problem(format!("{}{key} is missing", self.at));
        }
        self.size(key, max).unwrap_or(1)
    }

    /// Reads a finite number for which `ok` holds; `what` describes it in words.
    pub fn number(&mut self, key: &str, what: &str, ok: impl Fn(f64) -> bool) -> Option<f64> {
        let value = self.value(key)?;
        match value.as_f64().filter(|x| x.is_finite() && ok(*x)) {
            Some(x) => Some(x),
            None => self.wrong(key, value, what),
        }
    }

    pub fn boolean(&mut self, key: &str) -> Option<bool> {
        let value = self.value(key)?;
        value.as_bool().or_else(|| self.wrong(key, value, "true or false"))
    }

    pub fn string(&mut self, key: &str) -> Option<&'a str> {
        let value = self.value(key)?;
        value.as_str().or_else(|| self.wrong(key, value, "a string"))
    }

    pub fn array(&mut self, key: &str) -> Option<&'a Vec<Value>> {
        let value = self.value(key)?;
        value.as_array().or_else(|| self.wrong(key, value, "a list"))
    }

    pub fn object(&mut self, key: &str) -> Option<&'a Map<String, Value>> {
        let value = self.value(key)?;
        value.as_object().or_else(|| self.wrong(key, value, "an object"))
    }

    pub fn problem(&mut self, line: impl Into<String>) {
        self.problems.push(line.into());
    }

    pub fn wrong<T>(&mut self, key: &str, value: &Value, what: &str) -> Option<T> {
        let mut shown = value.to_string();
        if shown.chars().count() > 60 {
            shown = shown.chars().take(57).collect::<String>() + "...";
        }
        self.problem(format!("{}{key} is {shown}; it must be {what}", self.at));
        None
    }
}
